"""MagR: before rounding, lower each row's (or group's) largest weight as far as the layer's output hardly notices.

    min over w of   1/2 ||X (w - w_0)||^2 + alpha * sum over groups of ||w_g||_inf        each output row w alone

with X scaled so that the largest eigenvalue of H = X^T X is 1. By proximal gradient steps of length 1:

    v = w - H (w - w_0),   w <- prox(v) = v - alpha * (projection of v / alpha onto the l1 ball)      Algorithm 1

which clips v at the height where what is cut off sums to alpha. A smaller range means smaller steps of the grid that is
found next. `momentum` makes the same steps from an extrapolated point (Beck & Teboulle 2009, FISTA), each row starting
over where its objective would rise (O'Donoghue & Candes 2012): a few steps go as far as many plain ones.
Source: Zhang et al. 2024, arXiv:2406.00800, Eq. 3-5 and Algorithm 1; alpha 0.001 for rows, 0.0001 for groups, 150 to
200 steps, as its authors run it.
Axes: O = out_features, N = in_features, G = groups a row.   Time: O(O N^2) a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantailor.numerics.grouping import from_groups, to_groups
from quantailor.ptq.method import Report
from quantailor.ptq.statistics import Statistics
from quantailor.spec import QuantSpec

_ROWS = 256  # rows at once: they do not know of each other, and this many stay in a processor's cache


@dataclass(frozen=True)
class MagR:
    """A part for `method=`: `magr+gptq`. A grid with one scale a tensor is treated as one with a scale a row."""

    alpha: float = 1e-3  # where a row shares a scale; in units of the weight, since H is scaled to 1
    group_alpha: float = 1e-4  # where a group does
    iterations: int = 40
    momentum: bool = True  # False: the plain steps of the paper; 150 to 200 of those come about as far
    needs_hessian: bool = True

    def before(self, weight_ON: Tensor, statistics: Statistics | None, spec: QuantSpec) -> tuple[Tensor, Report]:
        """The weight to round instead, in its dtype; the same one, and why, without usable data."""
        if statistics is None or statistics.hessian is None or statistics.importance is None:
            return weight_ON, {"magr": {"skipped": "no calibration data reached it"}}
        if not bool(torch.isfinite(statistics.hessian).all()):
            return weight_ON, {"magr": {"skipped": "H is not finite"}}
        alpha = self.alpha if spec.group_size is None else self.group_alpha
        weight, largest = weight_ON.float(), largest_eigenvalue(statistics.hessian)
        found = self.shrink(weight, statistics.hessian / largest, alpha, spec.group_size)
        if not bool(torch.isfinite(found).all()):
            return weight_ON, {"magr": {"skipped": "a weight became infinite or NaN"}}
        old, new = (float(to_groups(w, spec.group_size).abs().amax(-1).mean()) for w in (weight, found))
        moved = found - weight
        cost, whole = (((w @ statistics.hessian) * w).sum().clamp(min=0) for w in (moved, weight))
        lines: dict[str, Any] = {
            "alpha": alpha,
            "iterations": self.iterations,
            "range": new / old if old > 0 else 1.0,  # mean largest magnitude of a group, of what it was
            "output_change": float((cost / whole).sqrt()) if whole > 0 else 0.0,
        }
        return found.to(weight_ON.dtype), {"magr": lines}

    def shrink(self, weight_ON: Tensor, hessian_NN: Tensor, alpha: float, group_size: int | None) -> Tensor:
        """`iterations` steps of Algorithm 1; `hessian_NN` has no eigenvalue above 1. Returns float [O, N]."""
        parts = weight_ON.split(_ROWS)
        return torch.cat([self._shrink(rows, hessian_NN, alpha, group_size) for rows in parts])

    def _shrink(self, start: Tensor, hessian_NN: Tensor, alpha: float, group_size: int | None) -> Tensor:
        w = start
        product = torch.zeros_like(w)  # (w - w_0) H
        ahead, ahead_product = w, product  # the point each step starts from
        value = objective(w - start, product, w, alpha, group_size)
        clock = torch.ones(len(w), 1, dtype=w.dtype, device=w.device)
        for _ in range(self.iterations):
            new = prox_largest(ahead - ahead_product, alpha, group_size)
            new_product = (new - start) @ hessian_NN
            new_value = objective(new - start, new_product, new, alpha, group_size)
            if not self.momentum:
                w, product, value = new, new_product, new_value
                ahead, ahead_product = new, new_product
                continue
            falls = (new_value <= value)[:, None]
            later = (1 + (1 + 4 * clock.square()).sqrt()) / 2
            push = torch.where(falls, (clock - 1) / later, 0.0)
            # A row that would rise keeps its place and starts over with a plain step.
            new, new_product = torch.where(falls, new, w), torch.where(falls, new_product, product)
            ahead, ahead_product = new + push * (new - w), new_product + push * (new_product - product)
            w, product, value = new, new_product, torch.where(falls[:, 0], new_value, value)
            clock = torch.where(falls, later, 1.0)
        return w


def objective(moved_ON: Tensor, product_ON: Tensor, w_ON: Tensor, alpha: float, group_size: int | None) -> Tensor:
    """1/2 d H d + alpha * sum of the groups' largest magnitudes, a row: [O], with d = w - w_0 and its product d H."""
    quadratic = (moved_ON * product_ON).sum(-1) / 2
    return quadratic + alpha * to_groups(w_ON, group_size).abs().amax(-1).sum(-1)


def prox_largest(v_ON: Tensor, alpha: float, group_size: int | None = None) -> Tensor:
    """argmin over w of 1/2 ||w - v||^2 + alpha * sum over groups of ||w_g||_inf, for each row. [O, N] -> [O, N]

    Clips each group at the height t where sum(max(|v| - t, 0)) = alpha, at 0 if all of it sums to less. The sum is
    convex in t: Newton's steps from below never pass the root, and end on it after finitely many.
    """
    groups = to_groups(v_ON, group_size)
    size = groups.abs()
    height = (size.amax(-1, keepdim=True) - alpha).clamp(min=0)  # the largest alone is cut by no more than alpha
    while True:
        count = (size > height).sum(-1, keepdim=True).clamp(min=1)
        over = (size - height).clamp_(min=0).sum(-1, keepdim=True)
        better = height + ((over - alpha) / count).clamp(min=0)
        if not bool((better > height).any()):
            return from_groups(groups.clamp(-height, height), v_ON.shape[-1])
        height = better


def largest_eigenvalue(hessian_NN: Tensor, steps: int = 100) -> float:
    """By power iteration from the heaviest column: a little below the true one. Steps of up to twice 1 / it descend."""
    v = hessian_NN[:, hessian_NN.diagonal().argmax()].clone()
    for _ in range(steps):
        v = hessian_NN @ (v / v.norm())
    return float(v.norm())
