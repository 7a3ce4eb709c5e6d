"""What several kernels need: rounding as torch rounds, and a launch on the tensors' own device."""

import contextlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
# A fused multiply-add rounds once where torch rounds twice, so kernels that give torch's bits are compiled without.
SAME_BITS = {"enable_fp_fusion": False}


@triton.jit
def rounded(v):
    """The nearest integer, ties to the even one, of |v| < 2^22: beyond 2^23 float32 holds integers alone.

    Larger values come out near themselves, which is all that a clamp behind this needs.
    """
    return (v + 12582912.0) - 12582912.0  # 1.5 * 2^23


@triton.jit
def clamped(v, low, high):
    """`v` within [low, high]; NaN stays NaN, as in torch."""
    return tl.where(v < low, low, tl.where(v > high, high, v))


def device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Within: launches go to the GPU that `x` is on (Triton takes the current one)."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


Grid = Callable[[dict[str, Any]], tuple[int, ...]]
_fastest: dict[Hashable, triton.Config] = {}


def launch(kernel: Any, alike: Hashable, grid: Grid, *args: Any, **named: Any) -> None:
    """Launch an autotuned kernel. `alike`: what its choice of a block depends on, so that the tuner, whose own look-up
    takes as long as a launch, is asked once."""
    known = _fastest.get((kernel, alike))
    if known is None:
        kernel[grid](*args, **named)
        _fastest[kernel, alike] = kernel.best_config
    else:
        kernel.fn[grid](*args, **named, **known.all_kwargs())
