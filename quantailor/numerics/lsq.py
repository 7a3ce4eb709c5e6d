"""LSQ: the step size of a grid is learned with the weights.

    v               = x / scale - offset + zero_point
    x_hat           = (clip(round(v), qmin, qmax) - zero_point + offset) * scale
    d x_hat/d scale = x_hat/scale - x/scale  where qmin < v < qmax,  x_hat/scale  where v is clipped
    d x_hat/d x     = 1                      where qmin < v < qmax,  0            where v is clipped
and the gradient of the scale is multiplied by g = 1 / sqrt(n * qmax), n = elements that share it.

Source: Esser et al. 2020, arXiv:1902.08153, Eq. 1-3 and section 2.2 (g). `stretch` moves both limits of the gradient
outwards: by half a step for the grids of 1 to 2 bits whose range ends half a step beyond the outer level (ParetoQ,
arXiv:2502.02631, section 3.2). The scale itself is kept positive by construction elsewhere
(nn/weight_quantizer.py learns its logarithm), not by a floor that would move small layers.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def gradient_scale(num_elements: int, qmax: int) -> float:
    """g of section 2.2. For a grid without positive integers (1 bit) P counts as 1."""
    return float((num_elements * max(qmax, 1)) ** -0.5)


class _LSQ(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | int,
        qmin: int,
        qmax: int,
        offset: float,
        stretch: float,
        g: float,
    ) -> Tensor:
        steps = x * scale.reciprocal()
        shift = zero_point - offset  # integer = real steps + shift, for v and for the level alike
        level = (torch.round(steps - offset) + zero_point).clamp_(qmin, qmax) - shift
        v = steps + shift
        inside = (v > qmin - stretch) & (v < qmax + stretch)
        ctx.save_for_backward(level - steps * inside, inside)
        ctx.scale_shape, ctx.g = scale.shape, g  # type: ignore[attr-defined]
        return level * scale

    @staticmethod
    def backward(
        ctx: FunctionCtx, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None, None, None, None, None]:
        (grad,) = grad_outputs
        step_gradient, inside = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_scale = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            grad_scale = (grad * step_gradient).sum_to_size(ctx.scale_shape) * ctx.g  # type: ignore[attr-defined]
        return grad * inside, grad_scale, None, None, None, None, None, None


def lsq(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | int,
    qmin: int,
    qmax: int,
    *,
    g: float,
    offset: float = 0.0,
    stretch: float = 0.0,
) -> Tensor:
    """Fake-quantize `x` with gradients for `x` and for `scale`.

    Shapes: `x` [*]; `scale`, `zero_point` broadcastable to [*]. `g`: see `gradient_scale`. `offset` 0.5 puts the
    levels halfway between integers (balanced and binary grids). The integers are those of `grids.encode`.
    """
    return _LSQ.apply(x, scale, zero_point, qmin, qmax, offset, stretch, g)


class _LSQPlus(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, g: float
    ) -> Tensor:
        steps, integer_zero = x * scale.reciprocal(), torch.round(zero_point)
        level = (torch.round(steps) + integer_zero).clamp_(qmin, qmax) - integer_zero
        v = steps + integer_zero
        inside = (v > qmin) & (v < qmax)
        ctx.save_for_backward(level - steps * inside, inside, scale)
        ctx.zero_shape, ctx.g = zero_point.shape, g  # type: ignore[attr-defined]
        return level * scale

    @staticmethod
    def backward(
        ctx: FunctionCtx, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None, None]:
        (grad,) = grad_outputs
        step_gradient, inside, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_scale = grad_zero = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            grad_scale = (grad * step_gradient).sum_to_size(scale.shape) * ctx.g  # type: ignore[attr-defined]
        if ctx.needs_input_grad[2]:  # type: ignore[attr-defined]
            grad_zero = (grad * -scale * ~inside).sum_to_size(ctx.zero_shape) * ctx.g  # type: ignore[attr-defined]
        return grad * inside, grad_scale, grad_zero, None, None, None


def lsq_plus(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, *, g: float) -> Tensor:
    """LSQ with a learned zero point: `lsq` at round(zero_point), and a gradient for the real `zero_point` as well.

        d x_hat/d zero_point = 0 where qmin < v < qmax,  -scale where v is clipped

    times g. Bhalgat et al. learn a real offset beta of x_hat = q * scale + beta, with gradient 1 where v is clipped and
    0 elsewhere (arXiv:2004.09576, section 3.1, Eq. 3). What is stored here is an integer zero point, so the learned
    number is z = -beta / scale, rounded with a straight-through gradient as EfficientQAT does (arXiv:2407.11062,
    section 3.2): d x_hat/d z = d x_hat/d beta * d beta/d z.
    Shapes: `x` [*]; `scale`, `zero_point` (real, within qmin..qmax) broadcastable to [*].
    """
    return _LSQPlus.apply(x, scale, zero_point, qmin, qmax, g)
