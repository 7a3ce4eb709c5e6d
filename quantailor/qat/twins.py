"""A module of another type with the very parameters and buffers of an original: how stand-ins are made."""

from typing import Any

from torch import nn


def taking_over(kind: Any, original: nn.Module) -> Any:
    """A module of type `kind` with the very parameters and buffers of `original`."""
    new = kind.__new__(kind)
    new.__dict__.update(original.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        new.__dict__[name] = dict(original.__dict__[name])
    return new
