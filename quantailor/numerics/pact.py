"""PACT: the clipping level of an activation is learned, the rounding is straight through.

    x_hat           = clip(round(x / scale), qmin, qmax) * scale,   levels alpha+ = qmax * scale, alpha- = qmin * scale
    d x_hat/d x     = 1 where alpha- < x < alpha+,  0 elsewhere
    d x_hat/d alpha = 1 where x is clipped,         0 elsewhere

so that d x_hat/d scale is qmax above, qmin below and 0 inside: unlike LSQ's it says nothing about rounding. The loss
gets an L2 term on alpha besides. Kept as the baseline that LSQ is measured against.
Source: Choi et al. 2018, arXiv:1805.06085, Eq. 1-3; there for ReLU, whose lower level is 0, here for both sides.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class _PACT(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        steps = x * scale.reciprocal()
        above, below = steps >= qmax, steps <= qmin
        ctx.save_for_backward(above, below)
        ctx.scale_shape, ctx.limits = scale.shape, (qmin, qmax)  # type: ignore[attr-defined]
        return torch.round(steps).clamp_(qmin, qmax) * scale

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grad_outputs
        above, below = ctx.saved_tensors  # type: ignore[attr-defined]
        qmin, qmax = ctx.limits  # type: ignore[attr-defined]
        grad_scale = (grad * (above * qmax + below * qmin)).sum_to_size(ctx.scale_shape)  # type: ignore[attr-defined]
        return grad * ~(above | below), grad_scale, None, None


def pact(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Fake-quantize `x` with PACT's gradients. Shapes: `x` [*]; `scale` broadcastable to [*]. Integers as `lsq`'s."""
    return _PACT.apply(x, scale, qmin, qmax)
