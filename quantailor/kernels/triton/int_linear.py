"""int8 x int8 -> int32 with scales, shifts and bias applied before a sum leaves the chip: ops.int_linear, fused.

A program makes a block of results. Along N it goes group by group: products of integers are summed exactly, then turned
into floats and scaled in the order that ops.py lays down, without fused multiply-adds, so that the bits are the same.
Which block is fastest is measured once for sizes alike (Triton's autotuner) and kept on disk; no result depends on it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantailor.kernels.triton.common import INTERPRETED, SAME_BITS, blocks_of, launch, power_of_2
from quantailor.numerics.grouping import num_groups

OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)
_BAND = tl.constexpr(8)  # blocks of rows that take turns with one block of weights, while it lies in the second cache


def _config(rows: int, out: int, length: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_T": rows, "BLOCK_O": out, "LONGEST": length}, num_warps=warps, num_stages=stages)


CONFIGS = [
    _config(16, 64, 128, 4, 4),
    _config(16, 128, 128, 4, 4),
    _config(32, 128, 128, 4, 4),
    _config(64, 64, 128, 4, 4),
    _config(64, 128, 128, 4, 4),
    _config(128, 128, 128, 4, 3),
    _config(128, 128, 64, 4, 6),
    _config(128, 128, 128, 8, 4),
    _config(128, 256, 128, 8, 3),
    _config(256, 128, 128, 8, 3),
]


def _worth_trying(configs: list[triton.Config], named: dict, **more: object) -> list[triton.Config]:
    """Blocks of about as many rows as there are: tall ones for few rows would only multiply zeros. With groups each
    result takes two registers, a sum of integers and one of floats: 64 results a thread are the most without spilling.
    """
    rows, most = named["tuned_rows"], 128 if named["groups"] == 1 else 64

    def is_fit(config: triton.Config) -> bool:
        tall, wide, long = (config.kwargs[name] for name in ("BLOCK_T", "BLOCK_O", "LONGEST"))
        fits = tall <= max(16, rows) and (rows < 256 or tall >= 64) and tall * wide <= most * 32 * config.num_warps
        return fits and (long == 128 or more["BLOCK_N"] == 128)

    return [config for config in configs if is_fit(config)]


@triton.autotune(
    CONFIGS[:1] if INTERPRETED else CONFIGS,  # there is nothing to measure in the interpreter
    key=["tuned_rows", "out", "length", "size"],
    prune_configs_by={"early_config_prune": _worth_trying},
    cache_results=True,
)
@triton.jit
def _int_linear(
    x_q, x_scale, w_q, w_scale, shift, floats, bias, y,
    rows, out, length, groups, size, x_row, w_row, tuned_rows,
    X_GROUPS: tl.constexpr, W_GROUPS: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = min(BLOCK_N, LONGEST)
    t_blocks, o_blocks = tl.cdiv(rows, BLOCK_T), tl.cdiv(out, BLOCK_O)
    turn = tl.program_id(0)
    t_block, o_block = tl.swizzle2d(turn // o_blocks, turn % o_blocks, t_blocks, o_blocks, _BAND)
    t = (t_block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    o = (o_block * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x_at, w_at = x_q + t[:, None] * length, w_q + o[None, :] * length
    total = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for group in range(groups):
        stop = tl.minimum(group * size + size, length)
        sums = tl.zeros([BLOCK_T, BLOCK_O], tl.int32)
        x_sum = tl.zeros([BLOCK_T], tl.int32)
        for start in range(0, size, BLOCK):
            n = group * size + start + columns
            t_here, o_here = (t < rows)[:, None], (o < out)[None, :]
            if not EVEN:
                t_here, o_here = t_here & (n < stop)[None, :], o_here & (n < stop)[:, None]
            x = tl.load(x_at + n[None, :], mask=t_here, other=0)
            sums = tl.dot(x, tl.load(w_at + n[:, None], mask=o_here, other=0), sums, out_dtype=tl.int32)
            if shift is not None:
                x_sum += tl.sum(x.to(tl.int32), 1)
        place = group if W_GROUPS else 0
        part = sums.to(tl.float32)
        if shift is not None:
            moved = tl.load(shift + o * w_row + place, mask=o < out, other=0.0)
            part += x_sum.to(tl.float32)[:, None] * moved[None, :]
        part *= tl.load(w_scale + o * w_row + place, mask=o < out, other=0.0)[None, :]
        if X_GROUPS:
            part *= tl.load(x_scale + t * x_row + group, mask=t < rows, other=0.0)[:, None]
        total += part
    if not X_GROUPS:
        total *= tl.load(x_scale + t * x_row, mask=t < rows, other=0.0)[:, None]
    here = (t < rows)[:, None] & (o < out)[None, :]
    if floats is not None:
        total += tl.load(floats + t[:, None] * out + o[None, :], mask=here, other=0.0)
    if bias is not None:
        total += tl.load(bias + o, mask=o < out, other=0.0).to(tl.float32)[None, :]
    tl.store(y + t[:, None] * out + o[None, :], total.to(y.dtype.element_ty), mask=here)


def int_linear(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    shift: Tensor | None,
    x_group_size: int | None,
    w_group_size: int | None,
    floats: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y [T, O] in `dtype`, rounded from float32, of x_q int8 [T, N] and w_q int8 [O, N].

    x_scale float32 [T, G], [T, 1] or [1, 1]; w_scale and shift [O, G], [O, 1] or [1, 1]; G groups of the size that
    either side names (both the same), one a row where it names none. `floats` float32 [T, O] is added before the bias.
    """
    (rows, length), out = x_q.shape, w_q.shape[0]
    size = min(w_group_size or x_group_size or length, length)
    y = torch.empty((rows, out), dtype=dtype if dtype in OUTPUTS else torch.float32, device=x_q.device)
    if not y.numel():
        return y.to(dtype)
    if shift is not None:
        w_scale, shift = (value.contiguous() for value in torch.broadcast_tensors(w_scale, shift))
    block = min(128, max(32, power_of_2(size)))  # 32 is the least that tensor cores take of int8
    sides = (x_q.contiguous(), x_scale.contiguous(), w_q.contiguous(), w_scale.contiguous(), shift)
    counts = (rows, out, length, num_groups(length, size), size)
    steps = (0 if scale.shape[0] == 1 else scale.shape[1] for scale in (x_scale, w_scale))
    alike = power_of_2(rows)
    launch(
        *(_int_linear, lambda of: (blocks_of(rows, of["BLOCK_T"]) * blocks_of(out, of["BLOCK_O"]),)),
        *(*sides, floats, None if bias is None else bias.contiguous(), y, *counts, *steps, alike),
        alike=(alike, out, length, size), options=SAME_BITS,
        X_GROUPS=x_group_size is not None, W_GROUPS=w_group_size is not None,
        EVEN=size % block == 0 and length % size == 0, BLOCK_N=block,
    )  # fmt: skip
    return y.to(dtype)
