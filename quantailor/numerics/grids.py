"""One grid, three executions: what an integer on a grid means, decided here and nowhere else.

    levels        x_hat = (q - zero_point + offset) * scale
    Int(b)        offset 0     q = qmin .. qmax, zero point 0 if symmetric
    Balanced(2)   offset 0.5   q = -2 .. 1: levels ±0.5, ±1.5 steps
    Ternary       offset 0     q = -1, 0, 1
    Binary        offset 0.5   q = -1, 0: levels ±0.5 steps, so alpha = scale / 2
    NF4           a table of 16 levels times scale; q = 0 .. 15

Shapes: a weight in groups [O, G, g] with scale, zero_point [O, G, 1]; anything broadcastable works.
"""

import torch
from torch import Tensor

from quantailor.numerics import affine, nf4
from quantailor.numerics.lsq import lsq
from quantailor.spec import NF4, Balanced, Binary, Grid, Int, Ternary


def limits(grid: Grid) -> tuple[int, int, float]:
    """(qmin, qmax, offset) of a uniform grid. NF4 gives the range of its indices."""
    match grid:
        case Int():
            return grid.qmin, grid.qmax, 0.0
        case Balanced():
            return -2, 1, 0.5
        case Ternary():
            return -1, 1, 0.0
        case Binary():
            return -1, 0, 0.5
        case NF4():
            return 0, 15, 0.0
    raise TypeError(f"no such grid: {grid!r}")


def encode(x: Tensor, scale: Tensor, zero_point: Tensor | int, grid: Grid) -> Tensor:
    """Reals to integers: int8, or uint8 where the grid goes beyond 127."""
    if isinstance(grid, NF4):
        return nf4.encode(x, scale).to(torch.int8)
    qmin, qmax, offset = limits(grid)
    if offset:
        return torch.round(x * scale.reciprocal() - offset).clamp(qmin, qmax).to(torch.int8)
    return affine.quantize(x, scale, zero_point, qmin, qmax)


def decode(q: Tensor, scale: Tensor, zero_point: Tensor | int, grid: Grid) -> Tensor:
    """Integers to reals, in scale.dtype."""
    if isinstance(grid, NF4):
        return nf4.decode(q, scale)
    offset = limits(grid)[2]
    if offset:
        return (q.to(scale.dtype) + offset) * scale
    return affine.dequantize(q, scale, zero_point)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, grid: Grid, g: float) -> Tensor:
    """decode(encode(x)) with straight-through gradients: LSQ's for `x` and `scale` on uniform grids; on NF4, whose
    outer levels are the largest element itself, the identity for `x` and none for `scale`."""
    if isinstance(grid, NF4):
        return x + (decode(encode(x, scale, 0, grid), scale, 0, grid) - x).detach()
    qmin, qmax, offset = limits(grid)
    stretch = 0.0 if isinstance(grid, Int) else 0.5
    return lsq(x, scale, zero_point, qmin, qmax, g=g, offset=offset, stretch=stretch)


def can_be_negative(grid: Grid) -> bool:
    """Whether a scale on this grid may be negative: where one side of 0 reaches noticeably further than the other."""
    return isinstance(grid, Int) and grid.symmetric and not grid.narrow and grid.bits <= 4


def lowest(grid: Grid) -> int:
    """What is added to an integer, negated, to store it unsigned: u = q - lowest(grid)."""
    return limits(grid)[0] if not (isinstance(grid, Int) and grid.symmetric) else -(2 ** (grid.bits - 1))
