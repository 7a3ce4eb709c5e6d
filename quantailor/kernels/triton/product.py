"""Which integer product a GPU takes: our fused one, or torch's (cuBLAS) and a pass that applies the scales.

The second writes 32-bit sums and reads them again, and pays where cuBLAS multiplies that much faster. It exists for one
scale a row, more than 16 rows and sizes that 8 divides. Both are timed once for sizes alike; their results are equal
bit for bit, so that nothing but the time depends on it.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantailor.kernels.triton import int_linear as fused
from quantailor.kernels.triton.common import INTERPRETED, SAME_BITS, blocks_of, launch, power_of_2
from quantailor.numerics.grouping import num_groups

_MOST_SUMS = 2**26  # 256 MiB of them
_BLOCK = 1024

Sizes = tuple[int, int, int]  # T, rounded up to a power of two, N, O
_found: dict[Sizes, tuple[float, float]] = {}  # milliseconds of ours and of torch's
_latest: dict[str, Sizes | None] = {"sizes": None}  # of the latest product; None: only ours does it


@triton.jit
def _scaled(sums, x_scale, w_scale, bias, y, out, x_row, w_row, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(sums + t * out + o, mask=o < out, other=0).to(tl.float32)
    total *= tl.load(w_scale + o * w_row, mask=o < out, other=0.0)
    total *= tl.load(x_scale + t * x_row)
    if bias is not None:
        total += tl.load(bias + o, mask=o < out, other=0.0).to(tl.float32)
    tl.store(y + t * out + o, total.to(y.dtype.element_ty), mask=o < out)


def by_torch(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`fused.int_linear` of one scale a row each, x_scale [T, 1] or [1, 1] and w_scale [O, 1] or [1, 1]."""
    sums = torch._int_mm(x_q.contiguous(), w_q.contiguous().t())
    rows, out = sums.shape
    y = torch.empty((rows, out), dtype=dtype, device=x_q.device)
    launch(
        *(_scaled, (rows, blocks_of(out, _BLOCK)), sums, x_scale.contiguous(), w_scale.contiguous()),
        *(None if bias is None else bias.contiguous(), y, out, int(x_scale.shape[0] > 1), int(w_scale.shape[0] > 1)),
        options=SAME_BITS, BLOCK=_BLOCK,
    )  # fmt: skip
    return y


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
    """`fused.int_linear`, by the faster of the two."""

    def ours() -> Tensor:
        return fused.int_linear(
            x_q, x_scale, w_q, w_scale, shift, x_group_size, w_group_size, floats, bias, dtype
        )  # fmt: skip

    def torchs() -> Tensor:
        return by_torch(x_q, x_scale, w_q, w_scale, bias, dtype)

    (rows, length), out = x_q.shape, w_q.shape[0]
    scaled_once = shift is None and floats is None and x_group_size is None and num_groups(length, w_group_size) == 1
    fits = rows > 16 and length % 8 == 0 and out > 0 and out % 8 == 0 and rows * out <= _MOST_SUMS
    _latest["sizes"] = None
    if not (scaled_once and fits and length and dtype in fused.OUTPUTS):
        return ours()
    sizes = (power_of_2(rows), length, out)
    if sizes not in _found:
        if x_q.is_cuda and torch.cuda.is_current_stream_capturing():  # into a graph, where nothing can be timed
            return ours()
        _found[sizes] = _milliseconds(ours), _milliseconds(torchs)
    _latest["sizes"] = sizes
    of_ours, of_torch = _found[sizes]
    return ours() if of_ours <= of_torch else torchs()


def told() -> str:
    """Which of the two took the latest product, with the times that decided it."""
    if (sizes := _latest["sizes"]) is None:
        return "our GPU kernel (torch's product takes no groups, shifts, few rows or odd sizes)"
    of_ours, of_torch = _found[sizes]
    if of_ours <= of_torch:
        return f"our GPU kernel ({of_ours:.3f} ms; torch's product and a pass for scales {of_torch:.3f})"
    return f"torch's product and a pass for scales ({of_torch:.3f} ms; our GPU kernel {of_ours:.3f})"


def _milliseconds(run: Callable[[], Tensor]) -> float:
    """Of one call; 0 in the interpreter, where there is nothing to measure and ours is taken."""
    return 0.0 if INTERPRETED else float(triton.testing.do_bench(run, warmup=5, rep=20))
