"""Tokens to integers, one scale a token. A row of up to 8192 is read once and stays in registers; a longer one is read
for its largest magnitude and once more, out of the caches."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantailor.kernels.triton.common import SAME_BITS, clamped, launch, power_of_2, rounded

_LARGEST = torch.finfo(torch.float32).max
_LARGEST_FLOAT = tl.constexpr(_LARGEST)


@triton.jit
def _quantize_tokens(x, q, scale, length, steps_of_range, most, qmin, qmax, BLOCK: tl.constexpr, ONCE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)
    if ONCE:
        v = tl.load(x + row * length + columns, mask=columns < length, other=0.0).to(tl.float32)
        largest = tl.abs(v)
        broken = tl.where(largest <= _LARGEST_FLOAT, 0, 1)  # NaN is not
        largest = tl.where(largest > 0, largest, 0.0)  # nor larger than anything
    else:
        for start in range(0, length, BLOCK):
            n = start + columns
            size = tl.abs(tl.load(x + row * length + n, mask=n < length, other=0.0).to(tl.float32))
            broken |= tl.where(size <= _LARGEST_FLOAT, 0, 1)
            largest = tl.where(size > largest, size, largest)
    step = tl.div_rn(tl.max(largest, 0), steps_of_range)
    step = tl.where(step > most, most, step)
    step = tl.where(tl.div_rn(1.0, step) <= _LARGEST_FLOAT, step, 1.0)  # a zero row, or one of denormals
    if ONCE:
        level = clamped(rounded(tl.div_rn(v, step)), qmin, qmax)
        tl.store(q + row * length + columns, level.to(tl.int8), mask=columns < length)
    else:
        for start in range(0, length, BLOCK):
            n = start + columns
            v = tl.load(x + row * length + n, mask=n < length, other=0.0).to(tl.float32)
            level = clamped(rounded(tl.div_rn(v, step)), qmin, qmax)
            tl.store(q + row * length + n, level.to(tl.int8), mask=n < length)
    tl.store(scale + row, tl.where(tl.max(broken, 0) > 0, float("nan"), step))


def quantize_tokens(x: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """passes.quantize_tokens, bit for bit: x [..., N] -> q int8 [..., N], scale float32 [..., 1]."""
    x = x.contiguous()
    length = x.shape[-1]
    q = torch.empty_like(x, dtype=torch.int8)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if not x.numel():
        return q, scale.fill_(1.0)
    steps, most = (qmax - qmin) / 2, _LARGEST / ((qmax - qmin + 2) // 2)
    block = min(power_of_2(length), 8192)
    launch(
        *(_quantize_tokens, (scale.numel(),), x, q, scale, length, steps, most, float(qmin), float(qmax)),
        options=SAME_BITS | {"num_warps": 8 if block > 1024 else 4}, BLOCK=block, ONCE=length <= block,
    )  # fmt: skip
    return q, scale
