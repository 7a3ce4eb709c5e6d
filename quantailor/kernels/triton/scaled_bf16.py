"""Rows of numbers times a scale each, in bfloat16: what a gradient is multiplied by. Two matrices of one length, the
weight's integers and the input's, go in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantailor.kernels.triton.common import SAME_BITS, blocks_of, launch, power_of_2

_MOST = 4096  # elements to a program


@triton.jit
def _row(q, scale, y, row, step, length, BLOCK: tl.constexpr):
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(q + row * length + n, mask=n < length, other=0).to(tl.float32)
    if scale is not None:
        v *= tl.load(scale + row * step)
    tl.store(y + row * length + n, v.to(tl.bfloat16), mask=n < length)


@triton.jit
def _scaled_bf16(q, scale, y, step, q_2, scale_2, y_2, step_2, rows, length, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if row < rows:
        _row(q, scale, y, row, step, length, BLOCK)
    else:
        _row(q_2, scale_2, y_2, row - rows, step_2, length, BLOCK)


def scaled_bf16(w: Tensor, w_scale: Tensor | None, x: Tensor, x_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(w [O, N] times w_scale [O] or None, x [T, N] times x_scale [T] or [1]), rounded once to bfloat16."""
    w, x = w.contiguous(), x.contiguous()
    w_hat, x_hat = (torch.empty_like(t, dtype=torch.bfloat16) for t in (w, x))
    (out, length), rows = w.shape, x.shape[0]
    block = min(power_of_2(max(1, length)), _MOST)
    if length and out + rows:
        launch(
            *(_scaled_bf16, (out + rows, blocks_of(length, block)), w),
            *(None if w_scale is None else w_scale.contiguous(), w_hat, 1, x, x_scale.contiguous(), x_hat),
            *(int(x_scale.numel() > 1), out, length),
            options=SAME_BITS | {"num_warps": 8 if block > 1024 else 4}, BLOCK=block,
        )  # fmt: skip
    return w_hat, x_hat
