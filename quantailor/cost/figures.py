"""A planned number never stands alone: its interval, and what it rests on.

    counted    arithmetic on shapes and bytes: exact
    measured   from a measurement that is named: this machine's probe, or a result file of bench/
    table      from a published table or data sheet, named
    assumed    somebody's guess, said so

A figure made of several rests on the weakest of them: a price from a data sheet times an assumed utilization is
assumed. Intervals are not of a stated probability unless `source` says so; ends multiply as if they moved together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

Basis = Literal["counted", "measured", "table", "assumed"]
WEAKEST_LAST: tuple[Basis, ...] = ("counted", "measured", "table", "assumed")


@dataclass(frozen=True)
class Figure:
    """`value` in [`low`, `high`], all of one unit; `source` names where it is from."""

    value: float
    low: float
    high: float
    basis: Basis
    source: str = ""

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"{self.value} does not lie in its interval {self.low} to {self.high}")

    def __mul__(self, other: Figure | float) -> Figure:
        """Both not negative. A plain number is exact."""
        if isinstance(other, int | float):
            return replace(self, value=self.value * other, low=self.low * other, high=self.high * other)
        return Figure(
            self.value * other.value,
            self.low * other.low,
            self.high * other.high,
            weakest((self.basis, other.basis)),
            _joined(self.source, other.source),
        )

    def __truediv__(self, other: Figure) -> Figure:
        """Both positive."""
        return Figure(
            self.value / other.value,
            self.low / other.high,
            self.high / other.low,
            weakest((self.basis, other.basis)),
            _joined(self.source, other.source),
        )

    def __add__(self, other: Figure) -> Figure:
        return Figure(
            self.value + other.value,
            self.low + other.low,
            self.high + other.high,
            weakest((self.basis, other.basis)),
            _joined(self.source, other.source),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "basis": self.basis,
            "source": self.source,
        }


def weakest(bases: Iterable[Basis]) -> Basis:
    """What a figure made of figures with these bases rests on."""
    return max(bases, key=WEAKEST_LAST.index, default="counted")


def _joined(*sources: str) -> str:
    return "; ".join(dict.fromkeys(part for source in sources for part in source.split("; ") if part))


def counted(value: float, source: str = "") -> Figure:
    """Exact."""
    return Figure(value, value, value, "counted", source)


def around(value: float, share: float, basis: Basis, source: str) -> Figure:
    """`value` give or take `share` of it: from value / (1 + share) to value * (1 + share)."""
    return Figure(value, value / (1 + share), value * (1 + share), basis, source)


def total(figures: Iterable[Figure]) -> Figure:
    """Their sum."""
    result = counted(0.0)
    for figure in figures:
        result = result + figure
    return result
