"""The training forward computes what serving will: the product of integers, scales afterwards.

    forward   y = s_x s_w (x_q w_q^T) + b       on integers, exactly the packed layer's bits
    backward  dx = (dy s_w) w_q,  dw_hat = (dy s_x)^T x_q,  db = sum_t dy

Backward is the linear layer's own, on the fake-quantized tensors: straight-through, as if the forward had multiplied
them. `integer_linear` keeps only the input's int8 copy for it, a quarter of what a plain layer keeps, and makes the
weight's anew; a GPU keeps both. In bfloat16 (the default of training, `set_backward`) the integers are exact and the
scales are folded into the gradient, which is rounded once, as autocast does; a GPU rounds the other factor, times its
scale, instead. In float32 the gradients are those of the simulated layer to the order of adding. `integer_forward` is
the general form, for inputs with columns in float or with groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from quantailor.kernels import passes
from quantailor.kernels.ops import IntegerInput, IntegerWeight, float_matmul, int_linear

_independent: ContextVar[bool] = ContextVar("independent", default=False)


@contextmanager
def float_products() -> Iterator[None]:
    """Within: integers are multiplied by exact float sums, so that a proof of parity does not rest on one kernel."""
    token = _independent.set(True)
    try:
        yield
    finally:
        _independent.reset(token)


def product_in_use() -> Callable[[Tensor, Tensor], Tensor] | None:
    """The product to use: None is the fastest there is."""
    if torch.compiler.is_compiling():  # which cannot look at a context variable, and proofs are not compiled
        return None
    return float_matmul if _independent.get() else None


def output_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer answers `x` with: autocast's type inside autocast, else the input's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


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
        return int_linear(x, weight, bias, product_in_use(), output_dtype(x_hat))

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x_hat, w_hat = ctx.saved_tensors  # type: ignore[attr-defined]
        flat = grad.reshape(-1, grad.shape[-1])
        need_x, need_w, need_b = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        grad_x = (grad @ w_hat.to(grad.dtype)).to(x_hat.dtype) if need_x else None
        grad_w = (flat.t() @ x_hat.reshape(-1, x_hat.shape[-1]).to(grad.dtype)).to(w_hat.dtype) if need_w else None
        grad_bias = flat.sum(0) if ctx.has_bias and need_b else None  # type: ignore[attr-defined]
        return grad_x, grad_w, grad_bias, None, None


def integer_forward(
    x_hat: Tensor, w_hat: Tensor, bias: Tensor | None, x: IntegerInput, weight: IntegerWeight
) -> Tensor:
    """y = x_hat @ w_hat^T + bias, computed from integers. Shapes: `x_hat` [..., N], as `x` says it; `w_hat` [O, N].

    Columns of `x` that are kept in float are part of `x_hat`: the gradient is that of both products together.
    """
    return _IntegerForward.apply(x_hat, w_hat, bias, x, weight)


@dataclass(frozen=True)
class WeightGrid:
    """A uniform grid as the passes take it; zero points are apart. `g`: LSQ's gradient scale."""

    offset: float
    stretch: float
    g: float
    qmin: int
    qmax: int
    group_size: int | None


class _IntegerLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        x_q: Tensor,
        x_scale: Tensor,
        zero_point: Tensor | None,
        grid: WeightGrid,
        in_bf16: bool,
    ) -> Tensor:
        size = passes.groups_of(weight.shape[1], grid.group_size)[0]
        w = weight.float()
        w_q = passes.quantize_weight(w, scale, zero_point, grid.offset, grid.qmin, grid.qmax, size)
        kept = w_q if w_q.is_cuda and in_bf16 else None  # a byte a weight there, for half the bytes of backward's pass
        ctx.save_for_backward(weight, scale, x_q, x_scale, zero_point, kept)  # type: ignore[arg-type]
        ctx.grid, ctx.size, ctx.in_bf16 = grid, size, in_bf16  # type: ignore[attr-defined]
        ctx.has_bias, ctx.x_dtype = bias is not None, x.dtype  # type: ignore[attr-defined]
        integers = IntegerWeight(w_q, scale, _shift(grid, zero_point, scale), grid.group_size)
        return int_linear(IntegerInput(x_q, x_scale), integers, bias, product_in_use(), output_dtype(x))

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, x_q, x_scale, zero_point, w_q = ctx.saved_tensors  # type: ignore[attr-defined]
        grid, size = ctx.grid, ctx.size  # type: ignore[attr-defined]
        need_x, need_w, need_s, need_b = ctx.needs_input_grad[:4]  # type: ignore[attr-defined]
        grad = grad_outputs[0].reshape(-1, weight.shape[0])
        grad_bias = grad.sum(0, dtype=torch.float32) if ctx.has_bias and need_b else None  # type: ignore[attr-defined]
        rows = x_q.reshape(-1, x_q.shape[-1])
        needed = (need_x, need_w or need_s)  # a frozen layer needs no product for its weight, the lowest one none for x
        grad_x: Tensor | None = None
        grad_w: Tensor | None = None
        kind = grad.device.type
        exact = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with exact:
            if ctx.in_bf16:  # type: ignore[attr-defined]
                if w_q is None:
                    numbers = (grid.offset, grid.qmin, grid.qmax, size)
                    w_q = passes.quantize_weight(weight.float(), scale, zero_point, *numbers)
                parts = (grad, w_q, scale, zero_point, rows, x_scale, grid, ctx.x_dtype)  # type: ignore[attr-defined]
                grad_x, grad_w = (_products_bf16 if all(needed) else _one_product_bf16)(*parts, needed)
            else:
                if need_x:
                    numbers = (grid.offset, grid.qmin, grid.qmax, size)
                    w_hat = passes.fake_quantize_weight(weight.float(), scale, zero_point, *numbers)
                    grad_x = grad.float() @ w_hat
                if needed[1]:
                    grad_w = grad.float().t() @ (rows * x_scale.float().reshape(-1, 1))
            grads: tuple[Tensor | None, Tensor | None] = (None, None)
            if grad_w is not None:
                grads = _lsq_backward(weight, grad_w, scale, zero_point, grid)
        of_x = None if grad_x is None else grad_x.to(ctx.x_dtype).reshape(x_q.shape)  # type: ignore[attr-defined]
        return of_x, *grads, grad_bias, None, None, None, None, None


def _shift(grid: WeightGrid, zero_point: Tensor | None, scale: Tensor) -> Tensor | None:
    """[O, G] = offset - zero_point; None where that is 0 everywhere."""
    if zero_point is not None:
        return grid.offset - zero_point.float()
    return torch.full_like(scale, grid.offset) if grid.offset else None


def _products_bf16(
    grad: Tensor,
    w_q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    x_q: Tensor,
    x_scale: Tensor,
    grid: WeightGrid,
    dtype: torch.dtype,
    needed: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """(dx [T, N] in `dtype`, dw_hat [O, N] in bfloat16). Integers up to 256 are exact in bfloat16, so only the gradient
    is rounded; the weight of a grouped or shifted grid is rounded as well, as autocast would. On a GPU, whose integers
    have to be turned into bfloat16 first, scales are multiplied into them instead: no pass over the gradient."""
    factor, w_scale = _factor(w_q, scale, zero_point, grid)
    products: tuple[Tensor, Tensor] = passes.gradient_products(grad, factor, w_scale, x_q, x_scale.reshape(-1), dtype)
    return products


def _one_product_bf16(
    grad: Tensor,
    w_q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    x_q: Tensor,
    x_scale: Tensor,
    grid: WeightGrid,
    dtype: torch.dtype,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """`_products_bf16` where only one of the two is asked for (or none), to the same bits."""
    grad_x = grad_w = None
    if grad.device.type != "cpu":  # scales go into the other factor there
        grad = grad.to(torch.bfloat16)
        if needed[0]:
            grad_x = (grad @ passes.scaled_bf16(*_factor(w_q, scale, zero_point, grid))).to(dtype)
        return grad_x, grad.t() @ passes.scaled_bf16(x_q, x_scale) if needed[1] else None
    if needed[0]:
        factor, w_scale = _factor(w_q, scale, zero_point, grid)
        folded = grad.float() if w_scale is None else grad.float() * w_scale
        grad_x = (folded.to(torch.bfloat16) @ factor.to(torch.bfloat16)).to(dtype)
    if needed[1]:
        folded = (grad.float() * x_scale.reshape(-1, 1)).t().to(torch.bfloat16)
        grad_w = folded.contiguous() @ passes.int8_to_bf16(x_q)
    return grad_x, grad_w


def _factor(w_q: Tensor, scale: Tensor, zero_point: Tensor | None, grid: WeightGrid) -> tuple[Tensor, Tensor | None]:
    """(what a gradient is multiplied by for dx, the scales that are folded into the gradient before, or None)."""
    shift = _shift(grid, zero_point, scale)
    if scale.shape[1] == 1 and shift is None:
        return w_q, scale.expand(w_q.shape[0], 1).reshape(-1)
    return IntegerWeight(w_q, scale, shift, grid.group_size).dequantize(), None


def integer_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_int: IntegerInput,
    zero_point: Tensor | None,
    grid: WeightGrid,
    in_bf16: bool,
) -> Tensor:
    """y [..., O] of the integers of `x` [..., N] and of `weight` [O, N] on the grid of `scale` [O, G] (LSQ gradients).

    `x` only carries the gradient: itself where its scale is dynamic, its fake-quantized self where it is learned. A
    scale a tensor comes expanded to rows. `x_int` without groups and without columns in float.
    """
    return _IntegerLinear.apply(x, weight, scale, bias, x_int.q, x_int.scale, zero_point, grid, in_bf16)


def set_backward(model: nn.Module, dtype: torch.dtype) -> None:
    """In which type integer layers multiply their gradients: torch.bfloat16 or torch.float32."""
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"gradients are multiplied in bfloat16 or float32, not {dtype}")
    for module in model.modules():
        if hasattr(module, "backward_in_bf16"):
            module.backward_in_bf16 = dtype == torch.bfloat16  # type: ignore[assignment]


class _SimulatedLinear(torch.autograd.Function):
    """F.linear with `fake_quantized_weight`, made again for backward: kept, it would take as much memory as the weight
    itself, and one pass is cheap beside a product."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
        grid: WeightGrid,
    ) -> Tensor:
        dtype = output_dtype(x)
        ctx.x_dtype, ctx.has_bias, ctx.grid = x.dtype, bias is not None, grid  # type: ignore[attr-defined]
        x = x.to(dtype)
        ctx.save_for_backward(x, weight, scale, zero_point)  # type: ignore[arg-type]
        w_hat = _weight_on_grid(weight, scale, zero_point, grid)
        return F.linear(x, w_hat.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, zero_point = ctx.saved_tensors  # type: ignore[attr-defined]
        grid: WeightGrid = ctx.grid  # type: ignore[attr-defined]
        need_x, need_w, need_s, _, need_b = ctx.needs_input_grad[:5]  # type: ignore[attr-defined]
        grad = grad_outputs[0].reshape(-1, weight.shape[0])
        grad_x = grad_weight = grad_scale = None
        if need_x:
            w_hat = _weight_on_grid(weight, scale, zero_point, grid).to(x.dtype)
            grad_x = (grad @ w_hat).to(ctx.x_dtype).reshape(x.shape)  # type: ignore[attr-defined]
        if need_w or need_s:
            of_w_hat = grad.t() @ x.reshape(-1, x.shape[-1])
            grad_weight, grad_scale = _lsq_backward(weight, of_w_hat, scale, zero_point, grid)
        grad_bias = grad.sum(0) if ctx.has_bias and need_b else None  # type: ignore[attr-defined]
        return grad_x, grad_weight, grad_scale, None, grad_bias, None


def simulated_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, grid: WeightGrid
) -> Tensor:
    """y [..., O] = x [..., N] times `weight` [O, N] on the grid of `scale` [O, G], in x's or autocast's type, by LSQ's
    gradients: the bits of F.linear with `fake_quantized_weight`. x and the weight are kept for backward."""
    return _SimulatedLinear.apply(x, weight, scale, zero_point, bias, grid)


def _weight_on_grid(weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: WeightGrid) -> Tensor:
    size = passes.groups_of(weight.shape[1], grid.group_size)[0]
    numbers = (grid.offset, grid.qmin, grid.qmax, size)
    w_hat: Tensor = passes.fake_quantize_weight(weight.float(), scale, zero_point, *numbers)
    return w_hat.to(weight.dtype)


def _lsq_backward(
    weight: Tensor, grad: Tensor, scale: Tensor, zero_point: Tensor | None, grid: WeightGrid
) -> tuple[Tensor, Tensor]:
    """(of the weight, of its scale), of the gradient `grad` [O, N] of the weight on its grid."""
    size = passes.groups_of(weight.shape[1], grid.group_size)[0]
    numbers = (grid.offset, grid.stretch, grid.g, grid.qmin, grid.qmax, size)
    grad_w, grad_scale = passes.lsq_backward(weight.float(), grad, scale, zero_point, *numbers)
    return grad_w.to(weight.dtype), grad_scale


class _FakeQuantizedWeight(torch.autograd.Function):
    """numerics.lsq in one pass each way; only the weight itself and its scale are kept for backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: WeightGrid) -> Tensor:
        ctx.save_for_backward(weight, scale, zero_point)  # type: ignore[arg-type]
        ctx.grid = grid  # type: ignore[attr-defined]
        return _weight_on_grid(weight, scale, zero_point, grid)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero_point = ctx.saved_tensors  # type: ignore[attr-defined]
        return *_lsq_backward(weight, grad_outputs[0], scale, zero_point, ctx.grid), None, None  # type: ignore[attr-defined]


def fake_quantized_weight(weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: WeightGrid) -> Tensor:
    """`weight` [O, N] on the grid of `scale` [O, G], with LSQ's gradients; the same bits as `numerics.lsq.lsq`."""
    return _FakeQuantizedWeight.apply(weight, scale, zero_point, grid)
