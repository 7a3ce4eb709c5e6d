"""GPTQ: round one column, push its error onto the columns not rounded yet.

Minimizes ||W X - W_hat X||^2 for one layer, given H = X X^T from calibration. Scales are fixed beforehand from the
original weights (static groups), so columns may be visited in any order and the result needs no index at run time;
the default order is by falling diagonal of H ("act-order"). Dead columns (inputs that were always 0) are rounded to
nearest and spread nothing.

Source: Frantar et al. 2023, arXiv:2210.17323, Eq. 2-5, Algorithm 1.
Axes: O = out_features, N = in_features, G = groups a row.   Time: O(O N^2). The weight is worked on transposed, so
that a column is one contiguous run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantailor.numerics import grids
from quantailor.numerics.grouping import per_element
from quantailor.observers.weights import weight_scale
from quantailor.ptq.method import Solution
from quantailor.ptq.rtn import RTN
from quantailor.ptq.statistics import Statistics
from quantailor.spec import Grid, QuantSpec


@dataclass(frozen=True)
class GPTQ:
    damp: tuple[float, ...] = (0.01, 0.05, 0.1)  # added to H's diagonal, of its mean; the next where Cholesky fails
    block_size: int = 128  # columns a deferred update: the speed, never the result
    act_order: bool = True
    needs_hessian: bool = True
    needs_float_path: bool = False

    def solve(self, weight_ON: Tensor, statistics: Statistics | None, spec: QuantSpec) -> Solution:
        """Integers for one layer. Falls back to RTN without usable data, and says so in the report."""
        if statistics is None or statistics.hessian is None or statistics.importance is None:
            fallback = RTN().solve(weight_ON, statistics, spec)
            return Solution(
                fallback.q,
                fallback.scale,
                fallback.zero_point,
                {**fallback.report, "fallback": "no calibration data reached it"},
            )
        scale, zero_point = weight_scale(weight_ON, spec, statistics.importance)
        length = weight_ON.shape[1]
        scale_ON, zero_point_ON = (
            per_element(t.squeeze(-1).expand(weight_ON.shape[0], -1), length, spec.group_size)
            for t in (scale, zero_point)
        )
        dead = int((statistics.diagonal == 0).sum())
        for damp in self.damp:
            try:
                q = self.round(weight_ON.float(), statistics.hessian, scale_ON, zero_point_ON, spec.grid, damp)
            except torch.linalg.LinAlgError:
                continue
            report = {"method": "gptq", "damp": damp} | ({"dead_columns": dead} if dead else {})
            return Solution(q, scale, zero_point, report)
        fallback = RTN().solve(weight_ON, statistics, spec)
        reason = f"H is not positive definite at damping {self.damp[-1]}"
        return Solution(fallback.q, fallback.scale, fallback.zero_point, {**fallback.report, "fallback": reason})

    def round(
        self, weight_ON: Tensor, hessian_NN: Tensor, scale_ON: Tensor, zero_point_ON: Tensor, grid: Grid, damp: float
    ) -> Tensor:
        """Algorithm 1 with given scales. Returns integers [O, N]. Raises: LinAlgError if damped H is still singular.

        Works in the dtype of `hessian_NN`.
        """
        hessian, order = self._damped(hessian_NN, damp)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        upper_NN = torch.linalg.cholesky(inverse, upper=True)
        w_NO = weight_ON.to(hessian.dtype).t()[order].contiguous()
        scale_NO = scale_ON.to(hessian.dtype).t()[order].contiguous()
        zero_point_NO = zero_point_ON.t()[order].contiguous()
        q_NO = torch.empty(
            w_NO.shape, dtype=torch.uint8 if grids.limits(grid)[1] > 127 else torch.int8, device=w_NO.device
        )
        for start in range(0, len(w_NO), self.block_size):
            stop = min(start + self.block_size, len(w_NO))
            error = torch.empty_like(w_NO[start:stop])
            for col in range(start, stop):
                q_NO[col] = grids.encode(w_NO[col], scale_NO[col], zero_point_NO[col], grid)
                rounded = grids.decode(q_NO[col], scale_NO[col], zero_point_NO[col], grid)
                error[col - start] = (w_NO[col] - rounded) / upper_NN[col, col]
                w_NO[col + 1 : stop].addr_(
                    upper_NN[col, col + 1 : stop], error[col - start], alpha=-1
                )  # Eq. 2, this block
            w_NO[stop:].addmm_(upper_NN[start:stop, stop:].t(), error, alpha=-1)  # Eq. 4: the rest, once
        q_ON = torch.empty_like(q_NO)
        q_ON[order] = q_NO
        return q_ON.t().contiguous()

    def _damped(self, hessian_NN: Tensor, damp: float) -> tuple[Tensor, Tensor]:
        """(H with its diagonal raised and dead columns isolated, columns in visiting order)."""
        diagonal = hessian_NN.diagonal()
        order = torch.argsort(diagonal, descending=True, stable=True) if self.act_order else torch.arange(len(diagonal))
        order = order.to(hessian_NN.device)
        hessian = hessian_NN[order][:, order]
        # A dead column's row of H is zero: any positive diagonal isolates it.
        hessian.diagonal().add_(damp * diagonal.mean())
        return hessian, order
