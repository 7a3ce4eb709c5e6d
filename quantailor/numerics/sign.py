"""Binary activations: y = mean|x| * sign(x), a scale a token.

The gradient is the straight-through one of the sign, passed where |x| <= 1, times the token's scale held fixed.
Source: Rastegari et al. 2016, arXiv:1603.05279, Eq. 11 (K, here over the whole row) and section 3.1 (gradient).
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def quantize_sign(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [..., N] -> int8 -1 / +1 [..., N] (0 counts as +1) and scale float32 [..., 1]."""
    scale = x.detach().abs().float().mean(-1, keepdim=True)
    return torch.where(x >= 0, 1, -1).to(torch.int8), torch.where(scale > 0, scale, torch.ones_like(scale))


class _SignSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        q, scale = quantize_sign(x)
        ctx.save_for_backward(x.abs() <= 1, scale)
        return (q * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> Tensor:
        inside, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        return (grad_outputs[0] * inside * scale).to(grad_outputs[0].dtype)


def fake_quantize_sign(x: Tensor) -> Tensor:
    """`quantize_sign` and back, with its gradient."""
    return _SignSTE.apply(x)
