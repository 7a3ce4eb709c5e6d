"""Which scheme each unit gets: the exact knapsack with a choice a unit.

    minimize   sum_u score[u, c_u]      subject to   sum_u cost[u, c_u] <= budget,   one choice c_u a unit

Solved by HiGHS' branch and bound (scipy.optimize.milp) with no gap allowed. A solver of reals works with tolerances:
costs are whole numbers divided by their common divisor, scores are brought to a fixed range, and what it returns is
added up again in integers. Should that exceed the budget by the solver's tolerance, the assignment is cut off and the
rest searched again, so that what comes back keeps the budget exactly. Choices that another one beats in both ways are
left out beforehand: they can be in no better solution.
Ties (q/k/v, gate/up) are units of several layers; they never reach this file as more than one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from quantailor.errors import UsageError

_RANGE = 1e6  # what the scores are scaled to: HiGHS stops at a gap of 1e-6
_TRIES = 200  # assignments that only the tolerance lets through


@dataclass(frozen=True)
class Option:
    """One choice of a unit: `cost` in whole units (bytes, nanoseconds), `score` to be made small, such as a KL."""

    name: str
    cost: int
    score: float


@dataclass(frozen=True)
class Allocation:
    """`chosen[u]` is the index of unit u's option."""

    chosen: tuple[int, ...]
    cost: int
    score: float


def allocate(units: Sequence[Sequence[Option]], budget: int) -> Allocation:
    """The options of least summed score whose summed cost is at most `budget`.

    Options with a score that is not finite are never taken.
    Raises: UsageError if a unit has none left, a cost is negative or no whole number, or the least possible cost
    exceeds the budget: it names that.
    """
    kept = [_kept(options, number) for number, options in enumerate(units)]
    if not kept:
        return Allocation((), 0, 0.0)
    least = sum(min(o.cost for _, o in options) for options in kept)
    if least > budget:
        raise UsageError(
            f"a budget of {budget:,} is below the least that these choices can cost, {least:,}; "
            f"raise it to {least:,} or more, or add cheaper choices"
        )
    flat = [(u, i, o) for u, options in enumerate(kept) for i, o in options]
    picked = _solve(flat, len(kept), budget)
    chosen = [0] * len(kept)
    for u, i, _ in picked:
        chosen[u] = i
    return Allocation(tuple(chosen), sum(o.cost for *_, o in picked), math.fsum(o.score for *_, o in picked))


def _kept(options: Sequence[Option], number: int) -> list[tuple[int, Option]]:
    """The options worth a look, with their indexes: each costs more and scores lower than the one before."""
    for option in options:
        if not isinstance(option.cost, int) or option.cost < 0:
            raise UsageError(f"option {option.name!r} costs {option.cost!r}; costs are whole numbers of 0 or more")
    sound = [(i, o) for i, o in enumerate(options) if math.isfinite(o.score)]
    if not sound:
        names = ", ".join(o.name for o in options) or "none"
        raise UsageError(f"unit {number} has no usable choice ({names}): every score is infinite; add one of more bits")
    kept: list[tuple[int, Option]] = []
    for i, option in sorted(sound, key=lambda pair: (pair[1].cost, pair[1].score)):
        if not kept or option.score < kept[-1][1].score:
            kept.append((i, option))
    return kept


def _solve(flat: list[tuple[int, int, Option]], num_units: int, budget: int) -> list[tuple[int, int, Option]]:
    divisor = math.gcd(*(o.cost for *_, o in flat)) or 1
    cost = np.array([o.cost // divisor for *_, o in flat], dtype=np.float64)
    limit = budget // divisor
    unit = np.array([u for u, *_ in flat])
    score = _scaled(np.array([o.score for *_, o in flat]), unit)
    one = LinearConstraint(csr_array((np.ones(len(flat)), (unit, np.arange(len(flat)))), (num_units, len(flat))), 1, 1)
    constraints = [one, LinearConstraint(cost[None, :], -np.inf, limit)]
    for _ in range(_TRIES):
        found = milp(
            score,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            break
        taken = np.flatnonzero(found.x > 0.5)
        picked = [flat[j] for j in taken]
        if len(picked) == num_units and sum(o.cost for *_, o in picked) <= budget:
            return picked
        row = np.zeros((1, len(flat)))
        row[0, taken] = 1
        constraints.append(LinearConstraint(row, -np.inf, num_units - 1))
    raise UsageError(f"no assignment within {budget:,} was found; raise the budget or offer fewer choices")


def _scaled(score: NDArray[np.float64], unit: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each unit's scores from 0, all in a range that the solver's absolute gap is nothing against."""
    lowest = np.full(unit.max() + 1, np.inf)
    np.minimum.at(lowest, unit, score)
    score = score - lowest[unit]
    largest = float(score.max())
    return score / largest * _RANGE if largest > 0 else score  # in this order: _RANGE / largest may overflow
