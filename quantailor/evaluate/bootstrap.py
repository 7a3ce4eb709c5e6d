"""How far a measured figure would move on other text: percentile bootstrap over documents or rows.

A figure is a `statistic` of sums and counts, such as exp(sum of NLL / number of tokens). Units (documents, rows) are
drawn with replacement and the statistic is taken again; tokens are never drawn one by one, since those of one
document resemble each other and the interval would come out far too narrow.
Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantailor.errors import UsageError

Floats = NDArray[np.float64]
Statistic = Callable[[Floats, Floats], Floats]  # (sums [*], counts [*]) -> values [*]
DRAWS_AT_ONCE = 4_000_000  # indices held at a time: 32 MB


def mean(sums: Floats, counts: Floats) -> Floats:
    """sum / count."""
    return sums / counts


def perplexity(sums: Floats, counts: Floats) -> Floats:
    """exp(sum of NLL in nats / tokens); infinite where it overflows."""
    with np.errstate(over="ignore"):
        return np.exp(sums / counts)


def interval(
    per_unit_sums: ArrayLike,
    per_unit_counts: ArrayLike,
    statistic: Statistic,
    *,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """(low, high) that holds `statistic` in a share `level` of the resamples.

    Shapes: sums, counts [num_units]; a unit with count 0 was not measured and is left out. (nan, nan) for fewer than
    two units: one says nothing about the next. Raises: UsageError for shapes that differ or a bad setting.
    """
    (sums, counts), *_ = _checked((per_unit_sums, per_unit_counts), repeats=repeats, level=level)
    if len(sums) < 2:
        return float("nan"), float("nan")
    return _percentiles(
        np.concatenate([statistic(sums[i].sum(1), counts[i].sum(1)) for i in _draws(len(sums), repeats, seed)]), level
    )


def paired_difference(
    before: tuple[ArrayLike, ArrayLike],
    after: tuple[ArrayLike, ArrayLike],
    statistic: Statistic,
    *,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, tuple[float, float]]:
    """(statistic(after) - statistic(before), its interval), both measured on the same units.

    `before` and `after` are (sums, counts), [num_units] each. Every resample draws the same units for both, so what
    is hard about a document cancels and far smaller changes show. Raises as `interval`.
    """
    (sums_a, counts_a), (sums_b, counts_b) = _checked(before, after, repeats=repeats, level=level)
    if not len(sums_a):
        return float("nan"), (float("nan"), float("nan"))

    def change(units: NDArray[np.int64] | slice) -> Floats:
        with np.errstate(invalid="ignore"):  # infinite on both sides: no difference can be told, and nan says so
            after_values = statistic(sums_b[units].sum(-1), counts_b[units].sum(-1))
            return after_values - statistic(sums_a[units].sum(-1), counts_a[units].sum(-1))

    value = float(change(slice(None)))
    if len(sums_a) < 2:
        return value, (float("nan"), float("nan"))
    return value, _percentiles(np.concatenate([change(i) for i in _draws(len(sums_a), repeats, seed)]), level)


def _checked(*pairs: tuple[ArrayLike, ArrayLike], repeats: int, level: float) -> list[tuple[Floats, Floats]]:
    """(sums, counts) of each pair as float64, without the units that any pair has not measured."""
    if repeats < 1 or not 0 < level < 1:
        raise UsageError(f"repeats={repeats}, level={level}: use at least 1 repeat and a level between 0 and 1")
    arrays = [(np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)) for sums, counts in pairs]
    shapes = [array.shape for pair in arrays for array in pair]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise UsageError(f"shapes {shapes}: one sum and one count for each unit are needed, for both of a pair")
    measured = np.logical_and.reduce([counts > 0 for _, counts in arrays])
    return [(sums[measured], counts[measured]) for sums, counts in arrays]


def _draws(num_units: int, repeats: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Units drawn with replacement, int [some, num_units]: `repeats` rows in all, in pieces that bound the memory."""
    rng = np.random.default_rng(seed)
    rows = max(1, DRAWS_AT_ONCE // num_units)
    for start in range(0, repeats, rows):
        yield rng.integers(num_units, size=(min(rows, repeats - start), num_units))


def _percentiles(values: Floats, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    if not np.isfinite(values).all():  # interpolating between infinities gives nan; the nearest value does not
        low, high = np.quantile(values, [tail, 1 - tail], method="nearest")
    else:
        low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
