"""Is the calibration data enough, and is it the right kind? Told from the float model, before anything is quantized.

**Enough.** A layer solved on a sample fits that sample better than it fits other text. The sample is cut into halves A
and B; with E(s, t) the output error, on half t, of a layer solved on half s,

    u = (E(A, B) + E(B, A) - E(A, A) - E(B, B)) / (E(A, B) + E(B, A) + E(A, A) + E(B, B)).

Where a solver fits p numbers to n rows, its own error is e (1 - p/n) and that on new rows e (1 + p/n), with e the
error of the best there is (the optimism of the training error: Hastie, Tibshirani & Friedman 2009, The Elements of
Statistical Learning, section 7.4); so u estimates by how much, as a share of e, half the rows fall short of endless
rows, and `u / 2` what all of them do. On 1 / n rests every extrapolation to other numbers of rows.

The channels' mean squares, which decide scales, are good to a half-width that comes from the same halves: the
difference of two half-samples has four times the variance of the whole sample's mean (balanced half-samples: McCarthy
1969, Review of the International Statistical Institute 37(3)). Its mean over all halvings of the folds is 4 s^2 / K,
with s^2 the variance of the K folds' means.

**The metric.** Its sampling error is the bootstrap's (bootstrap.py), and shrinks with the square root of the rows.

**The right kind.** With evaluation data: do rows of both look alike to the model? A permutation test over documents
(Good 2005; p with +1 as in Phipson & Smyth 2010, doi:10.2202/1544-6115.1585) on each row's loss and on the sketch of
its layers' inputs says whether there is a difference at all; the size of it, in spreads of single rows, says whether
it matters. Without: the loss is held against the entropy of the model's own predictions, which it equals on text of
the kind the model knows (Braverman et al. 2020, arXiv:1906.05664).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quantailor.data.batching import drawn_rows
from quantailor.data.examples import Examples
from quantailor.data.splitting import overlap
from quantailor.errors import UsageError
from quantailor.evaluate import bootstrap
from quantailor.evaluate.inputs import Gathered, LayerInputs, gather
from quantailor.evaluate.measuring import Progress
from quantailor.evaluate.result import jsonable

Solve = Callable[
    [Tensor, Tensor, int], Tensor
]  # (weight [O, N], X^T X [N, N], rows in it) -> weight on its grid [O, N]
Floats = NDArray[np.float64]

ENOUGH = 0.05  # of a layer's error that finite calibration may add
LEVEL = 0.01  # of the permutation tests
CLEAR_INPUTS = 0.5  # spreads of single rows that the inputs of two kinds of text lie apart, at least
CLEAR_NATS = 0.5  # nats a token between two kinds of text, at least
PERMUTATIONS = 999
OUTPUTS = 64  # rows of a weight that are solved: each is a problem of its own, so these tell of all


@dataclass(frozen=True)
class LayerAdequacy:
    """One layer: `importance_half_width` of the mean squares of its input channels (root mean square over channels of
    the 95 % half-width, relative; None with fewer than two folds); `shortfall` u of half the rows a split."""

    name: str
    in_features: int
    importance_half_width: float | None
    shortfall: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "in_features": self.in_features,
            "importance_half_width": self.importance_half_width,
            "shortfall_of_half": self.shortfall,
        }


@dataclass(frozen=True)
class Precision:
    """How far the metric would move on other rows of the kind: `value` +- `half_width` (95 %) on `num_units` units."""

    metric: str
    value: float
    half_width: float
    num_units: int
    unit: str
    on: str

    def with_units(self, num_units: int) -> float:
        """The half-width that so many units would give: by 1 / sqrt(n)."""
        return self.half_width * math.sqrt(self.num_units / num_units)

    def units_for(self, half_width: float) -> int:
        """How many units give this half-width."""
        return math.ceil(self.num_units * (self.half_width / half_width) ** 2)

    def __str__(self) -> str:
        more = 4 * self.num_units
        return (
            f"{self.metric} {self.value:.4g} is good to +-{self.half_width:.2g} with these {self.num_units:,} "
            f"{self.unit}s of the {self.on} data; {more:,} would give +-{self.with_units(more):.2g} (95 %)"
        )


@dataclass(frozen=True)
class Domain:
    """Calibration data held against `against`. `nats`, `other_nats` a token; `distance` of the layers' inputs in
    spreads of single rows; p values of "no difference". Without evaluation data `other_nats` is what the model
    expected, and only the loss is compared: `nats_low` is then the low end of the 98 % interval of the difference."""

    against: str
    nats: float
    other_nats: float
    nats_p: float | None = None
    distance: float | None = None
    distance_p: float | None = None
    excess: float | None = None
    nats_low: float | None = None

    @property
    def reasons(self) -> list[str]:
        """Why it is flagged; empty where it is not."""
        found = []
        change = self.nats - self.other_nats
        if self.nats_p is None:
            if self.nats_low is not None and self.nats_low >= CLEAR_NATS:
                found.append(f"loss {self.nats:.2f} nats a token, where the model expects {self.other_nats:.2f}")
            return found
        if self.nats_p <= LEVEL and change >= CLEAR_NATS:  # lower: text that the model was trained on, say
            found.append(f"loss {self.nats:.2f} nats a token against {self.other_nats:.2f} (p = {self.nats_p:.2g})")
        p, distance = self.distance_p, self.distance
        if p is not None and p <= LEVEL and distance is not None and distance >= CLEAR_INPUTS:
            found.append(f"the layers' inputs lie {distance:.1f} spreads of a row apart (p = {p:.2g})")
        return found

    @property
    def flagged(self) -> bool:
        return bool(self.reasons)


@dataclass(frozen=True)
class Adequacy:
    """What `examine` found. `shortfall`: by how much layers solved on these rows err more than on endless ones, as a
    share of their error; None where there were too few documents, or no solver. It is told from `num_seen` of the
    `num_rows` rows, which have `num_tokens` tokens. `seconds`: what it cost."""

    num_rows: int
    num_seen: int
    num_tokens: int
    layers: tuple[LayerAdequacy, ...]
    precision: Precision
    domain: Domain
    seconds: float
    solver: str = ""
    notes: tuple[str, ...] = ()
    source: str = ""
    splits: Floats = field(default_factory=lambda: np.zeros(0))  # u of half of `num_seen`, mean over layers, a split

    @property
    def shortfall(self) -> float | None:
        return self._of_all(float(self.splits.mean())) if len(self.splits) else None

    @property
    def shortfall_range(self) -> tuple[float, float] | None:
        """What the splits in halves gave, least and most: how far one split can be trusted, no confidence interval."""
        least_and_most = (float(self.splits.min()), float(self.splits.max())) if len(self.splits) else None
        return least_and_most and (self._of_all(least_and_most[0]), self._of_all(least_and_most[1]))

    def _of_all(self, of_half: float) -> float:
        """The shortfall of `num_rows` rows from that of half of `num_seen`: by 1 / n."""
        return of_half / 2 * self.num_seen / self.num_rows

    @property
    def rows_needed(self) -> int | None:
        """How many rows bring the shortfall to `ENOUGH`, by 1 / n."""
        return None if self.shortfall is None else max(1, math.ceil(self.num_rows * self.shortfall / ENOUGH))

    @property
    def verdict(self) -> str:
        """`wrong domain`, `enough`, `more would help` or `not told`."""
        if self.domain.flagged:
            return "wrong domain"
        if self.shortfall is None:
            return "not told"
        return "enough" if self.shortfall <= ENOUGH else "more would help"

    def text(self) -> str:
        """Lines for people."""
        widths = [w for layer in self.layers if (w := layer.importance_half_width) is not None]
        lines = [
            f"{self.num_rows:,} calibration rows of {self.source}: {self.verdict}",
            self._enough(),
        ]
        if widths:
            lines.append(
                f"mean squares of the input channels are good to +-{np.median(widths):.1%} "
                f"(95 %, median of {len(widths)} layers; worst {max(widths):.1%})"
            )
        lines += [str(self.precision), self._kind(), *(f"note: {note}" for note in self.notes)]
        return "\n".join(lines)

    def for_receipt(self) -> list[str]:
        """One line a finding, for the notes of a receipt."""
        lines = [self._enough()] if self.shortfall is not None else []
        if self.domain.flagged:
            lines.append(self._kind())
        return [f"calibration data: {line}" for line in lines]

    def to_json(self) -> dict[str, Any]:
        domain = {**vars(self.domain), "flagged": self.domain.flagged, "reasons": self.domain.reasons}
        more = 4 * self.precision.num_units
        document: dict[str, Any] = jsonable(
            {
                "verdict": self.verdict,
                "rows": self.num_rows,
                "rows_seen": self.num_seen,
                "tokens_seen": self.num_tokens,
                "solver": self.solver,
                "shortfall": self.shortfall,
                "shortfall_range": self.shortfall_range,
                "rows_needed": self.rows_needed,
                "enough_below": ENOUGH,
                "precision": {
                    **vars(self.precision),
                    "more_units": more,
                    "half_width_with_more": self.precision.with_units(more),
                },
                "domain": domain,
                "layers": [layer.to_json() for layer in self.layers],
                "source": self.source,
                "seconds": self.seconds,
                "notes": self.notes,
            }
        )
        return document

    def _enough(self) -> str:
        if self.shortfall is None or self.shortfall_range is None:
            return "whether the rows are enough could not be told"
        low, high = self.shortfall_range
        text = (
            f"layers solved ({self.solver}) on {self.num_rows:,} rows err some {self.shortfall:.1%} more than on "
            f"endless ones ({low:.1%} to {high:.1%} over {len(self.splits)} splits of {self.num_seen:,} in halves)"
        )
        if self.shortfall <= ENOUGH:
            return f"{text}: enough"
        return f"{text}: more would help, some {self.rows_needed:,} rows for {ENOUGH:.0%}"

    def _kind(self) -> str:
        d = self.domain
        if d.flagged and d.nats_p is None:
            return f"not the kind of text this model knows: {d.reasons[0]}"
        if d.flagged:
            cost = ""
            if d.excess is not None:
                cost = f"; layers solved on it err {d.excess:+.0%} there, against layers solved on rows of that"
            return f"not the kind of text of {d.against}: {'; '.join(d.reasons)}{cost}"
        if d.nats_p is None:
            return f"loss {d.nats:.2f} nats a token, the model expects {d.other_nats:.2f}: the kind of text it knows"
        return (
            f"the kind of text of {d.against}: loss {d.nats:.2f} against {d.other_nats:.2f} nats a token "
            f"(p = {d.nats_p:.2g}), inputs {d.distance:.2f} spreads of a row apart (p = {d.distance_p:.2g})"
        )


def examine(
    model: nn.Module,
    calibration: Examples,
    *,
    evaluation: Examples | None = None,
    solve: Solve | None = None,
    solver: str = "",
    samples: int = 128,
    seed: int = 0,
    splits: int = 4,
    max_layers: int = 4,
    at_most: int | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Adequacy:
    """Judge the rows that calibration draws from `calibration` (`samples` of them, by `seed`) on the float `model`.

    Cost: one forward pass of those rows, and of all evaluation rows; `2 * splits` solutions of 64 outputs of
    `max_layers` layers, and 4 with evaluation data. `at_most` runs only so many rows of either and extrapolates: for a
    note in passing. Without `solve` (`solver` is its name) nothing is solved.
    Raises: UsageError for settings out of range or data of different tasks; UntrustedInput as `gather`.
    """
    for name, value in (("samples", samples), ("splits", splits), ("max_layers", max_layers), ("at_most", at_most)):
        if value is not None and value < 1:
            raise UsageError(f"{name}={value} leaves nothing to look at; use 1 or more")
    if calibration.are_images:
        raise UsageError(f"{calibration.source} holds images, and only rows of tokens can be looked at; leave it out")
    if evaluation is not None and evaluation.task != calibration.task:
        raise UsageError(
            f"{calibration.source} is for {calibration.task}, {evaluation.source} for {evaluation.task}; "
            "give two of one task"
        )
    began = time.perf_counter()
    settings: dict[str, Any] = {
        "max_hessians": max_layers if solve else 0,
        "batch_size": batch_size,
        "seed": seed,
        "progress": progress,
    }
    drawn = drawn_rows(len(calibration), samples, seed)
    mine = gather(model, calibration, drawn[:at_most], **settings)
    notes = [*mine.notes, *calibration.notes_on(drawn, samples)]
    other = None
    if evaluation is not None:
        order = drawn_rows(len(evaluation), len(evaluation), seed)
        seen = min(samples, at_most or samples)
        other = gather(model, evaluation, order[:seen], more_rows=[] if at_most else order[seen:], **settings)
        if shared := overlap(calibration, evaluation):
            notes.append(f"{shared} documents or records are in both the calibration and the evaluation data")
    halves = halvings(mine.num_folds, splits, seed)
    if solve is not None and not halves:
        notes.append("one document cannot be cut into halves that share nothing: give data of several")
    layers = tuple(
        LayerAdequacy(
            layer.name,
            layer.squares.shape[1],
            importance_half_width(layer.squares, layer.num_inputs),
            tuple(shortfall(layer, solve, half) for half in halves) if solve and layer.hessian is not None else (),
        )
        for layer in mine.layers.values()
    )
    solved = [layer.shortfall for layer in layers if layer.shortfall]
    measured = other or mine
    domain = _domain(mine, other, solve, seed)
    if domain.nats_p is not None and domain.nats_p <= LEVEL and domain.other_nats - domain.nats >= CLEAR_NATS:
        notes.append(
            f"the model knows the calibration data far better than {domain.against} ({domain.nats:.2f} against "
            f"{domain.other_nats:.2f} nats a token): it may have been trained on it"
        )
    return Adequacy(
        num_rows=len(drawn),
        num_seen=len(mine.rows),
        num_tokens=mine.num_tokens,
        layers=layers,
        precision=precision(measured, "calibration" if other is None else "evaluation"),
        domain=domain,
        seconds=time.perf_counter() - began,
        solver=solver,
        notes=tuple(dict.fromkeys(notes)),
        source=calibration.source,
        splits=np.mean(solved, axis=0) if solved else np.zeros(0),
    )


def halvings(num_folds: int, count: int, seed: int) -> list[Tensor]:
    """bool [num_folds], `count` of them at most: halves of the folds drawn at random, no two alike (nor mirrored)."""
    found: dict[tuple[bool, ...], Tensor] = {}
    rng = np.random.default_rng(seed)
    possible = math.comb(num_folds, num_folds // 2) // 2 if num_folds else 0
    while len(found) < min(count, possible):
        half = torch.zeros(num_folds, dtype=torch.bool)
        half[torch.as_tensor(rng.permutation(num_folds)[: num_folds // 2])] = True
        half = half if bool(half[0]) else ~half
        found.setdefault(tuple(half.tolist()), half)
    return list(found.values())


def importance_half_width(squares_KN: Tensor, num_inputs_K: Tensor) -> float | None:
    """The relative 95 % half-width of the mean squares that all K folds together give, root mean square over channels.

    Channels that were always 0 are left out. None for fewer than two folds.
    """
    num_folds = len(num_inputs_K)
    if num_folds < 2:
        return None
    means = squares_KN / num_inputs_K[:, None]
    whole = means.mean(0)
    live = whole > 0
    variance = means[:, live].var(0) / num_folds  # = the mean over halvings of (A - B)^2 / 4
    return 1.96 * float((variance / whole[live].square()).mean().sqrt()) if bool(live.any()) else 0.0


def shortfall(layer: LayerInputs, solve: Solve, half: Tensor) -> float:
    """u of one layer and one halving: 0 where the halves do not matter, towards 1 where a solution fits only its own.

    `half` bool [K]: the folds of A; the others are B.
    """
    weight, (a, b), rows = _problem(layer, half)
    apart_a, apart_b = solve(weight, a * rows[0], rows[0]) - weight, solve(weight, b * rows[1], rows[1]) - weight
    own = _error(apart_a, a) + _error(apart_b, b)
    cross = _error(apart_a, b) + _error(apart_b, a)
    return (cross - own) / (cross + own) if cross + own > 0 else 0.0


def _problem(layer: LayerInputs, half: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[int, int]]:
    """(some outputs of the weight [O', N], X^T X a row of either half, rows of either half)."""
    assert layer.hessian is not None
    every = max(1, len(layer.weight) // OUTPUTS)
    means, rows = [], []
    for folds in (half.to(layer.hessian.device), ~half.to(layer.hessian.device)):
        rows.append(max(1, int(layer.num_inputs[folds].sum())))
        means.append(layer.hessian[folds].sum(0) / rows[-1])
    return layer.weight[::every][:OUTPUTS].float(), (means[0], means[1]), (rows[0], rows[1])


def _error(difference_ON: Tensor, hessian_NN: Tensor) -> float:
    """sum over outputs of d H d^T."""
    return float(((difference_ON @ hessian_NN) * difference_ON).sum().clamp(min=0))


def precision(found: Gathered, on: str) -> Precision:
    """The task's metric on these rows, with its bootstrap half-width."""
    low, high = bootstrap.interval(found.sums, found.counts, bootstrap.mean)
    return Precision(
        metric="loss in nats a token" if found.examples.task == "lm" else "accuracy",
        value=float(found.sums.sum() / found.counts.sum()),
        half_width=(high - low) / 2,
        num_units=int((found.counts > 0).sum()),
        unit=found.unit,
        on=on,
    )


def _domain(mine: Gathered, other: Gathered | None, solve: Solve | None, seed: int) -> Domain:
    nats, expected = (float(values.sum() / mine.num_scored.sum()) for values in (mine.nats, mine.expected_nats))
    if other is None:
        sums, counts = _by_cluster(mine.clusters, mine.nats - mine.expected_nats, mine.num_scored)
        low, _ = bootstrap.interval(sums, counts, bootstrap.mean, level=0.98)
        return Domain("the model's own expectations", nats, expected, nats_low=low)
    first = np.concatenate([np.ones(len(mine.rows), bool), np.zeros(len(other.rows), bool)])
    clusters = np.concatenate([mine.clusters, other.clusters + mine.clusters.max() + 1])
    losses = np.concatenate([part.nats / part.num_scored for part in (mine, other)])
    _, nats_p = two_samples(losses[:, None], first, clusters, seed=seed)
    sketches = [
        np.concatenate([part.layers[name].sketch.cpu().numpy() for part in (mine, other)])
        for name in mine.layers
        if name in other.layers
    ]
    distance, distance_p = two_samples(np.concatenate(sketches, axis=1), first, clusters, seed=seed)
    other_nats = float(other.nats.sum() / other.num_scored.sum())
    excess = _excess(mine, other, solve, seed) if solve else None
    return Domain(str(other.examples.source), nats, other_nats, nats_p, distance, distance_p, excess)


def two_samples(
    features: Floats, first: NDArray[np.bool_], clusters: NDArray[np.int64], *, seed: int = 0
) -> tuple[float, float]:
    """(how far the means of two samples lie apart, in spreads of single rows; p of "no difference").

    Shapes: `features` [num_rows, F]; `first` [num_rows] marks the rows of the first sample; rows of one number in
    `clusters` [num_rows] stay together when the samples are dealt anew. The distance is without what chance alone gives
    (the mean over permutations), and 0 where that is all.
    """
    names, members = np.unique(clusters, return_inverse=True)
    is_first = np.zeros(len(names), dtype=bool)
    is_first[members] = first
    if is_first.all() or not is_first.any():
        return 0.0, 1.0
    sums, counts = np.zeros((len(names), features.shape[1])), np.bincount(members).astype(float)
    np.add.at(sums, members, features)
    rng = np.random.default_rng(seed)
    dealt = np.stack([is_first, *(rng.permutation(is_first) for _ in range(PERMUTATIONS))]).astype(float)
    in_first = dealt @ counts
    means = (dealt @ sums) / in_first[:, None]
    others = ((1 - dealt) @ sums) / (counts.sum() - in_first)[:, None]
    squared = np.square(means - others).sum(1)
    within = sum(np.square(features[side] - features[side].mean(0)).sum() for side in (first, ~first))
    spread = within / max(1, len(features) - 2)
    apart = max(0.0, squared[0] - squared[1:].mean())
    p = (1 + int((squared[1:] >= squared[0] * (1 - 1e-12)).sum())) / (1 + PERMUTATIONS)
    return (math.sqrt(apart / spread) if spread > 0 else math.inf if apart > 0 else 0.0), p


def _by_cluster(clusters: NDArray[np.int64], *columns: Floats) -> list[Floats]:
    """Each column summed over the rows of a cluster."""
    _, members = np.unique(clusters, return_inverse=True)
    return [np.bincount(members, weights=column).astype(np.float64) for column in columns]


def _excess(mine: Gathered, other: Gathered, solve: Solve, seed: int) -> float | None:
    """How much more layers solved on half of the calibration rows err on evaluation rows than layers solved on half of
    those, on the other half: a share of the latter's error, mean over layers; None with too few documents."""
    if not mine.num_folds or not other.num_folds:
        return None
    half, other_half = halvings(mine.num_folds, 1, seed)[0], halvings(other.num_folds, 1, seed)[0]
    ratios = []
    for name, layer in mine.layers.items():
        theirs = other.layers.get(name)
        if layer.hessian is None or theirs is None or theirs.hessian is None:
            continue
        weight, halves, rows = _problem(layer, half)
        _, targets, other_rows = _problem(theirs, other_half)
        foreign = own = 0.0
        for i in (0, 1):
            foreign += _error(solve(weight, halves[i] * rows[i], rows[i]) - weight, targets[1 - i])
            own += _error(solve(weight, targets[i] * other_rows[i], other_rows[i]) - weight, targets[1 - i])
        if own > 0:
            ratios.append(foreign / own - 1)
    return float(np.mean(ratios)) if ratios else None
