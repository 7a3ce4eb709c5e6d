"""Few rows times packed weights of 1 to 4 or 8 bits or NF4, read as they are stored: what decoding a token is made of.

Inputs become integers of 16 bits, one scale to a step of weights (32 bytes of them; 12 at 3 bits), so the sums are sums
of integers, exact, and a result differs from the float product by 2^-16 of a step's largest input. NF4's levels become
integers of 14 bits as well. The kernel is native (native/rows.c); `decode_reference` says the same in torch, for the
tests. On a GPU inputs stay floats, since there weights are the traffic and nothing else counts (triton/decode.py).
Without a kernel, or for other shapes, weights are dequantized a block of rows at a time (`by_blocks`), which no number
of rows is too many for.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import Structure, byref, c_double, c_int64, c_void_p
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantailor.kernels.native import library as native
from quantailor.kernels.operators import opaque
from quantailor.kernels.scratch import scratch
from quantailor.kernels.triton import library as gpu
from quantailor.numerics.grouping import num_groups, per_element

# Of 5632 x 2048, two threads with AVX2, ms by the kernel and by float blocks: 4 bits 8.8 and 15 at 32 rows, 18 and 28
# at 64, 26 and 33 at 96, 37 and 40 at 128; 8 bits 9.6 and 19, 20 and 22, 33 and 32, 38 and 38. `quantailor bench`
# measures the shapes of a model.
MOST_ROWS = 64
# Not measured: the kernel multiplies four rows at a time and reads weights again for the next four, so that at 8 rows
# it reads half of what a product in bfloat16 reads, and beyond it multiplies more than tensor cores would.
MOST_ROWS_GPU = 8
LARGEST = 32512  # 127 * 256
LARGEST_LEVEL = 8191  # of NF4: eight products of a level and an input still fit 32 bits
_NF4, _UNSIGNED8, _FLOAT32 = 40, 80, 320  # native/rows.h
_BLOCK_BYTES = 8 * 2**20  # of float weights at a time: they stay in the caches, and no fresh memory is mapped for them
_BLOCK_BYTES_GPU = 64 * 2**20  # not measured: enough to do for each of the launches that a block is made by


@dataclass(frozen=True)
class StoredWeight:
    """A packed weight as the kernel reads it: `data` int32 words or int8 [O, ...], unsigned integers u of `bits` bits
    (at 8 bits signed where `data` is int8); `scale` float32 [O, G] or [1, 1]; w_hat = (u + move) * scale, or with
    `zero_point` uint8 [O, G], (u - zero_point) * scale; with `levels` float32 [2^bits], levels[u] * scale. `group_size`
    None: one group. One scale for a whole weight has no zero points of a row.

    `half_scale` float16 [O, G]: the same numbers as `scale`, made by `with_half_scale`."""

    data: Tensor
    scale: Tensor
    bits: int
    in_features: int
    group_size: int | None
    move: float = 0.0
    zero_point: Tensor | None = None
    levels: Tensor | None = None
    half_scale: Tensor | None = None

    def with_half_scale(self) -> StoredWeight:
        """The same, with `half_scale` where it holds the same numbers and a step has several groups: what the kernel
        reads of four bits in groups of 32 is a tenth less. Of larger groups it would be little, and was slower."""
        if not self._several_to_a_step or self.scale.device.type != "cpu" or not has_kernel():
            return self
        half = self.scale.half()
        return replace(self, half_scale=half) if torch.equal(half.float(), self.scale) else self

    @property
    def step(self) -> int:
        """Inputs whose weights fill 32 bytes; at 3 bits 32 of them, in 12."""
        return 32 if self.bits == 3 else 256 // self.bits

    @property
    def _several_to_a_step(self) -> bool:
        """Whether a step holds more groups than one, each row having its own scales."""
        small = self.group_size is not None and self.group_size < self.step
        return small and self.groups > 1 and self.scale.shape[0] > 1

    @property
    def groups(self) -> int:
        return num_groups(self.in_features, self.group_size)

    @cached_property
    def native(self) -> NativeWeight:
        """As native code takes it: pointers into these tensors, valid as long as they are."""
        scale = self.scale if self.half_scale is None else self.half_scale
        assert self.half_scale is None or self._several_to_a_step, "with_half_scale makes no others"
        held = (self.data, scale, self.zero_point, self.levels)
        assert all(t is None or (t.is_contiguous() and t.device.type == "cpu") for t in held)
        kind = self.bits
        if self.levels is not None:
            kind = _NF4
        elif self.bits == 8 and self.data.dtype != torch.int8:
            kind = _UNSIGNED8
        stride = 0 if self.scale.shape[0] < self.data.shape[0] else self.scale.shape[1]
        sizes = (self.data.shape[0], self.in_features, self.data.shape[1] * self.data.element_size(), stride)
        group = self.in_features if self.groups == 1 else self.group_size
        pointers = [None if t is None else t.data_ptr() for t in held]
        return NativeWeight(*pointers, kind, *sizes, self.groups, group, self.half_scale is not None, self.move)


class NativeWeight(Structure):
    """`weight` of native/rows.h."""

    _fields_ = [(name, c_void_p) for name in ("w", "scale", "zeros", "levels")]
    _fields_ += [(n, c_int64) for n in ("kind", "out", "n", "row_bytes", "scale_stride", "groups", "group", "half")]
    _fields_ += [("c", c_double)]

    @classmethod
    def of_floats(cls, weight_ON: Tensor) -> NativeWeight:
        """A float32 weight, which stays as it is."""
        assert weight_ON.dtype == torch.float32 and weight_ON.is_contiguous() and weight_ON.device.type == "cpu"
        out, length = weight_ON.shape
        return cls(weight_ON.data_ptr(), None, None, None, _FLOAT32, out, length, 4 * length, 0, 1, length, 0, 0.0)


def why_not(weight: StoredWeight | None, rows: int, device: str) -> str:
    """Why no kernel for packed weights takes this product; "" where one does."""
    if weight is None or weight.bits not in (1, 2, 3, 4, 8):
        return "its grid has no kernel here (NF4 and uniform grids of 1 to 4 and 8 bits have)"
    if weight.zero_point is not None and weight.zero_point.shape[0] < weight.data.shape[0]:
        return "one zero point for the whole weight has no kernel here; a row or a group of its own has"
    on_gpu = gpu.is_home(device)
    if rows > (most := most_rows(device)):
        return f"{rows} rows: beyond {most} a product of floats is {'taken' if on_gpu else 'faster'}"
    if on_gpu:
        return _why_not_on_gpu(weight, device)
    if device != "cpu":
        return f"the kernels run on a CPU or an NVIDIA GPU, and this is {device}"
    if reason := why_no_kernel():
        return reason
    size, step = weight.group_size, weight.step
    least = step if weight.bits == 8 else 32 if weight.levels is not None else step // 8  # what shares lanes
    if weight.groups > 1 and size is not None and size % step and (step % size or size < least):
        return f"groups of {size} do not fit steps of {step} inputs"
    return ""


def most_rows(device: str) -> int:
    """Up to how many rows the kernel of a device of this type is taken for."""
    return MOST_ROWS_GPU if gpu.is_home(device) else MOST_ROWS


def most_rows_compiled(weight: StoredWeight | None, device: str) -> int:
    """Up to how many rows a compiled graph takes the kernel: on a GPU, where it saves launches from Python. On a CPU
    a graph takes the proven way."""
    return most_rows(device) if gpu.is_home(device) and not why_not(weight, 1, device) else 0


def _why_not_on_gpu(weight: StoredWeight, device: str) -> str:
    if weight.levels is not None or weight.bits == 3:
        return "its grid has no kernel on a GPU (uniform grids of 1, 2, 4 and 8 bits have)"
    size, fields = weight.group_size, 32 // weight.bits
    if weight.groups > 1 and size is not None and size % fields:
        return f"groups of {size} do not fit words of {fields} weights"
    return gpu.why_not(device)


def why_no_kernel() -> str:
    """Why this machine has no native kernel for packed weights; "" where it has one."""
    if native.library() is None:
        return native.why_not()
    return "" if has_kernel() else "this processor has no AVX2 with FMA and BMI2"


def has_kernel() -> bool:
    """Whether the native library was built for a processor that the kernel is written for."""
    lib = native.library()
    return lib is not None and bool(lib.decode_ready())


def decode_linear(
    x_TN: Tensor, weight: StoredWeight, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """y = x @ w_hat^T + bias: [T, O] in `dtype`, rounded from float32, of x [T, N] in any float type. `why_not` must
    have said nothing."""
    w = weight
    if opaque(x_TN):
        sizes = (w.bits, w.in_features, w.group_size, w.move)
        return _as_operator(x_TN, w.data, w.scale, *sizes, w.zero_point, w.levels, bias, dtype)
    if gpu.takes(x_TN, w.data, w.scale):
        grid = (w.data, w.scale, w.zero_point, w.move, w.bits, w.group_size)
        result: Tensor = gpu.kernels().decode_linear(x_TN.detach(), *grid, bias, dtype)
        return result
    x = x_TN.detach().float().contiguous()
    y = torch.empty(x.shape[0], weight.data.shape[0])
    bias = None if bias is None else bias.float().contiguous()
    places = (None if bias is None else bias.data_ptr(), y.data_ptr())
    if _kernel()(x.data_ptr(), x.shape[0], byref(weight.native), *places):
        raise MemoryError(f"no memory for {x.shape[0]} rows of {x.shape[1]} inputs as integers")
    return y.to(dtype)


@torch.library.custom_op("quantailor::decode_linear", mutates_args=())
def _as_operator(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bits: int,
    in_features: int,
    group_size: int | None,
    move: float,
    zero_point: Tensor | None,
    levels: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`decode_linear` with its weight spread out: what a compiled graph holds."""
    weight = StoredWeight(data, scale, bits, in_features, group_size, move, zero_point, levels)
    return decode_linear(x, weight, bias, dtype)


@_as_operator.register_fake
def _(x: Tensor, data: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], data.shape[0]), dtype=rest[-1])


@cache
def _kernel() -> Any:
    """The native function with its types told once."""
    lib = native.library()
    assert lib is not None, native.why_not()
    lib.decode.argtypes = [c_void_p, c_int64, c_void_p, c_void_p, c_void_p]
    return lib.decode


def rows_as_floats(weight: StoredWeight, rows: slice) -> Tensor:
    """float32 [n, N]: some rows, the same bits as numerics/grids.py gives. Needs the native library.

    Valid until the next call of this thread: the memory is used again.
    """
    data, scale, zero = weight.data[rows], weight.scale, weight.zero_point
    stride = 0 if scale.shape[0] == 1 else scale.shape[1]
    scale = scale[rows] if stride else scale
    zero = zero if zero is None or not stride else zero[rows]
    y = scratch("rows as floats", (data.shape[0], weight.in_features), torch.float32, data.device)
    sizes = (data.shape[0], weight.in_features, data.shape[1] * data.element_size(), weight.bits)
    moves = (scale.contiguous(), stride, float(weight.move), zero, weight.levels)
    groups = (weight.groups, weight.in_features if weight.groups == 1 else weight.group_size)
    if native.call("dequantize_rows", data, *sizes, int(data.dtype != torch.int8), *moves, *groups, y):
        raise MemoryError(f"no memory to unpack rows of {weight.in_features} weights")
    return y


def by_blocks(
    x_TN: Tensor, dequantize: Callable[[slice], Tensor], out_features: int, bias: Tensor | None = None
) -> Tensor:
    """y [T, O] in x's type, the weight's rows as floats only a block at a time. `dequantize`: rows -> [n, N]."""
    y = x_TN.new_empty(x_TN.shape[0], out_features)
    at_once = _BLOCK_BYTES if x_TN.device.type == "cpu" else _BLOCK_BYTES_GPU
    run = max(16, at_once // (4 * max(1, x_TN.shape[1])))
    for start in range(0, out_features, run):
        rows = slice(start, min(start + run, out_features))
        part = None if bias is None else bias[rows].to(x_TN.dtype)
        y[:, rows] = F.linear(x_TN, dequantize(rows).to(x_TN.dtype), part)
    return y


def decode_reference(x_TN: Tensor, u_ON: Tensor, weight: StoredWeight, bias: Tensor | None = None) -> Tensor:
    """`decode_linear` as the formula in native/decode.c, in float64; `u_ON` are the stored integers."""
    length, step, group = x_TN.shape[1], weight.step, weight.group_size
    padded = F.pad(x_TN.float(), (0, -length % step)).unflatten(1, (-1, step))
    largest = padded.abs().amax(-1, keepdim=True)
    scale = largest / LARGEST
    inverse = torch.where(largest > 0, torch.tensor(float(LARGEST)) / largest, 0)  # a number / a tensor rounds twice
    small = ~torch.isfinite(inverse)
    scale, inverse = scale.masked_fill(small, 0), inverse.masked_fill(small, 0)
    x_int = torch.round(padded * inverse).clamp(-LARGEST, LARGEST)
    x_hat = (x_int.double() * scale.double()).flatten(1)[:, :length]
    x_hat[~torch.isfinite(x_TN.float()).all(1)] = torch.nan
    zero, move = weight.zero_point, torch.tensor(weight.move)
    values = u_ON.double()
    if weight.levels is not None:
        values = (torch.round(weight.levels * LARGEST_LEVEL) / LARGEST_LEVEL).double()[u_ON]
    if zero is not None:
        move = -per_element(zero.double(), length, group)
    scales = weight.scale.double().expand(u_ON.shape[0], -1)
    w_hat = (values + move.double()) * per_element(scales, length, group)
    y = x_hat @ w_hat.t()
    return y if bias is None else y + bias.double()
