"""Passes as torch operators: called directly when eager, seen as one opaque operator by torch.compile and torch.export.

The wrapper that torch.library puts around a function costs some ten microseconds a call, which a small model feels;
eager code does without it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def operator(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as `quantailor::<its name>`; `fake` gives empty results of the right shape and type."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        made = torch.library.custom_op(f"quantailor::{function.__name__}", function, mutates_args=())
        made.register_fake(fake)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            return (made if torch.compiler.is_compiling() else function)(*arguments)

        return call

    return register
