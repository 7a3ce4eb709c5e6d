"""HQQ: half-quadratic quantization, which fits the grid to the weight by a norm that forgives outliers; without data.

Minimizes sum |W - W_hat|^p with p < 1 over the grid of each group. Splitting it with an auxiliary error W_e leaves
steps in closed form; with x = W / s, the levels t = q - z that x is rounded to, and all errors in steps:

    r   = x - t                                    what rounding leaves
    r_e = sign(r) max(0, |r| - |r|^(p-1) / beta)   generalized shrinkage: the part of it given up as an outlier
    z  <- mean(q - (x - r_e))                      the zero point that fits the rest best
    s  <- s <t, x - r_e> / <t, t>                  on grids without one: the scale that does
    beta <- kappa beta

A group stops when its error no longer falls and keeps its best iterate, the min-max range it starts from included.

z is an integer here, and a real number in the publication. From a min-max range the real one moves by less than half a
step, so rounding it afterwards undoes all of it (on Gaussian, Student and skewed weights at 2, 3 and 4 bits no error
changed). So z and s are first fitted together, which is the least-squares line of x - r_e on t; then z is rounded and s
is fitted again by itself.

Source: Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", on
mobiusml.github.io/hqq_blog: the equations on the optimization, and its settings. Different as well: beta counts in
steps; in the weight's own units 10 puts the threshold above every error of a weight of ordinary size, and nothing is
ever given up. Each group stops by itself, not the whole tensor.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from quantailor.numerics import grids
from quantailor.numerics.grouping import from_groups, to_groups
from quantailor.observers.weights import weight_scale
from quantailor.ptq.method import Solution
from quantailor.ptq.rtn import RTN
from quantailor.ptq.statistics import Statistics
from quantailor.spec import NF4, Grid, Int, PerTensor, QuantSpec

_CHUNK = 1 << 17  # weights worked on at once: what a step touches stays near the cache
_NONE = 1e-12  # a remainder of 0, in steps: its logarithm is finite


@dataclass(frozen=True)
class HQQ:
    p: float = 0.7
    beta: float = 10.0  # in steps
    kappa: float = 1.01
    iterations: int = 20
    needs_hessian: bool = False
    needs_float_path: bool = False

    def solve(self, weight_ON: Tensor, statistics: Statistics | None, spec: QuantSpec) -> Solution:
        """Integers for one layer; `statistics` are not used. NF4 falls back to RTN, and says so in the report.

        Raises: ValueError where the weight holds NaN or Inf.
        """
        if isinstance(spec.grid, NF4):
            found = RTN().solve(weight_ON, None, spec)
            reason = "NF4 is a table of levels, without a zero point or a step to fit"
            return Solution(found.q, found.scale, found.zero_point, {**found.report, "fallback": reason})
        scale, zero_point = weight_scale(weight_ON, dataclasses.replace(spec, range="minmax"))
        w = weight_ON.detach().float()
        rows = w.reshape(1, -1) if isinstance(spec.granularity, PerTensor) else w
        size = rows.shape[1] if spec.group_size is None else min(spec.group_size, rows.shape[1])
        whole = rows.shape[1] // size
        # A shorter last group is worked on by itself: its padding would count in the means.
        parts = [(rows[:, : whole * size], slice(0, whole)), (rows[:, whole * size :], slice(whole, None))]
        errors = torch.zeros(2, dtype=torch.float64)
        for part, groups in parts:
            if part.numel():
                shape = scale[:, groups].shape
                s, z = (t[:, groups].reshape(-1, 1) for t in (scale, zero_point))
                fitted = self.fit(part.reshape(len(s), -1), s, z, spec.grid)
                scale[:, groups], zero_point[:, groups] = (t.view(shape) for t in fitted[:2])
                errors += torch.tensor(fitted[2:], dtype=torch.float64)
        q = grids.encode(to_groups(w, spec.group_size), scale, zero_point, spec.grid)
        # Means a weight, in steps of the min-max range.
        report = {"method": "hqq", "statistics": "not used", "lp_error": (errors / w.numel()).tolist()}
        return Solution(from_groups(q, w.shape[1]), scale, zero_point, report)

    def fit(self, w: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[Tensor, Tensor, float, float]:
        """Scale and zero point [n, 1] of groups [n, g], and the sum of |error / first scale|^p before and after."""
        scale, zero_point = scale.clone(), zero_point.clone()
        errors = torch.zeros(2, dtype=torch.float64)
        rows = max(1, _CHUNK // w.shape[1])
        for first in range(0, len(w), rows):
            part = slice(first, first + rows)
            s, z = scale[part].clone(), zero_point[part].to(w.dtype)
            before, unit = self.error(w[part], s, z, grid), s.abs() ** self.p
            if isinstance(grid, Int) and not grid.symmetric:
                s, z, _ = self.descend(w[part], s, z, grid, move_zero=True)
                z = z.round().clamp(grid.qmin, grid.qmax)
            s, z, after = self.descend(w[part], s, z, grid, move_zero=False)
            better = after < before
            scale[part] = torch.where(better, s, scale[part])
            zero_point[part] = torch.where(better, z.to(zero_point.dtype), zero_point[part])
            errors += torch.stack([(e / unit).double().sum() for e in (before, torch.minimum(after, before))]).cpu()
        return scale, zero_point, float(errors[0]), float(errors[1])

    def error(self, w: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
        """sum |w - w_hat|^p of each group, [n, 1]; `zero` may be real."""
        remainder = _round(w, scale, zero, grid)[0]
        return _power(_log(remainder), self.p).sum(-1, keepdim=True) * scale.abs() ** self.p

    def descend(
        self, w: Tensor, scale: Tensor, zero: Tensor, grid: Grid, move_zero: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The alternation over scales, or over scales and real zero points, for groups [n, g] each by itself.

        `scale`, `zero` float32 [n, 1]: the start. Returns those of the best iterate, and its error.
        """
        live = torch.arange(len(w), device=w.device)
        best_scale, best_zero, least = scale.clone(), zero.clone(), torch.full_like(scale, torch.inf)
        beta = self.beta
        for _ in range(self.iterations):
            remainder, level = _round(w, scale, zero, grid)
            log = _log(remainder)
            error = _power(log.clone(), self.p).sum(-1, keepdim=True) * scale.abs() ** self.p
            better = (error < least[live]).squeeze(-1)
            kept = live[better]
            best_scale[kept], best_zero[kept], least[kept] = scale[better], zero[better], error[better]
            if not len(kept):
                break
            given_up = log.exp().sub_(_power(log, self.p - 1).div_(beta)).clamp_(min=0).copysign_(remainder)
            scale, zero = _moved(scale, zero, level, remainder.sub_(given_up), move_zero)
            if len(kept) < len(live):  # what is left takes the room of what has stopped
                w, scale, zero, live = w[better], scale[better], zero[better], kept
            beta *= self.kappa
        return best_scale, best_zero, least


def _round(w: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(what rounding leaves, the level it is rounded to), both in steps."""
    qmin, qmax, offset = grids.limits(grid)
    x = w * scale.reciprocal()
    level = (x + (zero - offset)).round_().clamp_(qmin, qmax).sub_(zero - offset)
    return x.sub_(level), level


def _log(remainder: Tensor) -> Tensor:
    return remainder.abs().clamp_(min=_NONE).log_()


def _power(log: Tensor, p: float) -> Tensor:
    """|r|^p from log |r|, in place: several times faster than `pow`."""
    return log.mul_(p).exp_()


def _moved(scale: Tensor, zero: Tensor, level: Tensor, rest: Tensor, move_zero: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point that fit x - r_e = t + `rest` best; as they were where that is no grid."""
    if move_zero:
        center, shift = level.mean(-1, keepdim=True), rest.mean(-1, keepdim=True)
        level = level - center
        slope = 1 + (rest * level).sum(-1, keepdim=True) / level.square_().sum(-1, keepdim=True)
        moved_zero = zero - (shift + center - slope * center) / slope
    else:
        slope = 1 + (rest * level).sum(-1, keepdim=True) / level.square_().sum(-1, keepdim=True)
        moved_zero = zero
    moved = scale * slope
    largest = torch.finfo(scale.dtype).max / 512  # its outer level must be finite, too
    sound = torch.isfinite(moved.reciprocal()) & (moved.abs() < largest) & (slope > 0) & torch.isfinite(moved_zero)
    return torch.where(sound, moved, scale), torch.where(sound, moved_zero, zero)
