"""Few rows times packed weights of 1, 2, 4 or 8 bits, read as they are stored: what decoding a token is made of.

Inputs become integers of 16 bits, one scale to a step of 32 bytes of weights (8 bits: 32 inputs, 4 bits: 64, ...), so
the sums are sums of integers, exact, and a result differs from the float product by 2^-16 of a step's largest input.
The kernel is native (native/decode.c); `decode_reference` says the same in torch, for the tests. On a GPU inputs stay
floats, since there weights are the traffic and nothing else counts (triton/decode.py). Without a kernel, or for other
shapes, weights are dequantized a block of rows at a time (`by_blocks`), which no number of rows is too many for.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantailor.kernels.native import library as native
from quantailor.kernels.scratch import scratch
from quantailor.kernels.triton import library as gpu
from quantailor.numerics.grouping import num_groups, per_element

# Of 5632 x 2048, two threads with AVX2, ms by the kernel and by float blocks: 4 bits 5.5, 10.4 at 16 rows, 6.6 and 11.4
# at 24, 17 and 16 at 64; 8 bits 9.7 and 10.5 at 24, 19 and 14 at 32. `quantailor bench` measures the shapes of a model.
MOST_ROWS = 24
# Not measured: the kernel multiplies four rows at a time and reads weights again for the next four, so that at 8 rows
# it reads half of what a product in bfloat16 reads, and beyond it multiplies more than tensor cores would.
MOST_ROWS_GPU = 8
LARGEST = 32512  # 127 * 256
_BLOCK_BYTES = 8 * 2**20  # of float weights at a time: they stay in the caches, and no fresh memory is mapped for them


@dataclass(frozen=True)
class StoredWeight:
    """A packed weight as the kernel reads it: `data` int32 words or int8 [O, ...], unsigned integers u of `bits` bits
    (at 8 bits signed where `data` is int8); `scale` float32 [O, G] or [1, 1]; w_hat = (u + move) * scale, or with
    `zero_point` uint8 [O, G], (u - zero_point) * scale; with `levels` float32 [2^bits], levels[u] * scale. `group_size`
    None: one group. One scale for a whole weight has no zero points of a row."""

    data: Tensor
    scale: Tensor
    bits: int
    in_features: int
    group_size: int | None
    move: float = 0.0
    zero_point: Tensor | None = None
    levels: Tensor | None = None

    @property
    def step(self) -> int:
        """Inputs whose weights fill 32 bytes."""
        return 256 // self.bits

    @property
    def groups(self) -> int:
        return num_groups(self.in_features, self.group_size)


def why_not(weight: StoredWeight | None, rows: int, device: str) -> str:
    """Why no kernel for packed weights takes this product; "" where one does."""
    if weight is None or weight.levels is not None or weight.bits not in (1, 2, 4, 8):
        return "its grid has no kernel here (it has for uniform grids of 1, 2, 4 and 8 bits)"
    if weight.zero_point is not None and weight.zero_point.shape[0] < weight.data.shape[0]:
        return "one zero point for the whole weight has no kernel here; a row or a group of its own has"
    on_gpu = device == ("cpu" if gpu.interprets() else "cuda")
    if rows > (most := most_rows(device)):
        return f"{rows} rows: beyond {most} a product of floats is {'taken' if on_gpu else 'faster'}"
    if on_gpu:
        return _why_not_on_gpu(weight, device)
    if device != "cpu":
        return f"the kernels run on a CPU or an NVIDIA GPU, and this is {device}"
    if native.library() is None:
        return native.why_not()
    if not has_kernel():
        return "this processor has no AVX2"
    size, step = weight.group_size, weight.step
    least = step if weight.bits == 8 else step // 8  # inputs to a lane, which has one scale
    if weight.groups > 1 and size is not None and size % step and (step % size or size < least):
        return f"groups of {size} do not fit steps of {step} inputs"
    return ""


def most_rows(device: str) -> int:
    """Up to how many rows the kernel of a device of this type is taken for."""
    return MOST_ROWS_GPU if device == ("cpu" if gpu.interprets() else "cuda") else MOST_ROWS


def _why_not_on_gpu(weight: StoredWeight, device: str) -> str:
    size, fields = weight.group_size, 32 // weight.bits
    if weight.groups > 1 and size is not None and size % fields:
        return f"groups of {size} do not fit words of {fields} weights"
    return gpu.why_not(device)


def has_kernel() -> bool:
    """Whether the native library was built for a processor that the kernel is written for."""
    lib = native.library()
    return lib is not None and bool(lib.decode_ready())


def decode_linear(
    x_TN: Tensor, weight: StoredWeight, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """y = x @ w_hat^T + bias: [T, O] in `dtype`, rounded from float32, of x [T, N] in any float type. `why_not` must
    have said nothing."""
    if gpu.takes(x_TN, weight.data, weight.scale):
        w = weight
        grid = (w.data, w.scale, w.zero_point, w.move, w.bits, w.group_size)
        result: Tensor = gpu.kernels().decode_linear(x_TN.detach(), *grid, bias, dtype)
        return result
    x = x_TN.detach().float().contiguous()
    rows, length = x.shape
    data, groups = weight.data, weight.groups
    out = data.shape[0]
    y = torch.empty(rows, out)
    bias = None if bias is None else bias.float().contiguous()
    held = (data, weight.scale, weight.zero_point, bias)
    assert all(t is None or (t.is_contiguous() and t.device.type == "cpu") for t in held)
    failed = _kernel()(
        *(x.data_ptr(), rows, length, data.data_ptr(), data.shape[1] * data.element_size(), weight.bits),
        *(data.dtype != torch.int8, weight.scale.data_ptr()),
        *(0 if weight.scale.shape[0] < out else weight.scale.shape[1], weight.move),
        *(None if weight.zero_point is None else weight.zero_point.data_ptr(), groups),
        *(length if groups == 1 else weight.group_size, None if bias is None else bias.data_ptr(), y.data_ptr(), out),
    )
    if failed:
        raise MemoryError(f"no memory for {rows} rows of {length} inputs as integers")
    return y.to(dtype)


@cache
def _kernel() -> Any:
    """The native function with its types told once: converting sixteen arguments by hand takes as long as the product
    of a small layer (native/library.py, `call`)."""
    lib = native.library()
    assert lib is not None, native.why_not()
    number, place = c_int64, c_void_p
    function = lib.decode
    function.argtypes = [place, number, number, place, number, number, number, place, number, c_float, place]
    function.argtypes += [number, number, place, place, number]
    return function


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
    run = max(16, _BLOCK_BYTES // (4 * max(1, x_TN.shape[1])))
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
    if zero is not None:
        move = -per_element(zero.double(), length, group)
    scales = weight.scale.double().expand(u_ON.shape[0], -1)
    w_hat = (u_ON.double() + move.double()) * per_element(scales, length, group)
    y = x_hat @ w_hat.t()
    return y if bias is None else y + bias.double()
