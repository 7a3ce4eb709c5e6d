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

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantailor.kernels import panels, tiles
from quantailor.kernels.native import library as native
from quantailor.kernels.operators import opaque
from quantailor.kernels.triton import library as gpu
from quantailor.numerics.grouping import from_groups, to_groups
from quantailor.spec import NF4, Grid, Int

_MOST_SUMS = 4 * 2**20  # 16 MiB of 32-bit sums at a time
_EXACT_RUN = 1024  # products of at most 2^14 that float32 sums exactly: 2^24 / 2^14


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as the product takes it: `q` [O, N], `scale` [O, G] or [1, 1], `shift` [O, G] = offset - zero_point
    or None if all zero, groups of `group_size` along N (None: one)."""

    q: Tensor
    scale: Tensor
    shift: Tensor | None
    group_size: int | None

    def dequantize(self) -> Tensor:
        """float32 [O, N]."""
        q = to_groups(self.q, self.group_size).float()
        shifted = q if self.shift is None else q + self.shift.unsqueeze(-1)
        return from_groups(shifted * self.scale.unsqueeze(-1), self.q.shape[1])


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

    On a GPU (where our own kernel does not run: kernels/triton) `torch._int_mm` wants more than 16 rows and multiples
    of 8; other shapes go through float64, which is exact as well (products below 2^14, sums below 2^53). On a processor
    without an instruction for int8 products it is a plain loop, at 1/25 of the speed of exact float sums (measured with
    AVX2, 512 x 384 x 1536); there our own panels do it, or float sums where these are not to be had.
    """
    if x_q_TN.device.type == "cpu" and not multiplies_int8():
        return (panels.panel_product if panels.fits(x_q_TN, w_q_ON) else float_matmul)(x_q_TN, w_q_ON)
    fits = x_q_TN.shape[0] > 16 and x_q_TN.shape[1] % 8 == 0 and w_q_ON.shape[0] % 8 == 0
    if x_q_TN.device.type == "cpu" or fits:
        return torch._int_mm(x_q_TN.contiguous(), w_q_ON.t()).float()
    return (x_q_TN.double() @ w_q_ON.double().t()).float()


@functools.cache
def multiplies_int8() -> bool:
    """Whether this processor has an instruction for int8 products that torch or our tiles use, and torch is right.

    Where ONEDNN_MAX_CPU_ISA keeps oneDNN from that instruction, torch 2.13 takes a path that is wrong.
    """
    return (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()) and _is_exact(torch._int_mm)


def _is_exact(product: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Of a product of int8 matrices: whether it sums the extreme integers, odd sizes too, as int64 does."""
    for rows, inner, columns in ((1, 8, 8), (17, 33, 5), (32, 128, 64)):
        x = _extremes((-128, 127, 127, -128, -1), rows, inner)
        w = _extremes((127, 127, -128, -128, 3, -128, 1), columns, inner).t()
        if not torch.equal(product(x.to(torch.int8), w.to(torch.int8)).long(), x @ w):
            return False
    return True


def _extremes(values: tuple[int, ...], rows: int, columns: int) -> Tensor:
    """`values` over and over, int64 [rows, columns]."""
    return torch.tensor(values, device="cpu").repeat(rows * columns)[: rows * columns].view(rows, columns)


def product_here(device: str = "cpu", *, has_run: bool = False) -> str:
    """Which exact product of int8 a device of this type takes here, with the reason where it is not our fastest.

    A GPU chooses by size, so it is asked about a product that `has_run` just now, or tells both.
    """
    if device == "cuda":
        if reason := gpu.why_not(device):
            return f"torch's products ({reason})"
        return str(gpu.kernels().told()) if has_run else "our GPU kernel or torch's product, the faster at its size"
    if native.has_tiles():
        return "AMX tiles"
    if multiplies_int8():
        return "torch's int8 product"
    return "AVX2 panels" if not (reason := panels.why_not()) else f"exact float sums ({reason})"


def float_matmul(x_q_TN: Tensor, w_q_ON: Tensor) -> Tensor:
    """The same product of integer-valued floats, summed a run at a time so that every partial sum is exact."""
    x, w = x_q_TN.float(), w_q_ON.float()
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round integers
        if x.shape[1] <= _EXACT_RUN:
            return x @ w.t()
        parts = zip(x.split(_EXACT_RUN, dim=1), w.split(_EXACT_RUN, dim=1))
        return sum((a @ b.t()).double() for a, b in parts).float()


def int_linear(
    x: IntegerInput,
    weight: IntegerWeight,
    bias: Tensor | None,
    matmul: Callable[[Tensor, Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The formula above. `bias` [O] or None. Returns [..., O] in `dtype`, rounded from float32.

    `matmul` None: the fastest exact product that this machine has for these shapes; the result does not depend on it,
    nor on autocast.
    Raises: ValueError where both sides have groups and not of one size.
    """
    if opaque(x.q) and matmul is None:
        left, right = (x.q, x.scale, x.group_size, x.columns, x.values), (weight.q, weight.scale, weight.shift)
        return _as_operator(*left, *right, weight.group_size, bias, dtype)
    length = x.q.shape[-1]
    flat, of_weight, of_input = x.q.reshape(-1, length), weight.group_size, x.group_size
    if of_weight is not None and of_input is not None and of_weight != of_input:
        raise ValueError(f"groups of {of_weight} weights and of {of_input} activations have no common integer sums")
    if matmul is None and gpu.takes(flat, weight.q, x.scale, weight.scale):
        floats = None if x.columns is None else _float_columns(x, weight)
        x_scale = x.scale.reshape(-1, x.scale.shape[-1])
        sides = (flat, x_scale, weight.q, weight.scale, weight.shift, of_input, of_weight)
        y = gpu.kernels().int_linear(*sides, floats, bias, dtype)
        return y.reshape(*x.q.shape[:-1], y.shape[1])
    if matmul is None and of_input is None and x.columns is None:
        parts = (flat, x.scale.reshape(-1), weight.q, weight.scale, weight.shift, of_weight, bias)
        if tiles.fits(flat, weight.q, of_weight):
            y = tiles.tile_linear(*parts, dtype == torch.bfloat16).to(dtype)
            return y.reshape(*x.q.shape[:-1], y.shape[1])
        if not multiplies_int8() and panels.fits(flat, weight.q):
            kind = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
            y = panels.panel_linear(*parts, out=torch.empty((flat.shape[0], weight.q.shape[0]), dtype=kind)).to(dtype)
            return y.reshape(*x.q.shape[:-1], y.shape[1])
    x_scale = x.scale.reshape(-1, x.scale.shape[-1])  # [T, G], [T, 1] or [1, 1]
    y = torch.empty((flat.shape[0], weight.q.shape[0]), dtype=dtype, device=flat.device)
    floats = None if x.columns is None else _float_columns(x, weight)
    # A run of rows at a time: a 32-bit result of more than 32 MiB would be mapped and page-faulted anew at each call.
    run = max(1, _MOST_SUMS // max(1, weight.q.shape[0]))
    for start in range(0, flat.shape[0], run):
        rows = slice(start, start + run)
        of_rows = x_scale if x_scale.shape[0] == 1 else x_scale[rows]
        part = _scaled_sums(flat[rows], of_rows, weight, of_input, matmul or int_matmul)
        part = part if floats is None else part + floats[rows]
        y[rows] = part if bias is None else part + bias
    return y.reshape(*x.q.shape[:-1], y.shape[1])


@torch.library.custom_op("quantailor::int_linear", mutates_args=())
def _as_operator(
    x_q: Tensor,
    x_scale: Tensor,
    x_group_size: int | None,
    columns: Tensor | None,
    values: Tensor | None,
    w_q: Tensor,
    w_scale: Tensor,
    shift: Tensor | None,
    group_size: int | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`int_linear` with its sides spread out: what a compiled graph holds."""
    x = IntegerInput(x_q, x_scale, x_group_size, columns, values)
    return int_linear(x, IntegerWeight(w_q, w_scale, shift, group_size), bias, None, dtype)


@_as_operator.register_fake
def _(x_q: Tensor, *rest: Any) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], rest[4].shape[0]), dtype=rest[-1])


def _scaled_sums(
    q: Tensor,
    x_scale: Tensor,
    weight: IntegerWeight,
    of_input: int | None,
    matmul: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The products of integers, times both scales: float32 [T, O], a group at a time."""
    length = q.shape[1]
    size = weight.group_size or of_input or length
    y = torch.zeros((), device=q.device)
    for group, start in enumerate(range(0, length, size)):
        columns = slice(start, min(start + size, length))
        part = matmul(q[:, columns], weight.q[:, columns])
        place = 0 if weight.group_size is None else group
        if weight.shift is not None:
            part = part + q[:, columns].sum(1, keepdim=True, dtype=torch.float32) * weight.shift[:, place]
        part = part * weight.scale[:, place]
        y = y + (part if of_input is None else part * x_scale[:, group : group + 1])
    return y * x_scale if of_input is None else y


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
