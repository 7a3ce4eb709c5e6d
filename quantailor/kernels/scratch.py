"""Memory for what lives only within one call, used again by the next: fresh megabytes would be mapped, cleared and
page-faulted each time, and scattered over the heap among tensors that stay.

A buffer grows to the largest request and is given back by `release`. One set a thread.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}


_buffers = _Buffers()


def scratch(role: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor that is valid until the same `role` is asked for again. On a GPU a fresh one: its
    allocator keeps blocks by itself, and streams would share a buffer."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    count = math.prod(shape)
    held = _buffers.held.get((role, dtype))
    if held is None or held.numel() < count:
        _buffers.held[role, dtype] = held = torch.empty(count, dtype=dtype)
    return held[:count].view(shape)


def release() -> None:
    """Give this thread's buffers back: after a training."""
    _buffers.held.clear()
