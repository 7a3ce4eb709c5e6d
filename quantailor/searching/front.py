"""Which of several candidates are worth having, which is to be stopped, which is the one to take: pure rules.

Losses and costs are both better when lower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """A candidate `share` of the way through its run: the loss of its best iterate so far."""

    share: float
    loss: float
    cost: float
    steps: int


@dataclass(frozen=True)
class Limits:
    """`loss`: relative to the float model, 0.02 = 2 % worse. `cost`: in the unit of the candidates'; None: any."""

    loss: float
    cost: float | None = None

    def excess(self, loss: float, cost: float) -> float:
        """By what share the worse of the two lies over its limit; 0 or less: both are met."""
        if not math.isfinite(loss):
            return math.inf
        over = (1 + loss) / (1 + self.loss) - 1
        return over if self.cost is None else max(over, cost / self.cost - 1)


def pareto(candidates: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of those that no other one is at least as good as in both and better in one; of equals the first.

    >>> pareto([(1, 3), (2, 2), (2, 3), (3, 1), (2, 2)])
    [0, 1, 3]
    """
    order = sorted(range(len(candidates)), key=lambda i: (*candidates[i], i))
    kept, best = [], math.inf
    for index in order:
        if candidates[index][1] < best:
            kept.append(index)
            best = candidates[index][1]
    return sorted(kept)


def best(candidates: Sequence[tuple[float, float]], limits: Limits) -> int:
    """The one of least loss within the limits, cheaper ones first where losses are equal; where none is, the one that
    lies least over them. Raises: ValueError without candidates."""
    if not candidates:
        raise ValueError("no candidates to choose from")

    def key(index: int) -> tuple[float, ...]:
        loss, cost = candidates[index]
        excess = limits.excess(loss, cost)
        return (0.0, loss, cost) if excess <= 0 else (1.0, excess, loss)

    return min(range(len(candidates)), key=key)


def stops(look: Look, others: Sequence[Look], reduction: int = 3) -> bool:
    """Whether a candidate is to be stopped at this look: asynchronous successive halving, among its equals.

    Compared with others at the same share of their run that cost no more and run no longer: it goes on only among the
    best 1/`reduction` of them and itself, and always while there are fewer than `reduction`. So a cheap candidate is
    never stopped for being worse than a dear one. Source: Li et al. 2018, arXiv:1810.05934, algorithm 2.
    """
    rivals = [o.loss for o in others if o.share == look.share and o.cost <= look.cost and o.steps <= look.steps]
    if len(rivals) + 1 < reduction:
        return False
    places = max(1, (len(rivals) + 1) // reduction)
    return sum(loss < look.loss for loss in rivals) >= places
