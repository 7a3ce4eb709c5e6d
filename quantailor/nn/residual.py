"""Sums of the residual stream, found by following it: no module computes them, so no hook could.

Within a block's forward pass the stream is what the block is given, what a norm makes of it, and each sum of the stream
and another tensor of its shape. Such a sum is a residual add. In `x + f(norm(x))` that is the sum that the next block
works on; in `norm(x + f(x))` it is what the norm is given.

A block gets points by becoming an instance of a subclass of its own class, under the same name: deep copies, hooks and
gradient checkpointing go on as before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantailor.errors import QuantailorError

_ADDS = {torch.add, torch.Tensor.add, torch.Tensor.add_}


class _Active(threading.local):
    def __init__(self) -> None:
        self.modes: list[Stream] = []


_active = _Active()


class Stream(TorchFunctionMode):
    """While it is entered, residual adds go through `points` in their order; without any they are only counted."""

    def __init__(self, start: Tensor, points: Sequence[Callable[[Tensor], Tensor]] | None) -> None:
        super().__init__()
        self.points, self.count, self.shape = points, 0, start.shape
        self.held = {id(start): start}  # the tensors themselves, so that no id is used again

    def __enter__(self) -> Stream:
        _active.modes.append(self)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _active.modes.remove(self)

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function not in _ADDS or len(args) < 2 or not self._is_residual(args[0], args[1]):
            return result
        if self.points is not None:
            if self.count >= len(self.points):
                raise QuantailorError(
                    f"a block has more residual adds than the {len(self.points)} that were seen when it was prepared"
                )
            result = self.points[self.count](result)
        self.count += 1
        self.held[id(result)] = result
        return result

    def _is_residual(self, left: Any, right: Any) -> bool:
        alike = all(isinstance(x, Tensor) and x.shape == self.shape and x.is_floating_point() for x in (left, right))
        return alike and (id(left) in self.held or id(right) in self.held)

    def follow(self, before: Any, after: Any) -> None:
        """A norm made `after` of `before`."""
        if id(before) in self.held and isinstance(after, Tensor):
            self.held[id(after)] = after


def follow_norm(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The hook of norms inside blocks: what they make of the stream is the stream."""
    if _active.modes and args:
        _active.modes[-1].follow(args[0], output)


class _BlockWithPoints(nn.Module):
    """Mixed into a block's own class."""

    residual_points: nn.ModuleList | None
    embedding_point: nn.Module | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = None if args else "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        hidden: Tensor = args[0] if name is None else kwargs[name]
        if (point := getattr(self, "embedding_point", None)) is not None:
            hidden = point(hidden)
        if name is None:
            args = (hidden, *args[1:])
        else:
            kwargs = {**kwargs, name: hidden}
        points = getattr(self, "residual_points", None)
        if points is None:
            return super().forward(*args, **kwargs)
        with Stream(hidden, list(points)) as stream:
            result = super().forward(*args, **kwargs)
        if stream.count != len(points):
            raise QuantailorError(
                f"a {type(self).__name__} made {stream.count} residual adds, and {len(points)} when it was prepared"
            )
        return result


_classes: dict[type, type] = {}


def give_points(block: nn.Module) -> None:
    """Let the block call the points that hang on it."""
    own = type(block)
    if not isinstance(block, _BlockWithPoints):
        made = _classes.setdefault(own, type(own.__name__, (_BlockWithPoints, own), {"__module__": own.__module__}))
        block.__class__ = made
