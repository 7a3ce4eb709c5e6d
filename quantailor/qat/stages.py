"""The stages of a progressive schedule: fewer bits each, every one with its own steps and learning rate.

    8,4,2                        w8a16-g32, w4a16-g32, w2a16-g32
    w8a8,w4a8-g32,w2a8-g32       schemes by their names
    8,4,1.58:bitnet              a gradient of its own for a stage

Why stages at all: weights trained for 4 bits are a better start for 2 than float ones (UPQ and Bit-by-Bit halve the
error of INT2 so; BinaryBERT, arXiv:2012.15701, splits a trained ternary model into a binary one).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from quantailor.errors import UsageError
from quantailor.qat.settings import Settings
from quantailor.spec import Scheme

_BITS = re.compile(r"[1-8]|1\.58")


@dataclass(frozen=True)
class Stage:
    """One stage. `scheme`: a `Scheme`, its name, or a number of weight bits b for w<b>a16-g32; `:GRADIENT` may follow.
    `steps` and `learning_rate` None: those of the run's settings, else of the table for the scheme."""

    scheme: Scheme | str | float
    steps: int | None = None
    learning_rate: float | None = None

    @property
    def parsed(self) -> Scheme:
        """Raises: UsageError for an unknown scheme, and for float, which is no stage of quantization."""
        if isinstance(self.scheme, Scheme):
            scheme = self.scheme
        else:
            text = str(self.scheme).partition(":")[0].strip()
            scheme = Scheme.parse(f"w{text}a16-g32" if _BITS.fullmatch(text) else text)
        if scheme.weight is None:
            raise UsageError(f"a stage of {scheme} quantizes no weight; name one such as w4a16-g32, or its bits")
        return scheme

    def settings(self, common: Settings) -> Settings:
        """What this stage trains by: its own steps, rate and gradient, all else of the run."""
        return dataclasses.replace(
            common,
            steps=common.steps if self.steps is None else self.steps,
            learning_rate=common.learning_rate if self.learning_rate is None else self.learning_rate,
            gradient=self.gradient or common.gradient,
        )

    @property
    def gradient(self) -> str | None:
        """The one named behind the scheme; None: the run's."""
        return None if isinstance(self.scheme, Scheme) else str(self.scheme).partition(":")[2].strip() or None


def parse_stages(stages: str, steps: str | None = None, rates: str | None = None) -> list[Stage]:
    """Stages from what the command line takes: comma-separated lists; an empty place is the default.

    Raises: UsageError for a list of another length, or a value that is no number.

    >>> [str(stage.parsed) for stage in parse_stages("8,4,w2a16-g64")]
    ['w8a16-g32', 'w4a16-g32', 'w2a16-g64']
    """
    names = [name.strip() for name in stages.split(",")]
    counts = _numbers(steps, len(names), "--stage-steps", int)
    found_rates = _numbers(rates, len(names), "--stage-rates", float)
    made = [Stage(name, None if n is None else int(n), rate) for name, n, rate in zip(names, counts, found_rates)]
    for stage in made:
        if not str(stage.scheme):
            raise UsageError(f"--stages {stages} has an empty place; name a scheme, or bits, for each stage")
        _ = stage.parsed
    return made


def _numbers(text: str | None, count: int, option: str, kind: type[int] | type[float]) -> Sequence[float | None]:
    if text is None:
        return [None] * count
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != count:
        raise UsageError(
            f"{option} {text} has {len(parts)} places for {count} stages; leave a place empty for defaults"
        )
    try:
        return [kind(part) if part else None for part in parts]
    except ValueError:
        raise UsageError(f"{option} {text} is no list of numbers; write for example 100,,200") from None
