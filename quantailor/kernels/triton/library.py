"""Whether our GPU kernels run here, and why not; this file imports Triton only once tensors on a GPU ask for it.

Triton is an extra (`pip install quantailor[gpu]`), and comes along with torch's CUDA builds for Linux. Without it, or
with QUANTAILOR_TRITON=0, torch operators do the same; `why_not` tells the reason. With TRITON_INTERPRET=1, which has to
be set before Triton is first imported, the kernels run on CPU tensors in Triton's interpreter, slowly: for tests.
"""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

_OFF = ("0", "off", "no")
_OLDEST = (8, 0)  # Ampere: the first with bfloat16, and the oldest whose int8 products Triton supports


@cache
def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _load() -> tuple[ModuleType | None, str]:
    """(the kernels, "") or (None, the reason)."""
    if os.environ.get("QUANTAILOR_TRITON", "").lower() in _OFF:
        return None, "QUANTAILOR_TRITON=0 switches our GPU kernels off"
    try:
        from quantailor.kernels.triton import kernels
    except ImportError as error:
        if error.name != "triton":
            return None, f"triton could not be imported: {error}"
        return None, "triton is not installed: pip install quantailor[gpu]"
    if interprets():
        return kernels, ""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None, "torch sees no NVIDIA GPU"
    if torch.cuda.get_device_capability() < _OLDEST:
        return None, f"{torch.cuda.get_device_name()} is older than Ampere, which our GPU kernels need"
    try:
        kernels.try_out()
    except Exception as error:  # no compiler, no headers, a driver that is too old: whatever Triton may raise
        told = str(error).strip().splitlines() or [type(error).__name__]
        return None, f"triton could not run a kernel here: {told[0]}"
    return kernels, ""


def kernels() -> ModuleType:
    """The launchers, to be called where `takes` said so."""
    loaded, reason = _load()
    assert loaded is not None, reason
    return loaded


def is_home(device: str) -> bool:
    """Whether tensors on a device of this type are what the kernels are written for, runnable here or not."""
    return device == ("cpu" if interprets() else "cuda")


def why_not(device: str) -> str:
    """Why tensors on a device of this type do not meet our GPU kernels; "" where they do."""
    if not is_home(device):
        return f"our GPU kernels run on CUDA devices, and this is {device}"
    return _load()[1]


def takes(*tensors: Tensor | None) -> bool:
    """Whether the GPU kernels work on these: all on one GPU, and nothing against it. They compute in float32, so
    float64 is left to torch."""
    device = None
    for t in tensors:
        if t is None:
            continue
        if device is None:
            device = t.device
            if not is_home(device.type) or _load()[0] is None:
                return False
        if t.device != device or t.dtype == torch.float64:
            return False
    return device is not None
