"""In Triton's interpreter (tests/kernels/triton) bfloat16 is rounded as hardware rounds it."""

import numpy as np
import torch

from quantailor.kernels.triton import library as gpu


def _mend_bfloat16() -> None:
    """The interpreter cuts float32 off where a GPU rounds to the nearest, ties to even: bits could not be compared."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, of, to, rounding_mode):
        if (of, to) != (tl.float32, tl.bfloat16):
            return convert(values, of, to, rounding_mode)
        return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = rounded


if gpu.interprets():
    _mend_bfloat16()
