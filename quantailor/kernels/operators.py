"""Passes as torch operators: called directly when eager, one opaque operator to torch.compile and to fake tensors.

The wrapper that torch.library puts around a function costs some ten microseconds a call, which a small model feels;
eager code does without it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


def opaque(*arguments: Any) -> bool:
    """Whether a call is to be looked at rather than run: in torch.compile, or on tensors without data."""
    return torch.compiler.is_compiling() or FakeTensor in [type(value) for value in arguments]


def operator(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as `quantailor::<its name>`; `fake` gives empty results of the right shape and type."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        made = torch.library.custom_op(f"quantailor::{function.__name__}", function, mutates_args=())
        made.register_fake(fake)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            return (made if opaque(*arguments) else function)(*arguments)

        return call

    return register
