"""Memory that is let go of goes back to the system, so that a walk over a model's blocks holds one of them.

glibc keeps freed blocks of up to 32 MiB on its heap, where whatever is allocated in between pins them. With another C
library all of this does nothing but what Python does.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_MAPPED_FROM = 2**20
_HIGHEST = 32 * 2**20  # where glibc's own adjustment ends up in a process that has freed large blocks


def free(module: nn.Module) -> None:
    """Let go of all tensors of a module; shapes and types stay. Their memory goes back to the system at once."""
    module.to("meta")
    gc.collect()
    if _trim is not None:
        _trim(0)


@contextmanager
def large_blocks_mapped() -> Iterator[None]:
    """Within: what is allocated by the megabyte is mapped by itself and unmapped when freed: no heap gap holds it.

    Each such block costs the clearing of its pages, which a walk that computes for seconds a block can pay.
    """
    if _mallopt is None or not _mallopt(_MMAP_THRESHOLD, _MAPPED_FROM):
        yield
        return
    try:
        yield
    finally:
        _mallopt(_MMAP_THRESHOLD, _HIGHEST)


def _of_the_c_library(name: str) -> Callable[..., int] | None:
    """One of glibc's own functions; None where the C library has no such thing."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
    return found


_trim = _of_the_c_library("malloc_trim")
_mallopt = _of_the_c_library("mallopt") if _trim is not None else None
