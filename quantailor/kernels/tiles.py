"""The int8 product on AMX tiles, scales applied in its epilogue: same bits as `ops.int_linear` on any other path."""

from __future__ import annotations

from ctypes import c_int32

import torch
from torch import Tensor

from quantailor.kernels.native import library as native
from quantailor.numerics.grouping import num_groups, to_groups

_LEAST_ROWS = 8  # below, packing the weight costs more than the product saves


def depth_of(group_size: int | None, length: int) -> int | None:
    """Inputs to a tile: 64, or 32 for groups that only 32 divides; None where no tile fits the groups."""
    if group_size is None or group_size >= length:
        return 64
    return next((depth for depth in (64, 32) if group_size % depth == 0), None)


def fits(x_q: Tensor, w_q: Tensor, group_size: int | None) -> bool:
    """Whether the product of `x_q` [T, N] and `w_q` [O, N] can go this way, and is worth packing the weight for."""
    on_cpu = x_q.device.type == "cpu" == w_q.device.type and w_q.dtype == x_q.dtype == torch.int8
    big = x_q.shape[0] >= _LEAST_ROWS and w_q.numel() > 0
    return on_cpu and big and depth_of(group_size, x_q.shape[1]) is not None and native.has_tiles()


def pack_tiles(w_q: Tensor, depth: int) -> Tensor:
    """int8 [O, N] -> the kernel's own order, int8 [ceil(O/16) * ceil(N/depth) * depth * 16]; beyond the edges 0."""
    out, length = w_q.shape
    tiles = torch.empty(-(-out // 16) * -(-length // depth) * depth * 16, dtype=torch.int8)
    native.call("pack_tiles", w_q.contiguous(), out, length, depth, tiles)
    return tiles


def weight_tiles(w_q: Tensor, group_size: int | None) -> Tensor:
    """`w_q` int8 [O, N] as `tile_linear` takes it again and again: one byte a weight. Its groups must fit tiles."""
    depth = depth_of(group_size, w_q.shape[1])
    assert depth is not None
    return pack_tiles(w_q, depth)


def by_group(
    x_q: Tensor, w_scale: Tensor, shift: Tensor | None, outputs: int, size: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the epilogue of a native product reads, in groups of `size`: scale [O, G], shift [O, G], and, where there is
    one, the sums of `x_q` [T, N], float32 [T, G]. All float32, which scales of a model turned into bfloat16 are not."""
    groups = num_groups(x_q.shape[1], size)
    w_scale = w_scale.float().expand(outputs, groups).contiguous()
    if shift is None:
        return w_scale, None, None
    sums = to_groups(x_q, size).sum(-1, dtype=torch.float32).contiguous()
    return w_scale, shift.float().expand(outputs, groups).contiguous(), sums


def tile_linear(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    shift: Tensor | None,
    group_size: int | None,
    bias: Tensor | None,
    in_bf16: bool,
    tiles: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y [T, O] of x_q int8 [T, N], x_scale [T] or [1], w_q int8 [O, N], w_scale and shift [O, G], bias [O].

    float32, or bfloat16 rounded from it once, to `out` where it is given. `tiles`: `weight_tiles` of w_q; None packs it
    for this call. Raises: MemoryError where a thread finds no room for its block.
    """
    rows, length = x_q.shape
    depth = depth_of(group_size, length)
    assert depth is not None
    size = length if group_size is None else min(group_size, length)
    tiles = weight_tiles(w_q, group_size) if tiles is None else tiles
    w_scale, shift, sums = by_group(x_q, w_scale, shift, w_q.shape[0], size)
    y = torch.empty((rows, w_q.shape[0]), dtype=torch.bfloat16 if in_bf16 else torch.float32) if out is None else out
    assert y.shape == (rows, w_q.shape[0]) and y.dtype == (torch.bfloat16 if in_bf16 else torch.float32)
    one = c_int32(x_scale.numel() == 1 and rows != 1)
    bias = None if bias is None else bias.float().contiguous()
    scales = (w_scale, shift, sums, x_scale.float().contiguous(), one, bias)
    sizes = (rows, length, w_q.shape[0], depth, size)
    if native.call("gemm", x_q.contiguous(), tiles, *sizes, *scales, y, c_int32(in_bf16)):
        raise MemoryError(f"no memory for the blocks of a product of {rows} x {length} by {w_q.shape[0]}")
    return y
