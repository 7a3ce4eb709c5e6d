"""First scales of a weight: min-max, or a search for the least (importance-weighted) squared error.

The search rounds to a few clipped ranges and fits to each the scale that serves its integers best,

    u_j = Q(w_j / s) - z,    s* = sum_j h_j w_j u_j / sum_j h_j u_j^2,   error = sum_j h_j w_j^2 - s* sum_j h_j w_j u_j,

keeps the best and repeats rounding and fit on it (Lloyd's alternation on an affine grid: no step raises the error).
A symmetric grid has one level more below 0 than above it; at 4 bits and fewer the sign of the scale puts that level on
the side that needs it ("full range"), so a scale may be negative.

The importance h_j of input channel j is the mean of x_j^2 over the calibration rows, the diagonal of X^T X / rows:
the error of the layer's *output* is sum_j h_j (w_j - w_hat_j)^2 as far as inputs are uncorrelated. Without data h = 1.
Each group searches its own ratio. Axes: O out, N in, G groups a row, g group size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantailor.numerics import affine, grids
from quantailor.numerics.grouping import to_groups
from quantailor.numerics.low_bits import magnitude_scale
from quantailor.spec import NF4, Balanced, Binary, Int, PerTensor, QuantSpec, Ternary

_LOWEST_RATIO = {2: 0.3, 3: 0.4, 4: 0.5}  # of the min-max range: the narrowest that is tried
_NUM_RATIOS = {2: 10, 3: 10, 4: 10}  # with 5 bits and more the error jumps from range to range: 40 of them, from 0.8
_POLISH = 2  # more rounds of rounding and fit, on the best range
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
    return affine.checked_scale(scale, signed=True).contiguous(), zero_point.contiguous()


def _search(w: Tensor, h: Tensor, count: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    grid = spec.grid
    none = torch.zeros_like(w[..., :1], dtype=torch.int32)
    if isinstance(grid, NF4):
        return _safe(w.abs().amax(-1, keepdim=True)), none
    if isinstance(grid, Ternary | Binary):
        return magnitude_scale(w, count, grid), none
    scale, zero_point = _candidate(w, grid, 1.0)
    if spec.range == "minmax":
        return scale, zero_point
    rows = max(1, _CHUNK // (w.shape[1] * w.shape[2]))  # a chunk's passes stay in the cache
    for start in range(0, len(w), rows):
        part = slice(start, start + rows)
        scale[part], zero_point[part] = _best(w[part], h, grid, scale[part], zero_point[part])
    return scale, zero_point


def ratios(grid: Int | Balanced) -> list[float]:
    """The shares of the min-max range that are tried, the whole first."""
    lowest, count = _LOWEST_RATIO.get(grid.bits, 0.8), _NUM_RATIOS.get(grid.bits, 40)
    return [1 - (1 - lowest) * i / (count - 1) for i in range(count)]


def _best(w: Tensor, h: Tensor, grid: Int | Balanced, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """The best found for each group; `scale`, `zero_point`, those of the whole range, where nothing is better."""
    whole, whole_zero_point = scale, zero_point
    fit, signs = _Fit(w, h, grid), (1, -1) if grids.can_be_negative(grid) else (1,)
    most, scale = fit(scale, zero_point)
    for ratio in ratios(grid):
        for sign in signs:
            if ratio == 1 and sign == 1:
                continue  # the whole range, above
            new_scale, new_zero_point = _candidate(w, grid, ratio)
            explained, new_scale = fit(sign * new_scale, new_zero_point)
            better = explained > most
            most = torch.where(better, explained, most)
            scale = torch.where(better, new_scale, scale)
            zero_point = torch.where(better, new_zero_point, zero_point)
    for _ in range(_POLISH):
        scale = fit(scale, zero_point)[1]
    better = _error(w, h, scale, zero_point, grid) < _error(w, h, whole, whole_zero_point, grid)
    return torch.where(better, scale, whole), torch.where(better, zero_point, whole_zero_point)


class _Fit:
    """Rounds a chunk to a grid and fits the scale, in two buffers that are used again."""

    def __init__(self, w: Tensor, h: Tensor, grid: Int | Balanced) -> None:
        self.w, self.h, self.hw = w, h, h * w
        self.u, self.product = torch.empty_like(w), torch.empty_like(w)
        self.limits = grids.limits(grid)
        self.symmetric = isinstance(grid, Balanced) or grid.symmetric

    def __call__(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """(what of sum h w^2 the integers explain, the scale that serves them best), [O, G, 1] each."""
        qmin, qmax, offset = self.limits
        u = torch.mul(self.w, scale.reciprocal(), out=self.u)
        if offset:
            u.sub_(offset).round_().clamp_(qmin, qmax).add_(offset)
        elif self.symmetric:
            u.round_().clamp_(qmin, qmax)
        else:
            u.round_().add_(zero_point).clamp_(qmin, qmax).sub_(zero_point)
        top = torch.mul(u, self.hw, out=self.product).sum(-1, keepdim=True)
        bottom = torch.mul(u, u, out=self.product).mul_(self.h).sum(-1, keepdim=True)
        # A tiny divisor would make the fit infinite; scales of all-zero groups stay as they are.
        sound = (bottom > _TINY) & (top.abs() > _TINY)
        fitted = torch.where(sound, top / bottom, scale)
        sound = sound & torch.isfinite(fitted) & torch.isfinite(fitted.reciprocal())
        return torch.where(sound, top * fitted, torch.zeros_like(top)), torch.where(sound, fitted, scale)


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
