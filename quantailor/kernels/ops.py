"""Integer products: one schema, a readable reference, and the torch backends that run it.

    y[t, o] = x_scale[t] * sum_G w_scale[o, G] * sum_{n in G} x_q[t, n] * (w_q[o, n] + shift[o, G]) + bias[o]

With a scale for each group of a token's inputs, x_scale[t, G] stands inside the sum over G; the weight then has groups
of the same size, or one scale a row. Where input columns K are kept in float (LLM.int8, arXiv:2208.07339, Eq. 8), x_q
is 0 there and sum_{n in K} x[t, n] * w_hat[o, n] is added, w_hat being the dequantized weight: no float copy of its
columns is stored.

The inner sum is exact; scales come afterwards, in float32 and always in this order, so that the simulated forward of
training and the packed one of serving give the same bits. Axes: T tokens (any leading axes), N in, O out, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantailor.numerics.grouping import from_groups, to_groups
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


@dataclass(frozen=True)
class IntegerInput:
    """An activation as the product takes it: `q` int8 [..., N]; `scale` float32 [..., G], G = 1 without groups, or [1]
    for all; groups of `group_size` along N (None: one).

    Columns kept in float: `columns` their indices [K], rising, `values` float32 [..., K]; both None where there is no
    such thing. Their `q` is 0.
    """

    q: Tensor
    scale: Tensor
    group_size: int | None = None
    columns: Tensor | None = None
    values: Tensor | None = None

    def dequantize(self) -> Tensor:
        """float32 [..., N]: integers times their scales, and what was kept in float."""
        if self.group_size is None:
            x_hat = self.q * self.scale
        else:
            x_hat = from_groups(to_groups(self.q, self.group_size) * self.scale.unsqueeze(-1), self.q.shape[-1])
        if self.columns is not None and self.values is not None:
            x_hat = x_hat.index_copy(-1, self.columns, self.values)
        return x_hat


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
    x: IntegerInput,
    weight: IntegerWeight,
    bias: Tensor | None,
    matmul: Callable[[Tensor, Tensor], Tensor] = int_matmul,
) -> Tensor:
    """The formula above, a group at a time. `bias` [O] or None. Returns float32 [..., O].

    Raises: ValueError where both sides have groups and not of one size.
    """
    length = x.q.shape[-1]
    flat, of_weight, of_input = x.q.reshape(-1, length), weight.group_size, x.group_size
    if of_weight is not None and of_input is not None and of_weight != of_input:
        raise ValueError(f"groups of {of_weight} weights and of {of_input} activations have no common integer sums")
    size = of_weight or of_input or length
    x_scale = x.scale.reshape(-1, x.scale.shape[-1])  # [T, G], [T, 1] or [1, 1]
    y = torch.zeros((), device=flat.device)
    for group, start in enumerate(range(0, length, size)):
        columns = slice(start, min(start + size, length))
        part = matmul(flat[:, columns], weight.q[:, columns])
        place = 0 if of_weight is None else group
        if weight.shift is not None:
            part = part + flat[:, columns].sum(1, keepdim=True, dtype=torch.float32) * weight.shift[:, place]
        part = part * weight.scale[:, place]
        y = y + (part if of_input is None else part * x_scale[:, group : group + 1])
    y = y * x_scale if of_input is None else y
    y = y if x.columns is None else y + _float_columns(x, weight)
    y = y if bias is None else y + bias
    return y.reshape(*x.q.shape[:-1], y.shape[1])


def _float_columns(x: IntegerInput, weight: IntegerWeight) -> Tensor:
    """sum_{n in K} x[t, n] * w_hat[o, n], float32 [T, O]. Few columns of the weight are dequantized for it."""
    assert x.columns is not None and x.values is not None
    group = torch.zeros_like(x.columns) if weight.group_size is None else x.columns // weight.group_size
    w_hat = weight.q.index_select(1, x.columns).float()
    if weight.shift is not None:
        w_hat = w_hat + weight.shift.index_select(1, group)
    w_hat = w_hat * weight.scale.index_select(1, group)
    with torch.autocast(w_hat.device.type, enabled=False):  # what is kept in float is not to be rounded after all
        return x.values.reshape(x.q.shape[:-1].numel(), len(x.columns)) @ w_hat.t()


def int_linear_reference(x: IntegerInput, weight: IntegerWeight, bias: Tensor | None) -> Tensor:
    """`int_linear` written as its formula, in float64 and without a product routine: the oracle of every backend."""
    length, rows = x.q.shape[-1], weight.q.shape[0]
    at = torch.arange(length, device=x.q.device)
    group = at // (weight.group_size or length)
    w = weight.q.double()
    if weight.shift is not None:
        w = w + weight.shift.double().expand(rows, -1)[:, group]
    w = w * weight.scale.double().expand(rows, -1)[:, group]
    x_hat = x.q.double() * x.scale.double()[..., at // (x.group_size or length)]
    for place, column in enumerate([] if x.columns is None else x.columns.tolist()):
        assert x.values is not None
        x_hat[..., column] = x.values[..., place].double()
    y = (x_hat[..., None, :] * w).sum(-1)
    return y if bias is None else y + bias.double()
