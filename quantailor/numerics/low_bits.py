"""Weights of 1 and 1.58 bits whose scale follows them: found anew at each forward, never learned.

    ternary   gamma = mean |w|,  w_hat = gamma * clip(round(w / gamma), -1, 1)      d w_hat/d w = 1
    binary    alpha = mean |w|,  w_hat = alpha * sign(w)        d w_hat/d w = 1/n + alpha * [|w| <= 1]

Sources: BitNet b1.58, Ma et al. 2024, arXiv:2402.17764, Eq. 1-3 (ternary; the gradient is the plain straight-through
one of BitNet, arXiv:2310.11453, section 2.2); XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279, Eq. 4-6 and
section 3.1 (binary; n = elements that share alpha). The papers have one scale a matrix or a filter; here it is one a
scale of the spec: a tensor, an output row, or a group.
Shapes: a weight in groups [O, G, g], padded by zeros; `count` elements of each group that are none, [G, 1] or a number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from quantailor.numerics import grids
from quantailor.spec import Binary, Ternary

_TINY = torch.finfo(torch.float32).tiny  # the scale of zeros on a grid without a level 0


def magnitude_scale(w_OGg: Tensor, count: Tensor | int, grid: Ternary | Binary) -> Tensor:
    """The scale float32 [O, G, 1] of the grid that mean |w| makes: gamma itself, or 2 alpha (binary levels are half
    steps). Groups of zeros get 1, or the smallest there is where 0 is no level."""
    mean = w_OGg.abs().sum(-1, keepdim=True, dtype=torch.float64) / count
    scale = (mean if isinstance(grid, Ternary) else 2 * mean).clamp(max=torch.finfo(torch.float32).max).float()
    none = torch.full_like(scale, 1.0 if isinstance(grid, Ternary) else _TINY)
    return torch.where(torch.isfinite(scale.reciprocal()), scale, none)


def ternary(w_OGg: Tensor, scale: Tensor) -> Tensor:
    """`w` on the levels -1, 0, 1 times `scale` [O, G, 1]; the gradient passes as if nothing had been done."""
    w = w_OGg.detach()
    return w_OGg + (grids.decode(grids.encode(w, scale, 0, Ternary()), scale, 0, Ternary()) - w)


class _XNOR(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, w: Tensor, scale: Tensor, count: Tensor | int) -> Tensor:
        slope = torch.where(w.abs() <= 1, scale / 2, torch.zeros_like(scale)) + torch.ones_like(scale) / count
        ctx.save_for_backward(slope)
        return grids.decode(grids.encode(w, scale, 0, Binary()), scale, 0, Binary())

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_outputs[0] * slope, None, None


def xnor(w_OGg: Tensor, scale: Tensor, count: Tensor | int) -> Tensor:
    """`w` as alpha * sign(w), where `scale` [O, G, 1] is 2 alpha, with the gradient of XNOR-Net."""
    return _XNOR.apply(w_OGg, scale, count)
