"""Which colour a number gets in a heat map."""

from __future__ import annotations

from collections.abc import Sequence

from quantailor.pages.axes import Axis


def heat_scale(values: Sequence[Sequence[float | None]]) -> Axis | None:
    """0 .. 1 over the values; None without values or with only zeros.

    Logarithmic where all are positive and spread over more than a factor of 20, else linear over at least a factor of
    2, so that values which hardly differ look alike.
    """
    found = [v for row in values for v in row if v is not None]
    if not found or (low := min(found)) == (high := max(found)) == 0:
        return None
    log = low > 0 and high / low > 20
    return Axis(low if log or low <= 0 else min(low, high / 2), high if high > low or high > 0 else 0.0, 0, 1, log)


def heat_levels(values: Sequence[Sequence[float | None]], steps: int = 9) -> list[list[int | None]]:
    """0 (least) to steps - 1 for each value, on `heat_scale`.

    >>> heat_levels([[0.0, 5.0], [None, 10.0]], steps=3), heat_levels([[1.0, 10.0, 1000.0]], steps=4)
    ([[0, 1], [None, 2]], [[0, 1, 3]])
    >>> heat_levels([[9.0, 10.0]], steps=10)
    [[8, 9]]
    """
    scale = heat_scale(values)

    def level(value: float) -> int:
        return 0 if scale is None else min(steps - 1, int(scale.at(value) * steps + 1e-9))

    return [[None if v is None else level(v) for v in row] for row in values]
