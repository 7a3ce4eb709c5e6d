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


def blocks_of(number: int, size: int) -> int:
    """How many blocks of `size` hold `number` elements: triton.cdiv without its wrapper, which takes microseconds."""
    return -(-number // size)


def power_of_2(number: int) -> int:
    """The least power of two that is not below `number`, 1 or more."""
    return 1 << max(0, number - 1).bit_length()


Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]
_compiled: dict[Hashable, tuple[Any, dict[str, Any]]] = {}  # and the constants that it was compiled with


def launch(
    kernel: Any, grid: Grid, *args: Any, alike: Hashable = (), options: dict[str, Any], **constants: Any
) -> None:
    """Launch `kernel` on the device of its first argument, a tensor. `constants` as the kernel declares them, last.

    Triton's own launcher looks at every argument in Python, and a tuner besides, which takes longer than many a kernel
    runs. What it compiled is kept for arguments that it would take for the same, and called directly. `alike`: the
    numbers that a tuned kernel's choice of a block depends on.
    """
    if INTERPRETED:
        kernel[grid](*args, **constants, **options)
        return
    device = args[0].device.index
    key = (id(kernel), device, alike, *constants.values(), *[_kind(value) for value in args])
    known = _compiled.get(key)
    with contextlib.nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device):
        if known is None:
            compiled = kernel[grid](*args, **constants, **options)
            chosen = kernel.best_config.kwargs if hasattr(kernel, "best_config") else {}
            _compiled[key] = compiled, constants | chosen
            return
        compiled, constants = known
        x, y, z = (*(grid(constants) if callable(grid) else grid), 1, 1)[:3]
        compiled[x, y, z](*args, *constants.values())


def _kind(value: Any) -> Hashable:
    """What Triton compiles for: a type, and whether addresses and numbers divide by 16 or are 1."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return value % 16 == 0, value == 1, value >= 2**31
    return type(value).__name__
