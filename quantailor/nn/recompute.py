"""Linear layers on a packed weight that keep no float copy of it: not between calls, and not for backward.

torch's own linear layer saves its weight for the gradient of the input, so a weight that is dequantized for the call
would live on in float until backward. Here backward makes it anew, and both directions make it a run of rows at a
time: the float numbers that exist at once are those of one run, whatever the layer's size. Axes: T tokens, O out, N in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from quantailor.kernels.ops import IntegerInput, IntegerWeight, int_linear
from quantailor.nn.int_forward import output_dtype, product_in_use

_WEIGHTS_AT_ONCE = {"cpu": 2**16}  # 256 KiB of float32 stay in the cache; a GPU wants more to do at a time
_ON_OTHERS = 2**24


def runs(out_features: int, in_features: int, device: torch.device) -> list[slice]:
    """The rows of a weight [O, N] that are made at once. Depends on the shape alone, so that each pass over a weight,
    and its merge, computes the very same bits."""
    size = max(1, _WEIGHTS_AT_ONCE.get(device.type, _ON_OTHERS) // max(1, in_features))
    return [slice(start, min(start + size, out_features)) for start in range(0, out_features, size)]


Rows = Callable[[slice], IntegerWeight | Tensor]  # rows of a weight: integers with scales, or float32 [n, N]


@dataclass(frozen=True)
class Kept:
    """An integer input as backward keeps it, tensor by tensor, so that checkpointing sees each."""

    group_size: int | None
    present: tuple[bool, ...]

    @staticmethod
    def of(x: IntegerInput | None) -> tuple[Kept | None, tuple[Tensor, ...]]:
        if x is None:
            return None, ()
        parts = (x.q, x.scale, x.columns, x.values)
        return Kept(x.group_size, tuple(p is not None for p in parts)), tuple(p for p in parts if p is not None)

    def back(self, tensors: tuple[Tensor, ...]) -> IntegerInput:
        rest = iter(tensors)
        q, scale, columns, values = (next(rest) if there else None for there in self.present)
        assert q is not None and scale is not None
        return IntegerInput(q, scale, self.group_size, columns, values)


def multiplied(
    x: Tensor, x_int: IntegerInput | None, rows: Rows, bias: Tensor | None, parts: list[slice], out_features: int
) -> Tensor:
    """y [..., O] = x @ w^T + bias, a run of rows at a time; on integers where `rows` gives integers."""
    left = x if x_int is None else None
    dtype = output_dtype(x)
    y = None if len(parts) == 1 else x.new_empty((*x.shape[:-1], out_features), dtype=dtype)
    for part in parts:
        weight, some_bias = rows(part), None if bias is None else bias[part]
        if isinstance(weight, IntegerWeight):
            assert x_int is not None
            with torch.autocast(x.device.type, enabled=False):  # an integer sum is not to be rounded to bfloat16
                one = int_linear(x_int, weight, some_bias, product_in_use(), dtype)
        else:
            if left is None:
                assert x_int is not None
                left = x_int.dequantize().to(x.dtype)
            one = F.linear(left, weight.to(left.dtype), None if some_bias is None else some_bias.to(left.dtype))
        if y is None:
            return one
        y[..., part] = one
    assert y is not None
    return y


def values(weight: IntegerWeight | Tensor) -> Tensor:
    """float32 [n, N]."""
    return weight.dequantize() if isinstance(weight, IntegerWeight) else weight


class InputGradient:
    """dx = dy w, summed over runs of rows: in the gradient's type, in float32 where there are several runs."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, grad: Tensor, weight: Tensor) -> None:
        part = grad @ weight.to(grad.dtype)
        if self.total is None:
            self.total = part
            return
        if self.total.dtype != torch.float32:
            self.total = self.total.float()
        self.total += part


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, bias: Tensor | None, x_int: IntegerInput | None, rows: Rows, parts: list[slice]
    ) -> Tensor:
        ctx.rows, ctx.parts, ctx.x_dtype = rows, parts, x.dtype  # type: ignore[attr-defined]
        return multiplied(x, x_int, rows, bias, parts, parts[-1].stop)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        grad_x = InputGradient()
        for part in ctx.parts:  # type: ignore[attr-defined]
            grad_x.add(grad[..., part], values(ctx.rows(part)))  # type: ignore[attr-defined]
        assert grad_x.total is not None
        return grad_x.total.to(ctx.x_dtype), None, None, None, None  # type: ignore[attr-defined]


def frozen_linear(
    x: Tensor,
    x_int: IntegerInput | None,
    rows: Rows,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
) -> Tensor:
    """y [..., O] with a gradient for `x` [..., N] alone, and nothing but the packed weight kept for it.

    `x` carries the gradient (straight-through) where `x_int` are its integers. `bias` does not train.
    """
    return _Frozen.apply(x, bias, x_int, rows, runs(out_features, in_features, x.device))
