"""Uniform affine quantization: the maps that every other file builds on.

    q     = clamp(round(x * (1 / scale)) + zero_point, qmin, qmax)      integers
    x_hat = (q - zero_point) * scale                                    reals

Rounding is half-to-even. The product with the reciprocal, not a division, is what torch's own fake-quantize and the
common integer kernels compute; the two differ by one step in about 1 of 10^6 values, so all of this package uses one.
The only exception is `quantize_dynamic`, which divides, as compressed-tensors does at each call.
Pure functions: no module, no state, no I/O.
Source: Nagel et al. 2021, arXiv:2106.08295, Eq. 4-7 (there on an unsigned grid).
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from quantailor.numerics.grouping import from_groups, to_groups


def checked_scale(scale: Tensor, *, signed: bool = False) -> Tensor:
    """`scale`, unchanged. Called once where a scale is made, never in a loop: on a GPU the look costs a sync.

    `signed`: a weight's, which may be negative: on a symmetric grid that turns the longer side to the positive weights.
    Raises: ValueError unless every element is finite and positive (`signed`: not 0).
    """
    sound = (scale != 0) if signed else (scale > 0)
    if not (torch.isfinite(scale) & sound).all():
        if signed:
            raise ValueError(f"scale must be finite and not 0; its smallest magnitude is {scale.abs().min():.3g}")
        raise ValueError(f"scale must be finite and positive; its minimum is {scale.min():.3g}")
    return scale


def learned_scale(base: Tensor, log_scale: Tensor) -> Tensor:
    """base * exp(log_scale), of one shape: a scale whose logarithm trains. float32, or wider if the two are.

    A model turned into half as a whole has both in half. The scale is not: the reciprocal of so short a number would
    put elements on other integers than kernels do, which take it in float32.
    """
    if base.dtype not in (torch.float32, torch.float64):
        base, log_scale = base.float(), log_scale.float()
    return base * log_scale.exp()


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, qmin: int, qmax: int) -> Tensor:
    """Map reals to the integer grid (Eq. 4).

    Shapes: `x` [*]; `scale` (units of `x`), `zero_point` broadcastable to [*]. Returns int8 [*], uint8 if qmax > 127.
    Error:  |x - dequantize(q)| <= scale / 2 where nothing is clipped.

    >>> quantize(torch.tensor([0.0, 0.26, 9.0]), torch.tensor(0.5), 0, -8, 7)
    tensor([0, 1, 7], dtype=torch.int8)
    """
    q = (torch.round(x * scale.reciprocal()) + zero_point).clamp(qmin, qmax)
    return q.to(torch.uint8 if qmax > 127 else torch.int8)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | int) -> Tensor:
    """Map integers back to reals (Eq. 6). Shapes as in `quantize`; returns scale.dtype."""
    return (q.to(scale.dtype) - zero_point) * scale


class _ClippedSTE(torch.autograd.Function):
    """Gradient 1 where the rounded value lies on the grid, 0 where it was clipped."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, zero_point: Tensor | int, qmin: int, qmax: int) -> Tensor:
        unclipped = torch.round(x * scale.reciprocal()) + zero_point
        q = unclipped.clamp(qmin, qmax)
        ctx.save_for_backward(unclipped == q)
        return (q - zero_point) * scale

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_outputs[0] * inside, None, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, qmin: int, qmax: int) -> Tensor:
    """dequantize(quantize(x)) with the clipped straight-through gradient for `x`; none for `scale`.

    Bit-identical, forward and backward, to `torch.fake_quantize_per_{tensor,channel}_affine`, and open to any
    broadcastable scale shape. Shapes as in `quantize`.
    """
    return _ClippedSTE.apply(x, scale, zero_point, qmin, qmax)


def scale_zero_point(low: Tensor, high: Tensor, qmin: int, qmax: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The scale and integer zero point that map [low, high] onto the grid; 0 is always representable.

    Symmetric: scale = max(|low|, |high|) / ((qmax - qmin) / 2), so that the far end is at most half a step outside
    (the convention of compressed-tensors). A range of width 0 gets scale 1, so that it quantizes to 0 exactly; one so
    wide that its outer level would be infinite gets the largest scale whose levels are not.
    Shapes: `low`, `high` [*], any shape. Returns scale [*] in their dtype, zero_point int32 [*].
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.maximum(-low, high) / ((qmax - qmin) / 2) if symmetric else (high - low) / (qmax - qmin)
    farthest = (qmax - qmin + 2) // 2 if symmetric else qmax - qmin + 1  # steps from 0 to the outer level, or more
    scale = scale.clamp(max=torch.finfo(scale.dtype).max / farthest)
    # A denormal range has a reciprocal that overflows: it is a zero as far as a grid is concerned.
    scale = torch.where(torch.isfinite(scale.reciprocal()), scale, torch.ones_like(scale))
    if symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    return scale, (qmin - torch.round(low / scale)).clamp(qmin, qmax).to(torch.int32)


def quantize_dynamic(x: Tensor, qmin: int, qmax: int, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric quantization with a scale found from `x` itself, one a token or one a group of a token's elements.

    Shapes: `x` [..., N]. Returns q int8 [..., N] and scale [..., G] (float32, units of `x`; G = 1 without groups, else
    ceil(N / group_size)). The scale is that of `scale_zero_point`; the largest element may be clipped by half a step,
    never by more.
    """
    groups = to_groups(x, group_size)
    largest = groups.detach().abs().amax(-1, keepdim=True).float()
    scale, _ = scale_zero_point(-largest, largest, qmin, qmax, symmetric=True)
    q = torch.round(groups.float() / scale).clamp(qmin, qmax).to(torch.int8)
    return from_groups(q, x.shape[-1]), scale.squeeze(-1)


def outlier_columns(x: Tensor, threshold: float) -> Tensor:
    """Indices [K], rising, of the columns of `x` [..., N] in which any row holds a magnitude of `threshold` or more.

    Source: Dettmers et al. 2022, arXiv:2208.07339, section 3.2, the set O.
    """
    return (x.detach().float().abs() >= threshold).reshape(-1, x.shape[-1]).any(0).nonzero().squeeze(1)


class _DynamicSTE(torch.autograd.Function):
    """The range follows the data, so the gradient is the identity: no mask, nothing kept for backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, qmin: int, qmax: int) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True).float()
        scale, _ = scale_zero_point(-largest, largest, qmin, qmax, symmetric=True)
        return ((x.float() / scale).round_().clamp_(qmin, qmax) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return grad_outputs[0], None, None


def fake_quantize_dynamic(x: Tensor, qmin: int, qmax: int) -> Tensor:
    """`quantize_dynamic` and back, in one, with an identity gradient. Shapes: `x` [..., N], returns the same."""
    return _DynamicSTE.apply(x, qmin, qmax)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, x_hat: Tensor) -> Tensor:
        return x_hat.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def straight_through(x: Tensor, x_hat: Tensor) -> Tensor:
    """The value `x_hat` with the gradient of `x`, to the last bit of both. Shapes: both [*]."""
    return _StraightThrough.apply(x, x_hat)
