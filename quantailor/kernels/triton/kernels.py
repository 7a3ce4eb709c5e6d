"""All launchers in one place: what `library` imports once Triton is there.

A launcher takes torch tensors on one GPU, makes them contiguous, and calls its kernel on their device.
"""

import torch

from quantailor.kernels.triton.decode import decode_linear
from quantailor.kernels.triton.fake_quantize import fake_quantize_weight, quantize_weight
from quantailor.kernels.triton.lsq_backward import lsq_backward
from quantailor.kernels.triton.product import int_linear, told
from quantailor.kernels.triton.quantize_tokens import quantize_tokens
from quantailor.kernels.triton.scaled_bf16 import scaled_bf16

__all__ = [
    "decode_linear",
    "fake_quantize_weight",
    "int_linear",
    "lsq_backward",
    "quantize_tokens",
    "quantize_weight",
    "scaled_bf16",
    "told",
    "try_out",
]


def try_out() -> None:
    """Compile and run the smallest kernel. Raises: whatever Triton raises where it cannot."""
    q, _ = quantize_tokens(torch.tensor([[2.0, -1.0]], device="cuda"), -128, 127)
    if q.tolist() != [[127, -64]]:
        raise RuntimeError(f"a kernel gave {q.tolist()} for [[127, -64]]")
