"""The training forward computes what serving will: the product of integers, scales afterwards.

Backward is the linear layer's own, on the fake-quantized tensors: straight-through, as if the forward had multiplied
them. Forward values therefore have the packed layer's bits, instead of a float sum that rounds activations
differently one layer further down.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from quantailor.kernels.ops import IntegerInput, IntegerWeight, float_matmul, int_linear


class _IntegerForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_hat: Tensor,
        w_hat: Tensor,
        bias: Tensor | None,
        x: IntegerInput,
        weight: IntegerWeight,
    ) -> Tensor:
        ctx.save_for_backward(x_hat, w_hat)
        ctx.has_bias = bias is not None  # type: ignore[attr-defined]
        with torch.autocast(x_hat.device.type, enabled=False):  # an integer sum is not to be rounded to bfloat16
            return int_linear(x, weight, bias, matmul=float_matmul).to(x_hat.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x_hat, w_hat = ctx.saved_tensors  # type: ignore[attr-defined]
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ w_hat.to(grad.dtype) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        grad_w = flat.t() @ x_hat.reshape(-1, x_hat.shape[-1]).to(grad.dtype) if ctx.needs_input_grad[1] else None  # type: ignore[attr-defined]
        grad_bias = flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None  # type: ignore[attr-defined]
        return grad_x, grad_w, grad_bias, None, None


def integer_forward(
    x_hat: Tensor, w_hat: Tensor, bias: Tensor | None, x: IntegerInput, weight: IntegerWeight
) -> Tensor:
    """y = x_hat @ w_hat^T + bias, computed from integers. Shapes: `x_hat` [..., N], as `x` says it; `w_hat` [O, N].

    Columns of `x` that are kept in float are part of `x_hat`: the gradient is that of both products together.
    """
    return _IntegerForward.apply(x_hat, w_hat, bias, x, weight)
