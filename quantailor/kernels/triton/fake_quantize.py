"""A grouped weight to its grid and back in one pass. A program works on some groups, each a row of its tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantailor.kernels.triton.common import SAME_BITS, blocks_of, clamped, launch, power_of_2, rounded
from quantailor.numerics.grouping import num_groups

_TILE = 1024  # elements to a program: eight a thread, so that registers leave room for many programs


@triton.jit
def _fake_quantize(
    w, scale, zero_point, result, all_groups, groups, size, length, offset, qmin, qmax,
    BACK: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY))[:, None]
    n = group % groups * size + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    last = tl.minimum(group % groups * size + size, length)
    here = (group < all_groups) & (n < last)
    at = group // groups * length + n
    step = tl.load(scale + group, mask=group < all_groups, other=1.0)
    zero = tl.zeros([MANY, 1], tl.float32)
    if zero_point is not None:
        zero += tl.load(zero_point + group, mask=group < all_groups, other=0).to(tl.float32)
    v = tl.load(w + at, mask=here, other=0.0)
    level = clamped(rounded(v * tl.div_rn(1.0, step) - offset) + zero, qmin, qmax)
    if BACK:
        tl.store(result + at, (level - (zero - offset)) * step, mask=here)
    else:
        tl.store(result + at, level.to(tl.int8), mask=here)


def tile_of(group_size: int) -> tuple[int, int]:
    """(groups, elements of each) that a program works on at a time, powers of two."""
    block = min(power_of_2(group_size), _TILE)
    return _TILE // block, block


def quantize_weight(
    w: Tensor, scale: Tensor, zero_point: Tensor | None, offset: float, qmin: int, qmax: int, group_size: int
) -> Tensor:
    """passes.quantize_weight, bit for bit: w float32 [O, N], scale [O, G] -> q int8 [O, N]."""
    return _launched(w, scale, zero_point, (offset, qmin, qmax), group_size, torch.int8)


def fake_quantize_weight(
    w: Tensor, scale: Tensor, zero_point: Tensor | None, offset: float, qmin: int, qmax: int, group_size: int
) -> Tensor:
    """passes.fake_quantize_weight, bit for bit: float32 [O, N]."""
    return _launched(w, scale, zero_point, (offset, qmin, qmax), group_size, torch.float32)


def _launched(
    w: Tensor, scale: Tensor, zero_point: Tensor | None, numbers: tuple[float, int, int], size: int, dtype: torch.dtype
) -> Tensor:
    w, scale = w.contiguous(), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    result = torch.empty_like(w, dtype=dtype)
    (out, length), (many, block) = w.shape, tile_of(size)
    groups = num_groups(length, size)
    grid = (blocks_of(out * groups, many), blocks_of(size, block))
    if w.numel():
        launch(
            *(_fake_quantize, grid, w, scale, zero_point, result, out * groups, groups, size, length),
            *map(float, numbers), options=SAME_BITS, BACK=dtype == torch.float32, MANY=many, BLOCK=block,
        )  # fmt: skip
    return result
