"""A low-rank adapter inside the rounding: the trained weight lies on the grid at every step, so a merge is exact.

    v     = q + r / 2^f                                        the frozen base, in steps of the grid
    q'    = clip(round(v + (alpha / R) * (B A) / s), qmin, qmax)   the integers that are trained, and served
    w_hat = s' * (q' - zero_point + offset)

q are integers on the weight's own grid, r the fraction of a step that rounding threw away, in f bits: together a
fixed-point number of (bits + f) bits. s is the scale that calibration found and stays as it is inside the rounding; s'
is s until training moves it. A [R, N], B [O, R] are in units of the weight, as in LoRA, so that an adapter's file means
the same everywhere.

    dL/d(B A) = (alpha / R) * (s' / s) * dL/dw_hat   where the rounded value lies on the grid, 0 where it was clipped
    dL/ds'    = sum over what shares s' of dL/dw_hat * (q' - zero_point + offset)

Source: Bondarenko et al. 2024 (LR-QAT), arXiv:2406.06385, Eq. 5-8 and section 4 (fixed-point downcast); there A and B
are in units of s. LoftQ: Li et al. 2023, arXiv:2310.08659, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def fraction(v: Tensor, q: Tensor, bits: int, qmin: int, qmax: int) -> Tensor:
    """The fraction r of `v` (real, in steps, zero point included) beside its integers `q`, in `bits` bits, as int32.

    q + r / 2^bits rounds to q again: r stays within half a step, ties excluded, and inside the outermost levels, so
    that nothing starts on the edge where it would be clipped. Shapes: all [*]. With fewer than 2 bits there is nothing
    between a level and the tie beside it, and r is 0.

    >>> fraction(torch.tensor([2.26, 2.5, -8.4]), torch.tensor([2, 2, -8]), 4, -8, 7)
    tensor([4, 7, 1], dtype=torch.int32)
    """
    half = 2 ** (bits - 1) if bits else 0
    if half < 2:
        return torch.zeros_like(q, dtype=torch.int32)
    r = torch.round((v - q.to(v.dtype)) * 2**bits).clamp(1 - half, half - 1)
    r = torch.where(q == qmin, r.clamp(min=1), r)
    return torch.where(q == qmax, r.clamp(max=-1), r).to(torch.int32)


def loftq(
    weight_ON: Tensor, quantize: Callable[[Tensor], Tensor], rank: int, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, A, B): a quantized base and an adapter with Q + B A near `weight_ON`, found in turns.

        Q_t = q(W - B_t-1 A_t-1),    B_t A_t = the best approximation of W - Q_t of this rank (SVD)

    `quantize` maps [O, N] onto a grid and back. Returns Q [O, N], A [rank, N], B [O, rank], the singular values shared
    out evenly. Source: arXiv:2310.08659, Algorithm 1 (A and B are called B^T and A there).
    """
    w = weight_ON.float()
    a, b = w.new_zeros(rank, w.shape[1]), w.new_zeros(w.shape[0], rank)
    on_grid = quantize(w)
    for turn in range(iterations):
        if turn:
            on_grid = quantize(w - b @ a)
        u, sigma, v_t = torch.linalg.svd(w - on_grid, full_matrices=False)
        root = sigma[:rank].sqrt()
        b, a = u[:, :rank] * root, root[:, None] * v_t[:rank]
    return on_grid, a, b
