"""A gradient twice in bfloat16, read once: with the weight's scales as it lies, with the input's scales turned."""

import triton
import triton.language as tl
from torch import Tensor

from quantailor.kernels.triton.common import SAME_BITS, device_of

_BLOCK = 64


@triton.jit
def _fold_scales(grad, w_scale, x_scale, for_x, for_w, rows, out, x_step, BLOCK: tl.constexpr):
    t = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    o = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    here = (t < rows)[:, None] & (o < out)[None, :]
    given = tl.load(grad + t[:, None] * out + o[None, :], mask=here, other=0.0).to(tl.float32)
    of_input = given * tl.load(x_scale + t * x_step, mask=t < rows, other=0.0)[:, None]
    tl.store(for_w + o[:, None] * rows + t[None, :], tl.trans(of_input).to(tl.bfloat16), mask=tl.trans(here))
    if w_scale is not None:
        given = given * tl.load(w_scale + o, mask=o < out, other=0.0)[None, :]
    tl.store(for_x + t[:, None] * out + o[None, :], given.to(tl.bfloat16), mask=here)


def fold_scales(grad: Tensor, w_scale: Tensor | None, x_scale: Tensor, for_x: Tensor, for_w: Tensor) -> None:
    """passes.fold_scales, bit for bit, of grad [T, O] into `for_x` [T, O] and `for_w` [O, T], contiguous bfloat16."""
    grad, x_scale = grad.contiguous(), x_scale.contiguous()
    w_scale = None if w_scale is None else w_scale.contiguous()
    rows, out = grad.shape
    if grad.numel():
        with device_of(grad):
            _fold_scales[(triton.cdiv(rows, _BLOCK), triton.cdiv(out, _BLOCK))](
                *(grad, w_scale, x_scale, for_x, for_w, rows, out, int(x_scale.numel() > 1)), BLOCK=_BLOCK, **SAME_BITS
            )
