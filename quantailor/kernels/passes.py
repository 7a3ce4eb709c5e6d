"""The passes over memory that training with integers needs: native on a CPU and Triton's on a GPU where they can be,
torch operators otherwise.

All give the same integers and scales, bit for bit; sums of gradients differ in their order of adding. T tokens, O out,
N in, G groups a row. A weight's grid: scale [O, G], zero_point int32 [O, G] or None, offset, qmin, qmax, group_size.
"""

from __future__ import annotations

from ctypes import c_int32

import torch
from torch import Tensor

from quantailor.kernels.native import library as native
from quantailor.kernels.operators import operator
from quantailor.kernels.scratch import scratch
from quantailor.kernels.triton import library as gpu
from quantailor.numerics import affine
from quantailor.numerics.grouping import from_groups, num_groups, to_groups

_BF16 = torch.bfloat16


def _usable(*tensors: Tensor | None) -> bool:
    """Whether the native passes can work on these as they are."""
    there = [t for t in tensors if t is not None]
    return all(t.device.type == "cpu" and t.is_contiguous() for t in there) and native.library() is not None


def _fake_quantize_tokens(x: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@operator(_fake_quantize_tokens)
def quantize_tokens(x: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """numerics.affine.quantize_dynamic without groups, in one pass: x [..., N] -> q int8 [..., N], scale [..., 1].

    A token that is not finite gets the scale NaN, so that nothing after it looks sound.
    """
    x = x.detach().contiguous()
    if gpu.takes(x):
        return gpu.kernels().quantize_tokens(x, qmin, qmax)
    if not _usable(x) or x.dtype not in native.SUFFIX:
        q, scale = affine.quantize_dynamic(x, qmin, qmax)
        return q, torch.where(torch.isfinite(x.float().abs().amax(-1, keepdim=True)), scale, torch.nan)
    q = torch.empty_like(x, dtype=torch.int8)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
    length = x.shape[-1]
    rows = x.numel() // length if length else 0
    native.call(f"quantize_tokens_{native.SUFFIX[x.dtype]}", x, rows, length, c_int32(qmin), c_int32(qmax), q, scale)
    return q, scale


def quantize_values(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """numerics.affine.quantize on a symmetric grid in one pass: x float32 [*], scale [1] -> int8 [*]."""
    x = x.contiguous()
    if x.dtype != torch.float32 or not _usable(x):
        return affine.quantize(x.float(), scale, 0, qmin, qmax)
    q = torch.empty_like(x, dtype=torch.int8)
    inverse = float(scale.reciprocal())
    native.call("quantize_values_f32", x, x.numel(), inverse, c_int32(qmin), c_int32(qmax), q)
    return q


def add_norm(
    y: Tensor,
    residual: Tensor,
    norm: torch.nn.LayerNorm,
    qmin: int,
    qmax: int,
    scale: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """norm(y + residual) into `out` [T, N], and what the next product takes of it: q int8 [T, N] and its scale, the
    static `scale` [1] given or, where it is None, one found a token [T, 1]. All float32 and contiguous.
    """
    floats = {t.dtype for t in (y, residual, norm.weight, norm.bias, out)} == {torch.float32}
    if not floats or not _usable(y, residual, norm.weight, norm.bias, out):
        out.copy_(norm(y + residual))
        return (quantize_tokens(out, qmin, qmax)) if scale is None else (quantize_values(out, scale, qmin, qmax), scale)
    rows, length = y.shape
    q = torch.empty((rows, length), dtype=torch.int8)
    found = torch.empty((rows, 1)) if scale is None else scale
    parts = (norm.weight.detach(), norm.bias.detach(), float(norm.eps), out, q, None if scale is not None else found)
    inverse = 0.0 if scale is None else float(scale.reciprocal())
    native.call("add_norm_f32", y, residual, rows, length, *parts, inverse, c_int32(qmin), c_int32(qmax))
    return q, found


def _like_weight(w: Tensor, *_: object) -> Tensor:
    return torch.empty_like(w, dtype=torch.int8)


@operator(_like_weight)
def quantize_weight(
    w: Tensor, scale: Tensor, zero_point: Tensor | None, offset: float, qmin: int, qmax: int, group_size: int
) -> Tensor:
    """numerics.grids.encode of a uniform grid that fits int8: w float32 [O, N] -> q int8 [O, N]."""
    w, scale = w.detach().contiguous(), scale.float()  # of a model in bfloat16 it is not float32
    if gpu.takes(w, scale, zero_point):
        return gpu.kernels().quantize_weight(w, scale, zero_point, offset, qmin, qmax, group_size)
    if not _usable(w, scale, zero_point):
        steps = to_groups(w, group_size) * scale.unsqueeze(-1).reciprocal()
        zero = 0 if zero_point is None else zero_point.unsqueeze(-1)
        q = (torch.round(steps - offset) + zero).clamp(qmin, qmax).to(torch.int8)
        return from_groups(q, w.shape[1]).contiguous()
    q = torch.empty_like(w, dtype=torch.int8)
    limits = (c_int32(qmin), c_int32(qmax))
    native.call("quantize_weight_f32", w, *w.shape, group_size, scale, zero_point, float(offset), *limits, q)
    return q


def _like_w(w: Tensor, *_: object) -> Tensor:
    return torch.empty_like(w)


@operator(_like_w)
def fake_quantize_weight(
    w: Tensor, scale: Tensor, zero_point: Tensor | None, offset: float, qmin: int, qmax: int, group_size: int
) -> Tensor:
    """`quantize_weight` and back, float32 [O, N]: numerics.lsq forwards."""
    w, scale = w.detach().contiguous(), scale.float()  # of a model in bfloat16 it is not float32
    if gpu.takes(w, scale, zero_point):
        return gpu.kernels().fake_quantize_weight(w, scale, zero_point, offset, qmin, qmax, group_size)
    if not _usable(w, scale, zero_point):
        steps = to_groups(w, group_size) * scale.unsqueeze(-1).reciprocal()
        zero = 0 if zero_point is None else zero_point.unsqueeze(-1)
        level = (torch.round(steps - offset) + zero).clamp(qmin, qmax) - (zero - offset)
        return from_groups(level * scale.unsqueeze(-1), w.shape[1]).contiguous()
    w_hat = torch.empty_like(w)
    limits = (c_int32(qmin), c_int32(qmax))
    native.call("fake_quantize_f32", w, *w.shape, group_size, scale, zero_point, float(offset), *limits, w_hat)
    return w_hat


def _like_w_and_scale(w: Tensor, grad: Tensor, scale: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(w), torch.empty_like(scale)


@operator(_like_w_and_scale)
def lsq_backward(
    w: Tensor,
    grad: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: float,
    stretch: float,
    g: float,
    qmin: int,
    qmax: int,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """numerics.lsq backwards: `grad` [O, N] of the dequantized weight -> (of the weight float32 [O, N], of the scale
    [O, G])."""
    w, grad, scale = w.detach().contiguous(), grad.contiguous(), scale.float()
    if gpu.takes(w, grad, scale, zero_point):
        grid = (scale, zero_point, offset, stretch, g, qmin, qmax, group_size)
        return gpu.kernels().lsq_backward(w, grad, *grid)
    if _usable(w, grad, scale, zero_point) and grad.dtype in native.SUFFIX:
        grad_w, grad_scale = torch.empty_like(w), torch.empty_like(scale)
        limits = (c_int32(qmin), c_int32(qmax))
        name = f"lsq_backward_{native.SUFFIX[grad.dtype]}"
        numbers = (float(offset), float(stretch), float(g))
        native.call(name, w, grad, *w.shape, group_size, scale, zero_point, *numbers, *limits, grad_w, grad_scale)
        return grad_w, grad_scale
    steps = to_groups(w, group_size) * scale.unsqueeze(-1).reciprocal()
    zero = 0 if zero_point is None else zero_point.unsqueeze(-1)
    shift = zero - offset
    level = (torch.round(steps - offset) + zero).clamp(qmin, qmax) - shift
    v = steps + shift
    inside = (v > qmin - stretch) & (v < qmax + stretch)
    given = to_groups(grad.float(), group_size)
    grad_scale = (given * (level - steps * inside)).sum(-1) * g
    return from_groups(given * inside, w.shape[1]).contiguous(), grad_scale


def _two_like(grad: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad, dtype=_BF16), grad.new_empty(grad.shape[::-1], dtype=_BF16)


@operator(_two_like)
def fold_scales(grad: Tensor, w_scale: Tensor | None, x_scale: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient [T, O] in bfloat16 twice: [T, O] times the weight's scale [O] (None: 1), and turned, [O, T], times the
    input's [T] or [1]. Turned, because a product with a turned left side takes twice as long."""
    grad = grad.contiguous()
    for_x, for_w = torch.empty_like(grad, dtype=_BF16), grad.new_empty(grad.shape[::-1], dtype=_BF16)
    _fold_into(grad, w_scale, x_scale, for_x, for_w)
    return for_x, for_w


def _fold_into(grad: Tensor, w_scale: Tensor | None, x_scale: Tensor, for_x: Tensor, for_w: Tensor) -> None:
    w_scale, x_scale = None if w_scale is None else w_scale.float(), x_scale.float()
    if _usable(grad, w_scale, x_scale) and grad.dtype in native.SUFFIX:
        name = f"fold_{native.SUFFIX[grad.dtype]}"
        one = c_int32(x_scale.numel() == 1 and grad.shape[0] != 1)
        native.call(name, grad, *grad.shape, w_scale, x_scale, one, for_x, for_w)
        return
    values = grad.float()
    for_x.copy_(values if w_scale is None else values * w_scale)
    for_w.copy_((values * x_scale.reshape(-1, 1)).t())


def _as_bf16(q: Tensor) -> Tensor:
    return torch.empty_like(q, dtype=_BF16)


@operator(_as_bf16)
def int8_to_bf16(q: Tensor) -> Tensor:
    """int8 -> bfloat16, exact."""
    return _bf16_into(q, torch.empty_like(q, dtype=_BF16, memory_format=torch.contiguous_format))


def _bf16_into(q: Tensor, out: Tensor) -> Tensor:
    q = q.contiguous()
    if q.dtype != torch.int8 or not _usable(q):
        return out.copy_(q)
    native.call("int8_to_bf16", q, q.numel(), out)
    return out


def scaled_bf16(values: Tensor, scale: Tensor | None) -> Tensor:
    """bfloat16 [R, N] of values [R, N] times a scale a row (None: 1), rounded once."""
    return (values.float() if scale is None else values.float() * scale.reshape(-1, 1)).to(_BF16)


def _scaled_pair(w: Tensor, w_scale: Tensor | None, x: Tensor, x_scale: Tensor) -> tuple[Tensor, Tensor]:
    if gpu.takes(w, w_scale, x, x_scale):
        pair: tuple[Tensor, Tensor] = gpu.kernels().scaled_bf16(w, w_scale, x, x_scale)
        return pair
    return scaled_bf16(w, w_scale), scaled_bf16(x, x_scale)


def _products_like(
    grad: Tensor, factor: Tensor, w_scale: Tensor | None, x_q: Tensor, x_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    (rows, out), columns = grad.shape, x_q.shape[1]
    return grad.new_empty((rows, columns), dtype=dtype), grad.new_empty((out, columns), dtype=_BF16)


@operator(_products_like)
def gradient_products(
    grad: Tensor, factor: Tensor, w_scale: Tensor | None, x_q: Tensor, x_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(dx [T, N] in `dtype`, dw_hat [O, N] in bfloat16) of `grad` [T, O], multiplied in bfloat16.

    dx = (grad * w_scale) factor, dw_hat = (grad * x_scale)^T x_q. `factor` [O, N]: the weight's integers with `w_scale`
    [O], or the dequantized weight with None. What lies between is in memory that the next call uses again. Off the CPU
    scales go into the other factor (`scaled_bf16`): integers are turned into bfloat16 in any case there.
    """
    device, (rows, out), columns = grad.device, grad.shape, x_q.shape[1]
    if device.type != "cpu" or gpu.takes(grad):
        w_hat, x_hat = _scaled_pair(factor, w_scale, x_q, x_scale)
        grad = grad.to(_BF16)
        return torch.mm(grad, w_hat).to(dtype), torch.mm(grad.t(), x_hat)
    for_x, for_w = (scratch(f"for {n}", s, _BF16, device) for n, s in (("x", (rows, out)), ("w", (out, rows))))
    _fold_into(grad.contiguous(), w_scale, x_scale, for_x, for_w)
    right = _bf16_into(factor, scratch("factor", factor.shape, _BF16, device))
    grad_x = torch.mm(for_x, right, out=scratch("dx", (rows, columns), _BF16, device))
    inputs = _bf16_into(x_q, scratch("inputs", x_q.shape, _BF16, device))
    grad_w = torch.mm(for_w, inputs)
    return (grad_x.clone() if dtype == _BF16 else grad_x.to(dtype)), grad_w


def groups_of(length: int, group_size: int | None) -> tuple[int, int]:
    """(size, number) of the groups of a row; None is one group of all."""
    return (length if group_size is None else min(group_size, length)), num_groups(length, group_size)
