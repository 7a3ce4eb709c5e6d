"""A scheme for every unit, the best that fits a budget: measure, solve the knapsack, measure again around the solution.

Round 0 adds up what each unit costs alone. Errors of layers interact, the more the fewer the bits, so that sum is wrong
where it matters. Rounds 1 and 2 take the best assignment so far as it is, all of it on the grid, and measure what
moving *one* unit to one of its neighbouring choices does to the KL of the whole; the knapsack over these differences
gives the next assignment. It is tried as a whole: every candidate's joint KL is measured, uniform ones included, and
the best measured one is returned, so a search never does worse than the uniform scheme on the data it looks at.
Where differences added up promised more than the whole then gave, the moves are tried one after the other, best first,
as far as the budget goes.

From gradients (`how="fisher"`) the interactions come without another pass: with a_s the change of each sequence's
log-likelihood (searching/fisher.py), the joint second-order KL of an assignment is the mean of (sum_u a_s[u, c_u])^2.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from quantailor.errors import UsageError
from quantailor.models.roles import Unit
from quantailor.searching.allocation import Option, allocate
from quantailor.searching.fisher import second_order
from quantailor.searching.sensitivity import How, Study
from quantailor.spec import Scheme

Assignment = tuple[int, ...]  # a unit's choice, by index
Costs = Mapping[tuple[Unit, Scheme], int]
ROUNDS = 2
_NEIGHBOURS = 2  # choices to either side that a round tries


@dataclass(frozen=True)
class Candidate:
    """An assignment that was tried as a whole. `kl` in nats, joint; `predicted` None for a uniform one."""

    name: str
    chosen: Assignment
    cost: int
    kl: float
    predicted: float | None = None


@dataclass(frozen=True)
class Found:
    """The best candidate, all that were tried, and what the search took."""

    best: Candidate
    candidates: tuple[Candidate, ...]
    passes: int
    seconds: float


class Search:
    """`costs[unit, scheme]` and `budget` are in one unit: bytes, or nanoseconds."""

    def __init__(self, study: Study, costs: Costs, budget: int, *, how: How = "measured", seed: int = 0) -> None:
        self.study, self.budget, self.how, self.seed = study, budget, how, seed
        self.units, self.schemes = list(study.units), list(study.schemes)
        self.cost = [[costs[u, s] for s in self.schemes] for u in self.units]
        self.candidates: list[Candidate] = []
        self.known: dict[Assignment, float] = {}

    def run(self, rounds: int = ROUNDS) -> Found:
        """Raises: UsageError if no assignment fits the budget: it names the least one that would."""
        began = time.monotonic()
        if not self.units:
            raise UsageError("there is no layer to choose a scheme for; every one is kept by a rule")
        least = sum(map(min, self.cost))
        if least > self.budget:  # before anything is measured
            allocate([[Option(str(s), c, 0.0) for s, c in zip(self.schemes, row)] for row in self.cost], self.budget)
        if self.how == "fisher":
            self._by_gradients(rounds)
        else:
            self._by_measuring(rounds)
        best = min(self.candidates, key=lambda c: (c.kl, c.cost))
        return Found(best, tuple(self.candidates), self.study.divergence.passes, time.monotonic() - began)

    def _by_measuring(self, rounds: int) -> None:
        study = self.study
        study.solve()
        alone = study.measure()
        self._try_uniform()
        self._solve("sum of single layers", [[alone[u, s] for s in self.schemes] for u in self.units])
        around: Assignment | None = None
        for number in range(1, rounds + 1):
            start = min(self.candidates, key=lambda c: c.kl)
            if start.chosen == around:
                break  # no candidate beat it: measuring around it again would give the same figures
            around, scores = start.chosen, self._around(start)
            before = self.known.copy()
            self._solve(f"around the solution, {number}", scores)
            if min(self.known.values()) >= min(before.values()):
                self._moves(f"move by move, {number}", start, scores)

    def _by_gradients(self, rounds: int) -> None:
        a, positions, units = self.study.estimate(seed=self.seed)
        assert units == self.units
        self.study.solve()  # joint KLs are measured on the solved layers
        self._try_uniform()
        self._solve("sum of single layers", second_order(a, positions).tolist())
        for number in range(1, rounds + 1):
            start = min(self.candidates, key=lambda c: c.kl)
            self._solve(f"around the solution, {number}", _joint(a, positions, start.chosen).tolist())

    def _try_uniform(self) -> None:
        for index, scheme in enumerate(self.schemes):
            chosen = (index,) * len(self.units)
            if self._cost_of(chosen) <= self.budget:
                self._try(f"uniform {scheme}", chosen)

    def _solve(self, name: str, scores: Sequence[Sequence[float]]) -> None:
        """The knapsack over these scores, tried as a whole."""
        options = [
            [Option(str(s), c, value) for s, c, value in zip(self.schemes, costs, row)]
            for costs, row in zip(self.cost, scores)
        ]
        found = allocate(options, self.budget)
        self._try(name, found.chosen, found.score)

    def _around(self, start: Candidate) -> list[list[float]]:
        """KL with one unit moved to a neighbouring choice, all others as in `start`; infinite for what is not near."""
        scores = [[float("inf")] * len(self.schemes) for _ in self.units]
        divergence = self.study.divergence
        by_block = sorted(range(len(self.units)), key=lambda u: divergence.start([self.units[u]]))
        with self.study.progress.task("around the solution", len(self.units)) as advance, self._standing(start):
            divergence.suffix.refresh()
            for u in by_block:
                for index in self._near(u, start.chosen[u]):
                    moved = {self.units[u]: self.schemes[index]}
                    scores[u][index] = self.study.measured(moved) if index != start.chosen[u] else start.kl
                advance(1)
        divergence.suffix.refresh()
        # Differences: the sum over units is then what the whole changes by.
        return [[value - start.kl for value in row] for row in scores]

    def _standing(self, candidate: Candidate) -> AbstractContextManager[None]:
        return self.study.variants.applied(self._choices(candidate.chosen))

    def _near(self, unit: int, index: int) -> list[int]:
        order = sorted(range(len(self.schemes)), key=lambda i: self.cost[unit][i])
        at = order.index(index)
        return order[max(0, at - _NEIGHBOURS) : at + _NEIGHBOURS + 1]

    def _moves(self, name: str, start: Candidate, scores: Sequence[Sequence[float]]) -> None:
        """Pairs of one unit down and another up, by what they promise; each tried as a whole, the good ones kept."""
        current, kl = list(start.chosen), start.kl
        for _, changes in sorted(self._pairs(start, scores))[: 2 * len(self.units)]:
            if any(current[u] != start.chosen[u] for u, _ in changes):
                continue
            trial = current.copy()
            for u, index in changes:
                trial[u] = index
            if self._cost_of(trial) <= self.budget and (found := self._kl(tuple(trial))) < kl:
                current, kl = trial, found
        if tuple(current) != start.chosen:
            self._try(name, tuple(current))

    def _pairs(
        self, start: Candidate, scores: Sequence[Sequence[float]]
    ) -> list[tuple[float, tuple[tuple[int, int], ...]]]:
        """Moves of one unit, or of two, that keep the budget and promise a lower KL."""
        singles = [
            (u, i, scores[u][i], self.cost[u][i] - self.cost[u][start.chosen[u]])
            for u in range(len(self.units))
            for i in range(len(self.schemes))
            if i != start.chosen[u] and scores[u][i] < float("inf")
        ]
        left = self.budget - start.cost
        found: list[tuple[float, tuple[tuple[int, int], ...]]] = [
            (s, ((u, i),)) for u, i, s, c in singles if s < 0 and c <= left
        ]
        ups, downs = ([m for m in singles if (m[3] > 0) is up] for up in (True, False))
        found += [
            (s + t, ((u, i), (v, j)))
            for u, i, s, c in ups
            for v, j, t, d in downs
            if u != v and s + t < 0 and c + d <= left
        ]
        return found

    def _try(self, name: str, chosen: Sequence[int], predicted: float | None = None) -> None:
        self.candidates.append(
            Candidate(name, tuple(chosen), self._cost_of(chosen), self._kl(tuple(chosen)), predicted)
        )

    def _kl(self, chosen: Assignment) -> float:
        if chosen not in self.known:
            self.known[chosen] = self.study.measured(self._choices(chosen))
        return self.known[chosen]

    def _choices(self, chosen: Sequence[int]) -> dict[Unit, Scheme]:
        return {unit: self.schemes[index] for unit, index in zip(self.units, chosen)}

    def _cost_of(self, chosen: Sequence[int]) -> int:
        return sum(row[index] for row, index in zip(self.cost, chosen))


def _joint(a: Tensor, positions: float, chosen: Assignment) -> Tensor:
    """The joint second-order KL with one unit moved to each choice, the others as chosen. [units, schemes]"""
    held = a[:, range(len(chosen)), list(chosen)]  # [S, units]
    others = held.sum(1, keepdim=True) - held
    moved = second_order(others[..., None] + a, positions)
    return moved - second_order(held.sum(1), positions)
