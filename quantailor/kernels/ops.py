"""Integer products: one schema, a readable reference, and the torch backends that run it.

    y[t, o] = x_scale[t] * sum_G w_scale[o, G] * sum_{n in G} x_q[t, n] * (w_q[o, n] + shift[o, G]) + bias[o]

The inner sum is exact; scales come afterwards, in float32 and always in this order, so that the simulated forward of
training and the packed one of serving give the same bits. Axes: T tokens (any leading axes), N in, O out, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantailor.spec import NF4, Grid, Int

_EXACT_RUN = 1024  # products of at most 2^14 that float32 sums exactly: 2^24 / 2^14


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as the product takes it: `q` [O, N], `scale` [O, G] or [1, 1], `shift` [O, G] = offset - zero_point
    or None if all zero, groups of `group_size` along N (None: one)."""

    q: Tensor
    scale: Tensor
    shift: Tensor | None
    group_size: int | None


def has_integer_product(grid: Grid) -> bool:
    """Whether the grid's integers fit int8 and are equally spaced. NF4's are not, nor 8 asymmetric bits."""
    return not isinstance(grid, NF4) and not (isinstance(grid, Int) and grid.qmax > 127)


def int_matmul(x_q_TN: Tensor, w_q_ON: Tensor) -> Tensor:
    """int8 [T, N] x int8 [O, N]^T -> float32 [T, O] of an exact int32 sum.

    On a GPU `torch._int_mm` wants more than 16 rows and multiples of 8; other shapes go through float64, which is
    exact as well (products below 2^14, sums below 2^53).
    """
    fits = x_q_TN.shape[0] > 16 and x_q_TN.shape[1] % 8 == 0 and w_q_ON.shape[0] % 8 == 0
    if x_q_TN.device.type == "cpu" or fits:
        return torch._int_mm(x_q_TN.contiguous(), w_q_ON.t()).float()
    return (x_q_TN.double() @ w_q_ON.double().t()).float()


def float_matmul(x_q_TN: Tensor, w_q_ON: Tensor) -> Tensor:
    """The same product of integer-valued floats, summed a run at a time so that every partial sum is exact."""
    x, w = x_q_TN.float(), w_q_ON.float()
    if x.shape[1] <= _EXACT_RUN:
        return x @ w.t()
    parts = zip(x.split(_EXACT_RUN, dim=1), w.split(_EXACT_RUN, dim=1))
    return sum((a @ b.t()).double() for a, b in parts).float()


def int_linear(
    x_q: Tensor,
    x_scale: Tensor,
    weight: IntegerWeight,
    bias: Tensor | None,
    matmul: Callable[[Tensor, Tensor], Tensor] = int_matmul,
) -> Tensor:
    """The formula above, a group at a time.

    Shapes: `x_q` [..., N] integers; `x_scale` [..., 1], or [1] for all; `bias` [O] or None. Returns float32 [..., O].
    """
    length = x_q.shape[-1]
    flat = x_q.reshape(-1, length)
    size = length if weight.group_size is None else weight.group_size
    y = torch.zeros((), device=flat.device)
    for group, start in enumerate(range(0, length, size)):
        columns = slice(start, min(start + size, length))
        part = matmul(flat[:, columns], weight.q[:, columns])
        if weight.shift is not None:
            part = part + flat[:, columns].sum(1, keepdim=True, dtype=torch.float32) * weight.shift[:, group]
        y = y + part * weight.scale[:, group]
    y = y * (x_scale.reshape(-1, 1) if x_scale.dim() > 1 else x_scale)
    y = y if bias is None else y + bias
    return y.reshape(*x_q.shape[:-1], y.shape[1])


def int_linear_reference(x_q: Tensor, x_scale: Tensor, weight: IntegerWeight, bias: Tensor | None) -> Tensor:
    """`int_linear` written as its formula, in float64 and without a product routine: the oracle of every backend."""
    size = x_q.shape[-1] if weight.group_size is None else weight.group_size
    group = torch.arange(x_q.shape[-1], device=x_q.device) // size
    rows = weight.q.shape[0]
    w = weight.q.double()
    if weight.shift is not None:
        w = w + weight.shift.double().expand(rows, -1)[:, group]
    w = w * weight.scale.double().expand(rows, -1)[:, group]
    y = (x_q.double()[..., None, :] * w).sum(-1) * x_scale.double()
    return y if bias is None else y + bias.double()
