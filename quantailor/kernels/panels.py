"""The int8 product on AVX2 (native/panels.c), for processors without an int8 instruction: the bits of `ops.int_linear`,
and beyond it an activation function and the next layer's quantization while sums are in the cache.

Weights are read as they are stored, int8 [O, N]; what is widened of them lives in the first cache. T tokens, G groups.
"""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantailor.kernels.native import library as native
from quantailor.kernels.tiles import by_group

ACTIVATIONS = (None, "gelu", "gelu_tanh", "silu", "relu")  # in the order in which native/panels.c numbers them
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_LONGEST = 2**31 // 2**14 - 1  # inputs whose products of at most 2^14 a 32-bit sum holds


def why_not() -> str:
    """Why there is no such product on this machine; "" where there is."""
    if native.library() is None:
        return native.why_not()
    return "" if _ready() else "this processor has no AVX2"


@cache
def _ready() -> bool:
    lib = native.library()
    return lib is not None and bool(lib.panels_ready())


def fits(x_q: Tensor, w_q: Tensor) -> bool:
    """Whether the product of `x_q` [T, N] and `w_q` [O, N] can go this way."""
    on_cpu = x_q.device.type == "cpu" == w_q.device.type and x_q.dtype == w_q.dtype == torch.int8
    return on_cpu and 0 < x_q.shape[1] <= _LONGEST and not why_not()


def panel_linear(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    shift: Tensor | None,
    group_size: int | None,
    bias: Tensor | None,
    *,
    activation: str | None = None,
    out: Tensor | None = None,
    next_scale: Tensor | None = None,
    limits: tuple[int, int] = (-128, 127),
) -> Tensor:
    """y [T, O] of x_q int8 [T, N], x_scale [T] or [1], w_q int8 [O, N], w_scale and shift [O, G] or [1, 1], bias [O].

    `activation`: one of ACTIVATIONS, of the float32 result. `out`: where y goes, float32 (what None makes), bfloat16
    rounded from it once, or int8: y / next_scale [1], rounded to the nearest within `limits`.
    Raises: MemoryError where a thread finds no room for its rows.
    """
    rows, length = x_q.shape
    outputs = w_q.shape[0]
    size = length if group_size is None else min(group_size, length)
    x_q, w_q = (t if t.stride(1) == 1 else t.contiguous() for t in (x_q, w_q))
    w_scale, shift, sums = by_group(x_q, w_scale, shift, outputs, size)
    bias = None if bias is None else bias.float().contiguous()
    x_scale = x_scale.float().contiguous()
    y = torch.empty(rows, outputs) if out is None else out
    inverse = 1.0 if next_scale is None else float(next_scale.reciprocal())
    assert y.is_contiguous() and y.shape == (rows, outputs) and (y.dtype != torch.int8 or next_scale is not None)
    scales = [None if t is None else t.data_ptr() for t in (w_scale, shift, sums, x_scale)]
    failed = _function("panels")(
        *(x_q.data_ptr(), x_q.stride(0), w_q.data_ptr(), w_q.stride(0), rows, length, outputs, size, *scales),
        *(x_scale.numel() == 1 and rows != 1, None if bias is None else bias.data_ptr()),
        *(ACTIVATIONS.index(activation), _KINDS[y.dtype], inverse, *limits, y.data_ptr()),
    )
    if failed:
        raise MemoryError(f"no memory for the rows of a product of {rows} x {length} by {outputs}")
    return y


def finish(
    x: Tensor,
    *,
    activation: str | None = None,
    out: Tensor | None = None,
    next_scale: Tensor | None = None,
    limits: tuple[int, int] = (-128, 127),
) -> Tensor:
    """What `panel_linear` does to its sums at last, in one pass over a product made elsewhere: x float32 [T, O]
    contiguous -> `out`, as there; None and `x` itself change `x` in place."""
    y = x if out is None else out
    inverse = 1.0 if next_scale is None else float(next_scale.reciprocal())
    assert x.dtype == torch.float32 and x.is_contiguous() and y.is_contiguous() and y.shape == x.shape
    assert y.dtype != torch.int8 or next_scale is not None
    kind = (ACTIVATIONS.index(activation), _KINDS[y.dtype])
    _function("finish")(x.data_ptr(), x.numel(), *kind, inverse, *limits, y.data_ptr())
    return y


def panel_product(x_q: Tensor, w_q: Tensor) -> Tensor:
    """int8 [T, N] x int8 [O, N]^T -> float32 [T, O] of exact 32-bit sums."""
    one = torch.ones(1, 1)
    return panel_linear(x_q, one.reshape(1), w_q, one, None, None, None)


@cache
def _function(name: str) -> Any:
    """A native function with its types told once (decode.py, `_kernel`)."""
    lib = native.library()
    assert lib is not None, native.why_not()
    number, small, real, place = c_int64, c_int32, c_float, c_void_p
    ending = [small, small, real, real, real, place]
    function = getattr(lib, name)
    if name == "finish":
        function.argtypes, function.restype = [place, number, *ending], None
        return function
    sides = [place, number, place, number, number, number, number, number, place, place, place, place]
    function.argtypes = [*sides, small, place, *ending]
    return function
