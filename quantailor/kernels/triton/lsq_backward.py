"""LSQ backwards in one pass: the gradient of a dequantized weight becomes that of the weight and of its scale.

A program works on some groups, of which each is a row of its tile; long groups are gone through a tile at a time, and
the sum of each column of tiles is kept until the end, so that the order of adding does not depend on the machine.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantailor.kernels.triton.common import SAME_BITS, blocks_of, clamped, launch, rounded
from quantailor.kernels.triton.fake_quantize import tile_of
from quantailor.numerics.grouping import num_groups


@triton.jit
def _lsq_backward(
    w, grad, scale, zero_point, grad_w, grad_scale, all_groups, groups, size, length, offset, stretch, g, qmin, qmax,
    MANY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY))[:, None]
    first = group % groups * size
    last = tl.minimum(first + size, length)
    row = group // groups * length
    inverse = tl.div_rn(1.0, tl.load(scale + group, mask=group < all_groups, other=1.0))
    zero = tl.zeros([MANY, 1], tl.float32)
    if zero_point is not None:
        zero += tl.load(zero_point + group, mask=group < all_groups, other=0).to(tl.float32)
    shift = zero - offset
    sums = tl.zeros([MANY, BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        n = first + start + tl.arange(0, BLOCK)[None, :]
        here = (group < all_groups) & (n < last)
        steps = tl.load(w + row + n, mask=here, other=0.0) * inverse
        given = tl.load(grad + row + n, mask=here, other=0.0).to(tl.float32)
        level = clamped(rounded(steps - offset) + zero, qmin, qmax) - shift
        inside = (steps + shift > qmin - stretch) & (steps + shift < qmax + stretch)
        tl.store(grad_w + row + n, tl.where(inside, given, 0.0), mask=here)
        sums += given * tl.where(inside, level - steps, level)
    tl.store(grad_scale + group, tl.sum(sums, 1)[:, None] * g, mask=group < all_groups)


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
    """passes.lsq_backward: (of the weight float32 [O, N], bit for bit; of the scale [O, G], up to the order of adding).

    `grad` [O, N] in any float type.
    """
    w, grad, scale = w.contiguous(), grad.contiguous(), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    grad_w, grad_scale = torch.empty_like(w), torch.empty_like(scale)
    (out, length), (many, block) = w.shape, tile_of(group_size)
    groups = num_groups(length, group_size)
    numbers = (float(v) for v in (offset, stretch, g, qmin, qmax))
    if w.numel():
        launch(
            *(_lsq_backward, (blocks_of(out * groups, many),), w, grad, scale, zero_point, grad_w, grad_scale),
            *(out * groups, groups, group_size, length, *numbers), options=SAME_BITS, MANY=many, BLOCK=block,
        )  # fmt: skip
    else:
        grad_scale.zero_()
    return grad_w, grad_scale
