"""Where a number stands on a chart: linear and logarithmic axes, their round ticks and labels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

_TINY = 1e-300


@dataclass(frozen=True)
class Axis:
    """Numbers `low` .. `high` drawn from `start` to `end` (pixels; `start` > `end` for an axis that points up)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of `value`. On a logarithmic axis, what is not positive stands at its start."""
        if self.log:
            value = max(value, _TINY)
            share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[tuple[float, str]]:
        """(pixel, label) of some `about` round numbers within the axis."""
        values = log_ticks(self.low, self.high, about) if self.log else linear_ticks(self.low, self.high, about)
        return list(zip([self.at(v) for v in values], labels(values, self.log), strict=True))


def axis(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    log: bool = False,
    zero: bool = False,
    margin: float = 0.06,
) -> Axis:
    """An axis that all `values` fit on, with some room at both ends; `zero`: it begins at 0.

    Logarithmic only where all values are positive. Values that are all the same stand in the middle.
    """
    found = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(found), max(found)
    if log and low > 0:
        factor = (high / low) ** margin if high > low else 2.0
        return Axis(max(low / factor, _TINY), high * factor, start, end, True)
    room = margin * (high - low) or abs(high) * 0.5 or 1.0
    if zero and low >= 0:
        return Axis(0.0, high + room, start, end)
    return Axis(low - room, high + room, start, end)


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten.

    >>> linear_ticks(0, 10), linear_ticks(8.05, 8.32, 3)
    ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [8.1, 8.2, 8.3])
    """
    rough = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(n * step, digits) + 0.0 for n in range(first, last + 1)]


def log_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Powers of ten, with 2 and 5 between them where there is room; round numbers where not even two fit.

    >>> log_ticks(0.5, 2000), log_ticks(3, 60)
    ([1.0, 10.0, 100.0, 1000.0], [5.0, 10.0, 20.0, 50.0])
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1,), (1, 2, 5)):
        found = [s * 10.0**p for p in range(first, last + 1) for s in steps]
        found = [v for v in found if low * 0.999 <= v <= high * 1.001]
        if len(found) >= 3:
            every = -(-len(found) // (about + 2))
            return found[::every]
    return linear_ticks(low, high, about - 1)


def labels(values: list[float], log: bool = False) -> list[str]:
    """What stands at the ticks: as many digits as tell them apart, `k` and `M` for large ones.

    >>> labels([0.0, 0.5, 1.0]), labels([0.0, 20000.0]), labels([0.001, 0.1, 10.0], log=True)
    (['0', '0.5', '1.0'], ['0', '20k'], ['0.001', '0.1', '10'])
    """
    largest = max((abs(v) for v in values), default=0.0)
    if log:
        return [_short(v) for v in values]
    if largest and (largest < 1e-4 or largest >= 1e10):
        return [f"{v:.3g}".replace("e-0", "e-").replace("-", "−") for v in values]
    unit, letter = next(((u, s) for u, s in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if largest >= 10 * u), (1.0, ""))
    scaled = [v / unit for v in values]
    step = min((abs(b - a) for a, b in pairwise(scaled)), default=abs(scaled[0]) if scaled else 1.0)
    digits = 0
    while digits < 8 and abs(round(step, digits) - step) > 1e-6 * step:
        digits += 1
    texts = [f"{v:.{digits}f}" for v in scaled]
    return ["0" if float(t) == 0 else t.replace("-", "−") + letter for t in texts]


def _short(value: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if 1e12 > value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}" if value >= 1e-4 else f"{value:.0e}".replace("e-0", "e-").replace("-", "−")
