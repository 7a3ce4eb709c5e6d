"""What a search over QAT recipes chooses from: a point is one recipe, a space says which points there are.

bits, group, inputs     the scheme: bits of weights, elements that share a scale (0: an output row), bits of activations
scales                  `learned` (LSQ) or `fixed` (clipped straight-through)
learning_rate           times what qat/settings.py has for these bits and this size
steps, frozen           length of the run; share of the blocks, from below, that does not train
lora                    rank of adapters inside the rounding, which alone train, `learned` scales with them; 0: none
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantailor.errors import UsageError
from quantailor.qat.settings import Settings, adapter_rate, learning_rates
from quantailor.spec import Scheme

Value = int | float | str


@dataclass(frozen=True)
class Range:
    """Any number from `low` to `high`, drawn evenly in its logarithm."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise UsageError(f"{self.low}..{self.high} is no range; write two numbers above 0, the lower first")

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high


@dataclass(frozen=True)
class Point:
    """One recipe."""

    bits: int = 4
    group: int = 32
    inputs: int = 16
    scales: str = "learned"
    learning_rate: float = 1.0
    steps: int = 200
    frozen: float = 0.0
    lora: int = 0

    @property
    def scheme(self) -> Scheme:
        """Raises: UsageError where the parts contradict."""
        return scheme_of(self.bits, self.group, self.inputs)

    def settings(self, base: Settings, num_parameters: int, steps: int | None = None) -> Settings:
        """`base` with what this point says; `steps` stands in for the point's own."""
        full = learning_rates(base, self.bits, num_parameters)[0]
        return dataclasses.replace(
            base,
            steps=steps or self.steps,
            learning_rate=self.learning_rate * (adapter_rate(base, self.bits) if self.lora else full),
            gradient="lsq" if self.scales == "learned" or self.lora else "ste",
            freeze_lower=self.frozen,
        )

    def to_json(self) -> dict[str, Value]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rate = f"rate x{self.learning_rate:.3g}"
        frozen = f", {self.frozen:.0%} frozen" if self.frozen else ""
        lora = f", LoRA of rank {self.lora}" if self.lora else ""
        return f"{self.scheme}{lora}, {self.scales} scales, {rate}, {self.steps} steps{frozen}"


NAMES = tuple(field.name for field in dataclasses.fields(Point))
_TYPES: dict[str, Callable[[Any], Any]] = {name: type(getattr(Point(), name)) for name in NAMES}


@dataclass(frozen=True)
class Space:
    """For each name of a `Point` what may stand there: a tuple of values, or for the learning rate a `Range`."""

    bits: tuple[int, ...] = (8, 4, 3, 2)
    group: tuple[int, ...] = (32, 64, 128)
    inputs: tuple[int, ...] = (16,)
    scales: tuple[str, ...] = ("learned", "fixed")
    learning_rate: tuple[float, ...] | Range = Range(0.3, 3.0)
    steps: tuple[int, ...] = (50, 100, 200)
    frozen: tuple[float, ...] = (0.0, 0.25, 0.5)
    lora: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for name, values in self.items():
            if isinstance(values, Range):
                continue
            if not values:
                raise UsageError(f"the space has nothing for {name}; give at least one value")
            if len(set(values)) < len(values):
                raise UsageError(f"the space has a value of {name} twice: {', '.join(map(str, values))}")
        if unknown := [s for s in self.scales if s not in ("learned", "fixed")]:
            raise UsageError(f"scales={unknown[0]!r} is none of learned, fixed")
        for name, least in (("steps", 1), ("group", 0), ("frozen", 0), ("lora", 0), ("learning_rate", 1e-9)):
            values = dict(self.items())[name]
            if not isinstance(values, Range) and min(values) < least:
                raise UsageError(f"{name}={min(values)} in the space must be {least:g} or more")
        if max(self.frozen) >= 1:
            raise UsageError(f"frozen={max(self.frozen)} leaves no block to train; use less than 1")
        for bits, group, inputs in itertools.product(self.bits, self.group, self.inputs):
            scheme_of(bits, group, inputs)

    def items(self) -> list[tuple[str, tuple[Any, ...] | Range]]:
        return [(name, getattr(self, name)) for name in NAMES]

    def __contains__(self, point: object) -> bool:
        return isinstance(point, Point) and all(getattr(point, name) in values for name, values in self.items())

    @property
    def size(self) -> int | None:
        """How many points; None where a range makes them endless."""
        if any(isinstance(values, Range) for _, values in self.items()):
            return None
        return math.prod(len(values) for _, values in self.items() if not isinstance(values, Range))

    def points(self) -> list[Point]:
        """Every point, the first name slowest. Raises: UsageError for an endless space."""
        if self.size is None:
            raise UsageError("a range has no end of values; list them to try every point")
        names, choices = zip(*self.items())
        return [Point(**dict(zip(names, values))) for values in itertools.product(*choices)]

    def first_points(self) -> list[Point]:
        """Where a search starts: each scheme once with what stands first, the rate nearest to the table's."""
        rate = 1.0 if isinstance(self.learning_rate, Range) else min(self.learning_rate, key=lambda r: abs(math.log(r)))
        if isinstance(self.learning_rate, Range) and rate not in self.learning_rate:
            rate = math.sqrt(self.learning_rate.low * self.learning_rate.high)
        rest = {name: getattr(self, name)[0] for name in ("scales", "steps", "frozen", "lora")}
        rest["learning_rate"] = rate
        schemes = itertools.product(self.bits, self.group, self.inputs)
        return [Point(bits=b, group=g, inputs=i, **rest) for b, g, i in schemes]

    def with_texts(self, texts: Iterable[str]) -> Space:
        """The space with `NAME=VALUE,VALUE` or `NAME=LOW..HIGH` in place of its own.

        >>> Space().with_texts(["bits=4,3", "learning_rate=0.5..2"]).bits
        (4, 3)
        """
        changes: dict[str, Any] = {}
        for text in texts:
            name, equals, values = text.partition("=")
            if not equals or name not in NAMES:
                raise UsageError(f"--space {text!r} is not NAME=VALUES; the names are {', '.join(NAMES)}")
            if name in changes:
                raise UsageError(f"--space names {name} twice; put all its values after one name")
            changes[name] = _values(name, values)
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        found = self.items()
        return {n: [v.low, v.high, "range"] if isinstance(v, Range) else list(v) for n, v in found}


def scheme_of(bits: int, group: int, inputs: int) -> Scheme:
    """Raises: UsageError where the parts contradict."""
    return Scheme.parse(f"w{bits}a{inputs}" + (f"-g{group}" if group else ""))


def point_of(values: Mapping[str, Any]) -> Point:
    """The point of stored values."""
    return Point(**{name: _TYPES[name](values[name]) for name in NAMES})


def _values(name: str, text: str) -> tuple[Value, ...] | Range:
    kind = _TYPES[name]
    try:
        if ".." in text:
            if name != "learning_rate":
                raise UsageError(f"--space {name}={text}: only learning_rate takes a range; list the values")
            low, _, high = text.partition("..")
            return Range(float(low), float(high))
        return tuple(kind(part.strip()) for part in text.split(","))
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(
            f"--space {name}={text}: these are no values of {name} ({getattr(kind, '__name__', '')})"
        ) from error
