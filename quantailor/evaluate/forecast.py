"""Where a training curve is going: two families of saturating curves, and how far they and chance disagree.

    power          s(t) = a + b (1 + t)^-p      goes on gaining, ever more slowly
    exponential    s(t) = a + b e^(-t / tau)    is soon done

Shapes p and tau are searched on a grid, a and b >= 0 are least squares given them. A short curve cannot tell the two
apart, and they promise different things; so the interval reaches from the lower end of one family's interval to the
upper end of the other's, each refitted to curves made of its own fit and residuals drawn with replacement.
Source of the resampling: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 9.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantailor.errors import UsageError

Floats = NDArray[np.float64]
MIN_POINTS = 4
_SHAPES = 120


@dataclass(frozen=True)
class Forecast:
    """A lower-is-better score at step `at`: the median of all refitted curves, and the interval that holds a share
    `level` of either family's. `fits`: the value that each family's own fit gives."""

    at: int
    value: float
    interval: tuple[float, float]
    level: float
    fits: dict[str, float]


def forecast(
    curve: Sequence[tuple[int, float]], at: int, *, repeats: int = 200, level: float = 0.9, seed: int = 0
) -> Forecast:
    """The score at step `at` of a run whose looks so far are `curve`, (step, score) each, the start included.

    Raises: UsageError for fewer than 4 looks, a look that is not finite, or a step that the curve has passed.
    """
    steps, scores = (np.array(part, dtype=np.float64) for part in zip(*curve))
    if len(steps) < MIN_POINTS or not np.isfinite(scores).all():
        raise UsageError(f"{len(steps)} looks, not all finite or fewer than {MIN_POINTS}: too few to see where they go")
    if at < steps.max():
        raise UsageError(f"step {at} lies within the {int(steps.max())} steps that were run; ask for a later one")
    draw = np.random.default_rng(seed)
    ends: list[Floats] = []
    fits: dict[str, float] = {}
    for name, basis in _families(steps, at).items():
        fitted, end = _fit(basis, scores[None])
        fits[name] = float(end[0])
        residuals = scores - fitted[0]
        residuals = residuals * (len(scores) / max(1, len(scores) - 3)) ** 0.5  # a, b and the shape were fitted
        drawn = fitted[0] + residuals[draw.integers(len(scores), size=(repeats, len(scores)))]
        ends.append(_fit(basis, drawn)[1])
    low, high = np.quantile(np.stack(ends), [(1 - level) / 2, (1 + level) / 2], axis=1)
    value = float(np.median(np.concatenate(ends)))
    return Forecast(at, value, (float(min(low)), float(max(high))), level, fits)


def _families(steps: Floats, at: int) -> dict[str, Floats]:
    """Of each family: its curve for every shape [shapes, looks + 1], the last column at step `at`."""
    t = np.append(steps, float(at))
    longest = max(float(steps.max()), 1.0)
    powers = np.geomspace(0.1, 3.0, _SHAPES)[:, None]
    times = np.geomspace(longest / 20, longest * 5, _SHAPES)[:, None]
    return {"power": (1 + t) ** -powers, "exponential": np.exp(-t / times)}


def _fit(basis: Floats, scores: Floats) -> tuple[Floats, Floats]:
    """(fitted [n, looks], value at the end [n]) of the best shape for each of `scores` [n, looks]."""
    seen = basis[:, :-1]
    centre = seen.mean(1, keepdims=True)
    mean = scores.mean(1)
    spread = np.maximum(((seen - centre) ** 2).sum(1), 1e-300)
    b = np.maximum((scores @ (seen - centre).T) / spread, 0.0)  # [n, shapes]: a score that rises is fitted flat
    a = mean[:, None] - b * centre[:, 0]
    fitted = a[:, :, None] + b[:, :, None] * seen
    best = ((fitted - scores[:, None]) ** 2).sum(2).argmin(1)
    rows = np.arange(len(scores))
    return fitted[rows, best], a[rows, best] + b[rows, best] * basis[best, -1]
