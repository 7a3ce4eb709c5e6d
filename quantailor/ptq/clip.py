"""AWQ's second half: round to nearest on ranges clipped where the output of each group suffers least.

    r* = argmin over r of  || (Q_r(w_g) - w_g) X_g ||^2 = d^T H_gg d,     d = Q_r(w_g) - w_g,   r in 1.00, 0.95 .. 0.55

for each group g of each output row by itself, with the range of Q_r that of w_g clamped to r times its largest
magnitude, and H_gg the group's own block of H = X^T X. Unlike the importance-weighted search that the other methods
share (observers/weights.py) it knows how the inputs of a group go together; the result of that search is one more
candidate, so that this one never loses to it in its own measure.

Source: Lin et al. 2023, arXiv:2306.00978, section 3.2 ("weight clipping"); the grid of 10 ratios is that of the code
released with it, which leaves the q and k projections out; here every layer is clipped.
Axes: O = out_features, N = in_features, G = groups a row, g group size.   Time: O(O N g) a ratio.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantailor.numerics import grids
from quantailor.numerics.grouping import from_groups, per_element, to_groups
from quantailor.observers.weights import weight_scale
from quantailor.ptq.method import Solution
from quantailor.ptq.rtn import RTN
from quantailor.ptq.statistics import Statistics
from quantailor.spec import PerTensor, QuantSpec


@dataclass(frozen=True)
class Clip:
    """A solver for `method=`: what `awq` rounds with where no other is named."""

    ratios: tuple[float, ...] = tuple(1 - i / 20 for i in range(10))
    needs_hessian: bool = True
    needs_float_path: bool = False

    def solve(self, weight_ON: Tensor, statistics: Statistics | None, spec: QuantSpec) -> Solution:
        if why := _unusable(statistics):
            found = RTN().solve(weight_ON, statistics, spec)
            return dataclasses.replace(found, report={**found.report, "fallback": why})
        assert statistics is not None and statistics.hessian is not None
        weight = weight_ON.float()
        blocks = diagonal_blocks(statistics.hessian.to(weight), spec.group_size)
        best: tuple[Tensor, Tensor, Tensor] | None = None  # error, scale, zero point, [O, G, 1] each
        clipped = torch.zeros_like(weight[:, :1], dtype=torch.bool)
        for is_clip, scale, zero_point in self._candidates(weight, statistics.importance, spec):
            error = group_errors(weight, scale, zero_point, blocks, spec)
            if best is None:
                best, clipped = (error, scale, zero_point), torch.zeros_like(error, dtype=torch.bool)
                continue
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, scale, zero_point), best))  # type: ignore[assignment]
            clipped = torch.where(better, torch.full_like(clipped, is_clip), clipped)
        assert best is not None
        _, scale, zero_point = best
        q = grids.encode(to_groups(weight, spec.group_size), scale, zero_point, spec.grid)
        report = {
            "method": "clip",
            "range": f"{len(self.ratios)} clipped ranges and the searched one, by the output error of each group",
            "clipped": float(clipped.float().mean()),  # share of the groups whose range was clipped by a ratio
        }
        return Solution(from_groups(q, weight.shape[1]), scale, zero_point, report)

    def _candidates(
        self, weight_ON: Tensor, importance_N: Tensor | None, spec: QuantSpec
    ) -> Iterator[tuple[bool, Tensor, Tensor]]:
        """(whether a ratio below 1 clipped it, scale, zero point), the searched range first."""
        yield False, *weight_scale(weight_ON, spec, importance_N)
        plain = dataclasses.replace(spec, range="minmax")
        per_tensor = isinstance(spec.granularity, PerTensor)
        largest = to_groups(weight_ON, spec.group_size).abs().amax(-1)
        largest = per_element(
            largest.amax().expand_as(largest) if per_tensor else largest, weight_ON.shape[1], spec.group_size
        )
        for ratio in self.ratios:
            height = ratio * largest
            yield ratio < 1, *weight_scale(weight_ON.clamp(-height, height), plain)


def diagonal_blocks(hessian_NN: Tensor, group_size: int | None) -> Tensor:
    """The blocks H_gg of `hessian_NN`, [G, g, g]; zeros where the last group is short."""
    rows = to_groups(hessian_NN, group_size).transpose(0, 1)  # [G, N, g]: each group's columns
    return torch.stack([to_groups(part.t(), group_size)[:, i].t() for i, part in enumerate(rows)])


def group_errors(weight_ON: Tensor, scale: Tensor, zero_point: Tensor, blocks_Ggg: Tensor, spec: QuantSpec) -> Tensor:
    """d^T H_gg d of every group rounded to nearest, [O, G, 1]; summed to [1, 1, 1] where all share a scale."""
    w = to_groups(weight_ON, spec.group_size)
    q = grids.encode(w, scale, zero_point, spec.grid)
    d = (grids.decode(q, scale, zero_point, spec.grid) - w).transpose(0, 1)  # [G, O, g]
    if missing := w.shape[1] * w.shape[2] - weight_ON.shape[1]:
        d[-1, :, w.shape[2] - missing :] = 0  # padding is no weight, wherever a grid without 0 puts it
    error = ((d @ blocks_Ggg) * d).sum(-1).t().unsqueeze(-1).clamp(min=0)
    return error.sum().view(1, 1, 1) if isinstance(spec.granularity, PerTensor) else error


def _unusable(statistics: Statistics | None) -> str | None:
    if statistics is None or statistics.importance is None:
        return "no calibration data reached it"
    if statistics.hessian is None:
        return "X^T X is not kept for grouped convolutions"
    return None if bool(torch.isfinite(statistics.hessian).all()) else "H is not finite"
