"""First scales of a weight: min-max, or the clip ratio of least (importance-weighted) squared error.

The importance h_j of input channel j is the mean of x_j^2 over the calibration rows, the diagonal of X^T X / rows:
the error of the layer's *output* is sum_j h_j (w_j - w_hat_j)^2 as far as inputs are uncorrelated. Without data h = 1.
Each group searches its own ratio. Axes: O out, N in, G groups a row, g group size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantailor.numerics import affine, grids
from quantailor.numerics.grouping import to_groups
from quantailor.spec import NF4, Balanced, Binary, Int, PerTensor, QuantSpec, Ternary

# Ratios of the min-max range that are tried. At 2 bits the best one is often below a half, at 8 bits near 1.
_RATIOS = tuple(1.0 - 0.0125 * i for i in range(64))
_TINY = torch.finfo(torch.float32).tiny  # the scale of zeros on a grid without a level 0
_CHUNK = 1 << 16  # weights searched at once


def weight_scale(weight_ON: Tensor, spec: QuantSpec, importance_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale float32 [O, G, 1] and zero point int32 [O, G, 1] for a weight; [1, 1, 1] if per tensor.

    `importance_N` weighs the error of each input channel; None = all alike. Groups that are all zero get scale 1; on a
    grid without 0 the smallest there is.
    Raises: ValueError where the weight holds NaN or Inf.
    """
    weight_ON = weight_ON.detach().float()
    if not bool(torch.isfinite(weight_ON).all()):
        raise ValueError("its weight holds NaN or Inf, which have no place on a grid; start from a sound copy")
    h_N = torch.ones_like(weight_ON[0]) if importance_N is None else importance_N.to(weight_ON)
    if isinstance(spec.granularity, PerTensor):
        weight_ON, h_N = weight_ON.reshape(1, -1), h_N.repeat(weight_ON.shape[0])
    w, h = to_groups(weight_ON, spec.group_size), to_groups(h_N[None], spec.group_size)
    count = to_groups(torch.ones_like(h_N)[None], spec.group_size).sum(-1, keepdim=True)  # padding is no element
    scale, zero_point = _search(w, h, count, spec)
    return affine.checked_scale(scale).contiguous(), zero_point.contiguous()


def _search(w: Tensor, h: Tensor, count: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    grid = spec.grid
    none = torch.zeros_like(w[..., :1], dtype=torch.int32)
    if isinstance(grid, NF4):
        return _safe(w.abs().amax(-1, keepdim=True)), none
    if isinstance(grid, Ternary):  # BitNet b1.58, arXiv:2402.17764, Eq. 3: gamma = mean |W|
        return _safe(w.abs().sum(-1, keepdim=True, dtype=torch.float64) / count), none
    if isinstance(grid, Binary):  # XNOR-Net, arXiv:1603.05279, Eq. 6: alpha = mean |W|; levels are half steps
        return _safe(2 * w.abs().sum(-1, keepdim=True, dtype=torch.float64) / count, zero=_TINY), none
    scale, zero_point = _candidate(w, grid, 1.0)
    if spec.range == "minmax":
        return scale, zero_point
    rows = max(1, _CHUNK // (w.shape[1] * w.shape[2]))  # a chunk's passes stay in the cache
    for start in range(0, len(w), rows):
        part = slice(start, start + rows)
        scale[part], zero_point[part] = _best(w[part], h, grid, scale[part], zero_point[part])
    return scale, zero_point


def _best(w: Tensor, h: Tensor, grid: Int | Balanced, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """The candidate of least error for each group; the first, largest range where several are alike."""
    least = _error(w, h, scale, zero_point, grid)
    for ratio in _RATIOS[1:]:
        new_scale, new_zero_point = _candidate(w, grid, ratio)
        error = _error(w, h, new_scale, new_zero_point, grid)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, new_scale, scale)
        zero_point = torch.where(better, new_zero_point, zero_point)
    return scale, zero_point


def _candidate(w: Tensor, grid: Int | Balanced, ratio: float) -> tuple[Tensor, Tensor]:
    low, high = w.amin(-1, keepdim=True) * ratio, w.amax(-1, keepdim=True) * ratio
    if isinstance(grid, Balanced):  # alpha = 2 steps: levels at 1/4 and 3/4 of it
        return _safe(torch.maximum(-low, high) / 2, zero=_TINY), torch.zeros_like(low, dtype=torch.int32)
    return affine.scale_zero_point(low, high, grid.qmin, grid.qmax, grid.symmetric)


def _error(w: Tensor, h: Tensor, scale: Tensor, zero_point: Tensor, grid: Int | Balanced) -> Tensor:
    """sum_j h_j (w_j - w_hat_j)^2 a group, in place on one buffer: `grids.encode` and `decode` without the integers."""
    qmin, qmax, offset = grids.limits(grid)
    w_hat = w * scale.reciprocal()
    if offset:
        w_hat.sub_(offset).round_().clamp_(qmin, qmax).add_(offset)
    else:
        w_hat.round_().add_(zero_point).clamp_(qmin, qmax).sub_(zero_point)
    return w_hat.mul_(scale).sub_(w).square_().mul_(h).sum(-1, keepdim=True)


def _safe(scale: Tensor, zero: float = 1.0) -> Tensor:
    """float32; `zero` where it is 0 or its reciprocal overflows, finite where it would overflow itself."""
    scale = scale.clamp(max=torch.finfo(torch.float32).max).float()
    return torch.where(torch.isfinite(scale.reciprocal()), scale, torch.full_like(scale, zero))
