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
from quantailor.observers.weights import weight_scale
from quantailor.ptq.method import Solution
from quantailor.ptq.rtn import RTN
from quantailor.ptq.statistics import Statistics
from quantailor.spec import NF4, Grid, Int, QuantSpec


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
        group_N = group_of(weight_ON.shape[1], spec.group_size)
        dead = int((statistics.diagonal == 0).sum())
        for damp in self.damp:
            try:
                q = self.round(
                    weight_ON.float(), statistics.hessian, scale[..., 0], zero_point[..., 0], spec.grid, damp, group_N
                )
            except torch.linalg.LinAlgError:
                continue
            report = {"method": "gptq", "damp": damp} | ({"dead_columns": dead} if dead else {})
            return Solution(q, scale, zero_point, report)
        fallback = RTN().solve(weight_ON, statistics, spec)
        reason = f"H is not positive definite at damping {self.damp[-1]}"
        return Solution(fallback.q, fallback.scale, fallback.zero_point, {**fallback.report, "fallback": reason})

    def round(
        self,
        weight_ON: Tensor,
        hessian_NN: Tensor,
        scale_OG: Tensor,
        zero_point_OG: Tensor,
        grid: Grid,
        damp: float,
        group_N: Tensor | None = None,
    ) -> Tensor:
        """Algorithm 1 with given scales. Returns integers [O, N]. Raises: LinAlgError if damped H is still singular.

        `group_N`: which of the G scales a column uses; None: each its own. Works in the dtype of `hessian_NN`.
        """
        hessian, order = self._damped(hessian_NN, damp)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        upper_NN = torch.linalg.cholesky(inverse, upper=True)
        w_NO = weight_ON.to(hessian.dtype).t().contiguous().index_select(0, order)
        to_grid = _ToGrid(scale_OG.to(hessian.dtype), zero_point_OG, len(weight_ON), grid)
        groups = (order if group_N is None else group_N.to(order.device)[order]).tolist()
        pivots = upper_NN.diagonal().tolist()
        q_NO = torch.empty(
            w_NO.shape, dtype=torch.uint8 if grids.limits(grid)[1] > 127 else torch.int8, device=w_NO.device
        )
        for start in range(0, len(w_NO), self.block_size):
            stop = min(start + self.block_size, len(w_NO))
            error = torch.empty_like(w_NO[start:stop])
            for col in range(start, stop):
                e = error[col - start]
                torch.sub(w_NO[col], to_grid(w_NO[col], groups[col], q_NO[col]), out=e).div_(pivots[col])
                w_NO[col + 1 : stop].addr_(upper_NN[col, col + 1 : stop], e, alpha=-1)  # Eq. 2, this block
            w_NO[stop:].addmm_(upper_NN[start:stop, stop:].t(), error, alpha=-1)  # Eq. 4: the rest, once
        q_ON = torch.empty_like(q_NO).index_copy_(0, order, q_NO)
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


def group_of(length: int, group_size: int | None) -> Tensor:
    """The group of each of a row's elements, int64 [N]."""
    return torch.arange(length) // (group_size or max(length, 1))


class _ToGrid:
    """Rounds one column [O] at a time, in one buffer: what `grids.encode` and `decode` give, bit for bit.

    They would make eight tensors for each of a layer's thousands of columns.
    """

    def __init__(self, scale_OG: Tensor, zero_point_OG: Tensor, rows: int, grid: Grid) -> None:
        self.scale_GO = scale_OG.expand(rows, -1).t().contiguous()
        self.inverse_GO = self.scale_GO.reciprocal()
        self.grid, self.asymmetric = grid, isinstance(grid, Int) and not grid.symmetric
        self.zero_point_GO = zero_point_OG.expand(rows, -1).t().to(scale_OG.dtype).contiguous()
        self.buffer = torch.empty_like(self.scale_GO[0])

    def __call__(self, column_O: Tensor, group: int, q_O: Tensor) -> Tensor:
        """The rounded column, until the next call; its integers go into `q_O`."""
        scale = self.scale_GO[group]
        if isinstance(self.grid, NF4):
            q_O.copy_(grids.encode(column_O, scale, 0, self.grid))
            return grids.decode(q_O, scale, 0, self.grid)
        qmin, qmax, offset = grids.limits(self.grid)
        u = torch.mul(column_O, self.inverse_GO[group], out=self.buffer)
        if offset:
            u.sub_(offset)
        u.round_()
        if self.asymmetric:
            u.add_(self.zero_point_GO[group])
        q_O.copy_(u.clamp_(qmin, qmax))
        if self.asymmetric:
            u.sub_(self.zero_point_GO[group])
        if offset:
            u.add_(offset)
        return u.mul_(scale)
