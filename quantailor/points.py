"""What is quantized inside a block besides weights and inputs: named points, each with how its tensor is quantized.

    scores      attention scores before softmax (which stays float): a row's range is of the keys that it may see
    kv          keys, after rotation, and values, as a quantized cache holds them: a scale a token and head
    norm        outputs of LayerNorm, RMSNorm
    gelu        outputs of the nonlinearity between the feed-forward layers: GELU, SiLU, another (`silu` is the same)
    residual    sums of the residual stream
    embedding   what the embedding stage hands to the first block
    output      outputs of the quantized Linear layers (their scheme's `output`)

    a<2-8>[-ag<size>]                    a scale a token at each call; with groups, one for `size` elements
    a<2-8>-static[-<range>]              a scale for all, calibrated, and left there by training
    a<2-8>-learned[-<range>]             the same, learned by training (LSQ)

Grids are symmetric, as those of schemes' activations are. `range` is one of spec.RangeMethod, by default mse.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantailor.errors import UsageError
from quantailor.spec import Int, PerGroup, QuantSpec, Scheme, from_json, to_json

FORM = "a<2-8>[-ag<size>][-static[-<range>]|-learned[-<range>]]"
_TEXT = re.compile(r"a[2-8](?:-ag\d+)?(?:-(?P<kind>static|learned)(?:-[a-z]+[0-9.]*)?)?")
_ALIASES = {"silu": "gelu"}


@dataclass(frozen=True)
class PointSpec:
    """How one point is quantized. `learned`: training moves its static scale."""

    quant: QuantSpec
    learned: bool = False

    def __post_init__(self) -> None:
        if self.learned and self.quant.dynamic:
            raise UsageError("learned=True is about a static scale, and a dynamic one is found at each call")
        if not isinstance(self.quant.grid, Int) or not self.quant.grid.symmetric:
            raise UsageError(f"a point cannot be {self.quant.grid}; use a symmetric integer grid of 2 to 8 bits")
        if self.quant.outliers is not None:
            raise UsageError("outliers are columns of a matrix product's input; a point has none: leave them out")

    @staticmethod
    def parse(text: str) -> PointSpec:
        """The spec that `text` names. Raises: UsageError.

        >>> str(PointSpec.parse("a8-learned-minmax"))
        'a8-learned-minmax'
        """
        plain = text.strip().lower()
        match = _TEXT.fullmatch(plain)
        if match is None:
            raise UsageError(f"{text!r} is no way to quantize a point; the form is {FORM}, such as a8 or a8-static")
        learned = match["kind"] == "learned"
        try:
            quant = Scheme.parse(f"w8{plain.replace('-learned', '-static')}").input
        except UsageError as error:
            raise UsageError(f"point {text!r}: {error}") from error
        assert quant is not None
        return PointSpec(quant, learned)

    def __str__(self) -> str:
        text = str(Scheme(weight=Scheme.parse("w8a16").weight, input=self.quant)).removeprefix("w8")
        return text.replace("-static", "-learned") if self.learned else text


@dataclass(frozen=True)
class Points:
    """Which points are quantized and how; None: left in float."""

    scores: PointSpec | None = None
    kv: PointSpec | None = None
    norm: PointSpec | None = None
    gelu: PointSpec | None = None
    residual: PointSpec | None = None
    embedding: PointSpec | None = None
    output: PointSpec | None = None

    def __post_init__(self) -> None:
        if self.scores is not None and isinstance(self.scores.quant.granularity, PerGroup):
            raise UsageError("scores have a row of keys, whose number changes; groups say nothing there: use a8")

    @staticmethod
    def of(points: Mapping[str, str | PointSpec] | Points | None) -> Points:
        """From names to texts or specs, as the verbs take them. Raises: UsageError on an unknown name or text."""
        if points is None or isinstance(points, Points):
            return points or Points()
        found: dict[str, PointSpec] = {}
        for given, spec in points.items():
            name = _ALIASES.get(given, given)
            if name not in NAMES:
                near = difflib.get_close_matches(given, [*NAMES, *_ALIASES], n=1)
                raise UsageError(
                    f"unknown point {given!r}{f'; did you mean {near[0]}?' if near else ''} The points are "
                    f"{', '.join(NAMES)}"
                )
            if name in found:
                raise UsageError(f"point {name!r} is named twice; give it once")
            found[name] = spec if isinstance(spec, PointSpec) else PointSpec.parse(spec)
        return Points(**found)

    @property
    def asked(self) -> dict[str, PointSpec]:
        """Name -> spec of what is quantized."""
        return {name: spec for name in NAMES if (spec := getattr(self, name)) is not None}

    def __bool__(self) -> bool:
        return bool(self.asked)

    def __str__(self) -> str:
        return " ".join(f"{name}={spec}" for name, spec in self.asked.items())

    def to_json(self) -> dict[str, Any]:
        """Name -> {"quant", "learned"} of what is quantized."""
        return {name: spec_to_json(spec) for name, spec in self.asked.items()}

    @staticmethod
    def from_json(data: Any) -> Points:
        """What `to_json` wrote. Raises: UsageError on an unknown or missing key, or a value of the wrong type."""
        if not isinstance(data, dict):
            raise UsageError(f"{data!r} is no set of points; it is an object of {', '.join(NAMES)}")
        if unknown := sorted(map(str, set(data) - set(NAMES))):
            raise UsageError(f"unknown point {unknown[0]!r}; the points are {', '.join(NAMES)}")
        return Points(**{name: spec_from_json(spec) for name, spec in data.items()})


NAMES = tuple(field.name for field in dataclasses.fields(Points))


def spec_to_json(spec: PointSpec) -> dict[str, Any]:
    return {"quant": to_json(spec.quant), "learned": spec.learned}


def spec_from_json(data: Any) -> PointSpec:
    """Raises: UsageError."""
    if not isinstance(data, dict) or set(data) != {"quant", "learned"} or not isinstance(data["learned"], bool):
        raise UsageError(f"{data!r} is no point's spec; it has 'quant' and 'learned' (true or false), nothing else")
    quant = from_json(data["quant"])
    if not isinstance(quant, QuantSpec):
        raise UsageError(f"a point's 'quant' is a QuantSpec, not {data['quant']!r}")
    return PointSpec(quant, data["learned"])


@dataclass(frozen=True)
class PointEntry:
    """One point of a model: quantized where it has a `spec`; `reason` says why either way.

    `name`: of the quantizer that is there, or would be; `kind`: what computes the tensor, such as `LayerNorm`;
    `block`: the number of the repeated block that it is in.
    """

    name: str
    point: str
    kind: str
    block: int | None
    spec: PointSpec | None
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "point": self.point,
            "kind": self.kind,
            "block": self.block,
            "spec": None if self.spec is None else spec_to_json(self.spec),
            "reason": self.reason,
        }

    @staticmethod
    def from_json(data: Any) -> PointEntry:
        """What `to_json` wrote. Raises: UsageError where it has another form."""
        fields = {field.name for field in dataclasses.fields(PointEntry)}
        if not isinstance(data, dict) or set(data) != fields:
            raise UsageError(f"a point's line has {', '.join(sorted(fields))}, and nothing else")
        texts = all(isinstance(data[key], str) for key in ("name", "point", "kind", "reason"))
        if not texts or not (data["block"] is None or type(data["block"]) is int):
            raise UsageError(f"the line of point {data['name']!r} has a value of the wrong type")
        spec = None if data["spec"] is None else spec_from_json(data["spec"])
        if spec is not None and data["point"] not in NAMES:
            raise UsageError(f"unknown point {data['point']!r}; the points are {', '.join(NAMES)}")
        return PointEntry(data["name"], data["point"], data["kind"], data["block"], spec, data["reason"])
