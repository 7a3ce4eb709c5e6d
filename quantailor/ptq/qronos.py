"""Qronos: GPTQ that also corrects the error the layers before have already made.

Minimizes ||W X - W_hat X~||^2 for one layer, where X is the layer's input in the float model and X~ what really
arrives, from the quantized prefix. With H = X~ X~^T and G = X~ X^T, row by row:

    q_1 = Q((G_1 w - H_1,2: w_2:) / H_11)                 the first column, the others as they were
    w_2: <- H_22^-1 (G_2: w - H_2:,1 q_1)                 the others, best for what X~ is
    then GPTQ's own rounding and updates on the rest.

Scales are fixed beforehand, columns are visited by falling diagonal of H, as in gptq.py. Dead columns keep their
weights and are rounded to nearest.
Source: Zhang et al. 2025, arXiv:2505.11695, Algorithm 1 and Theorem 3.1 (the rest of the columns are GPTQ's).
Axes: O = out_features, N = in_features.   Time: O(O N^2 + N^3), twice GPTQ's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantailor.numerics import grids
from quantailor.observers.weights import weight_scale
from quantailor.ptq.gptq import GPTQ, group_of
from quantailor.ptq.method import Solution
from quantailor.ptq.statistics import Statistics
from quantailor.spec import Grid, QuantSpec


@dataclass(frozen=True)
class Qronos:
    damp: tuple[float, ...] = (
        1e-6,
        1e-4,
        1e-2,
    )  # added to H's diagonal, of its largest eigenvalue; the next on failure
    block_size: int = 128
    needs_hessian: bool = True
    needs_float_path: bool = True

    def solve(self, weight_ON: Tensor, statistics: Statistics | None, spec: QuantSpec) -> Solution:
        """Integers for one layer. Falls back to GPTQ where there is no float path or H is singular, and says so."""
        if (
            statistics is None
            or statistics.cross is None
            or statistics.hessian is None
            or statistics.importance is None
        ):
            return _instead(weight_ON, statistics, spec, "its input in the float model is not known")
        scale, zero_point = weight_scale(weight_ON, spec, statistics.importance)
        length = weight_ON.shape[1]
        group_N = group_of(length, spec.group_size)
        largest = (
            float(torch.linalg.matrix_norm(statistics.hessian, ord=2)) if length <= 512 else _power(statistics.hessian)
        )
        for damp in self.damp:
            try:
                q = self.round(
                    weight_ON.float(),
                    statistics.hessian,
                    statistics.cross,
                    scale[..., 0],
                    zero_point[..., 0],
                    spec.grid,
                    damp * largest,
                    group_N,
                )
            except torch.linalg.LinAlgError:
                continue
            dead = int((statistics.diagonal == 0).sum())
            report = {"method": "qronos", "damp": damp} | ({"dead_columns": dead} if dead else {})
            return Solution(q, scale, zero_point, report)
        return _instead(weight_ON, statistics, spec, f"H is not positive definite at damping {self.damp[-1]}")

    def round(
        self,
        weight_ON: Tensor,
        hessian_NN: Tensor,
        cross_NN: Tensor,
        scale_OG: Tensor,
        zero_point_OG: Tensor,
        grid: Grid,
        damp: float,
        group_N: Tensor | None = None,
    ) -> Tensor:
        """Algorithm 1 with given scales; `damp` is what the diagonal is raised by. Returns integers [O, N].

        `group_N`: which of the G scales a column uses; None: each its own. Raises: LinAlgError if damped H is still
        singular. Works in the dtype of `hessian_NN`.
        """
        order = torch.argsort(hessian_NN.diagonal(), descending=True, stable=True)
        hessian, cross = hessian_NN[order][:, order], cross_NN[order][:, order]
        alive = hessian.diagonal() > 0
        # A dead column would be driven to 0 / damp: give it a unit of its own, which keeps its weight.
        unit = (~alive).to(hessian.dtype)
        hessian = hessian + torch.diag(damp + unit)
        cross = cross + torch.diag(unit)
        w = weight_ON.to(hessian.dtype)[:, order]
        scale, zero_point = scale_OG.to(hessian.dtype), zero_point_OG
        groups = order if group_N is None else group_N.to(order.device)[order]
        target_ON = w @ cross.t()  # row n of it: G_n w
        first = (target_ON[:, 0] - w[:, 1:] @ hessian[0, 1:]) / hessian[0, 0]
        its_scale, its_zero_point = scale[:, groups[0]], zero_point[:, groups[0]]
        q_first = grids.encode(first, its_scale, its_zero_point, grid)
        rounded = grids.decode(q_first, its_scale, its_zero_point, grid)
        right = target_ON[:, 1:] - torch.outer(rounded, hessian[1:, 0])
        rest = hessian[1:, 1:]
        w_rest = torch.cholesky_solve(right.t(), torch.linalg.cholesky(rest)).t()
        solver = GPTQ(block_size=self.block_size, act_order=False)
        q_rest = solver.round(w_rest, rest, scale, zero_point, grid, damp=0.0, group_N=groups[1:])
        q = torch.empty(w.shape, dtype=q_rest.dtype, device=w.device)
        q[:, order] = torch.cat([q_first[:, None], q_rest], dim=1)
        return q


def _power(hessian: Tensor, steps: int = 30) -> float:
    """The largest eigenvalue, by power iteration from the heaviest column."""
    v = hessian[:, hessian.diagonal().argmax()].clone()
    for _ in range(steps):
        v = hessian @ (v / v.norm().clamp(min=1e-30))
    return float(v.norm())


def _instead(weight_ON: Tensor, statistics: Statistics | None, spec: QuantSpec, reason: str) -> Solution:
    found = GPTQ().solve(weight_ON, statistics, spec)
    both = f"{reason}; {found.report['fallback']}" if "fallback" in found.report else reason
    return Solution(found.q, found.scale, found.zero_point, {**found.report, "fallback": both})
