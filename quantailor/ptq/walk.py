"""How a block is run by itself: what it is called with, the order of its layers, and its twin in the float model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from quantailor.models.prepare import FAKE_QUANT
from quantailor.models.structure import modules_of
from quantailor.nn.fake_quant import FakeQuantConv2d, FakeQuantLinear
from quantailor.nn.points import PointQuantizer

SOLVED_ON_DATA = (FakeQuantLinear, FakeQuantConv2d)  # an embedding has no input to take statistics of
Call = Callable[[], tuple[list[Any], dict[str, Any]]]  # a block's arguments besides what it works on


class Stop(Exception):
    """Raised inside a forward pass once what was wanted has been seen."""


def stop(*_: Any) -> None:
    """A hook that ends the pass."""
    raise Stop


def run_until_stop(run: Callable[[], Any]) -> None:
    """One pass, which may end early."""
    try:
        run()
    except Stop:
        return


class Run:
    """One block on one batch, as the model would call it. `source[index]` is what the block works on."""

    def __init__(self, block: nn.Module, source: Sequence[Tensor], index: int, call: Call) -> None:
        self.block, self.source, self.index, self.call = block, source, index, call

    @property
    def hidden(self) -> Tensor:
        return self.source[self.index]

    def __call__(self) -> Tensor:
        return self.on(self.hidden)

    def on(self, hidden: Tensor) -> Tensor:
        """The block's output for this input."""
        args, kwargs = self.call()
        result = self.block(hidden, *args, **kwargs)
        return result[0] if isinstance(result, tuple) else result


class FloatPath:
    """A block of the float model, for the inputs its layers would have had."""

    def __init__(self, prefix: str, block: nn.Module, runs: Sequence[Run]) -> None:
        self.prefix, self.block, self.runs = prefix, block, runs

    def input_of(self, name: str, batch: int) -> Tensor | None:
        """What the layer called `name` gets on a batch; None if that is not a row for each of the block's rows."""
        kept: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            kept.append(args[0])
            raise Stop

        whole = self.runs[batch].hidden
        handle = self.block.get_submodule(name.removeprefix(f"{self.prefix}.")).register_forward_pre_hook(hook)
        try:
            run_until_stop(lambda: self.runs[batch].on(whole))
        finally:
            handle.remove()
        if not kept:
            return None
        x = kept[0]
        batched = x.dim() == whole.dim() and x.shape[0] == whole.shape[0]
        return x if batched or x.shape[:-1].numel() == whole.shape[:-1].numel() else None


def twin_of(block: nn.Module) -> nn.Module:
    """The block as it is in the float model."""
    twin = copy.deepcopy(block)
    for _, module in modules_of(twin, FAKE_QUANT):
        for quantizer in (module.weight_quantizer, module.input_quantizer, module.output_quantizer):
            if quantizer is not None:
                quantizer.enabled = False
    for _, point in modules_of(twin, PointQuantizer):
        point.enabled = False
    return twin


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """What a block works on, and [the rest of its arguments, by name the rest]."""
    if args:
        return args[0], [list(args[1:]), dict(kwargs)]
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return kwargs[name], [[], {key: value for key, value in kwargs.items() if key != name}]


def without_cache(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """A batch as a block's calls are noted on: a cache of keys and values would tie the blocks of a pass together."""
    takes_cache = bool(getattr(getattr(model, "config", None), "use_cache", False))
    return {**batch, "use_cache": False} if "input_ids" in batch and takes_cache else dict(batch)


@contextmanager
def in_float(modules: Any, except_for: Collection[int]) -> Iterator[None]:
    """Layers not solved yet compute in float, so that their unsolved grids do not disturb what is calibrated.

    `except_for`: ids of the quantizers that stay on; one of them may serve two modules whose weights are tied.
    """
    switched = []
    for module in modules:
        for quantizer in (module.weight_quantizer, module.input_quantizer, module.output_quantizer):
            if quantizer is not None and id(quantizer) not in except_for and quantizer.enabled:
                quantizer.enabled = False
                switched.append(quantizer)
    try:
        yield
    finally:
        for quantizer in switched:
            quantizer.enabled = True


def units_of(inside: dict[str, nn.Module], runs: Sequence[Callable[[], Any]]) -> tuple[list[list[str]], set[str]]:
    """Layer names in the order they run, those called with the very same tensor together; and those that ran twice.

    One run shows them, but for layers that only some data reaches, such as an expert: these come from the next runs.
    """
    order: list[list[str]] = []
    inputs: list[Tensor] = []
    seen: set[str] = set()
    repeated: set[str] = set()
    calls: set[str] = set()  # of this run
    handles = []

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if name in calls:
                repeated.add(name)
            calls.add(name)
            if name in seen:
                return
            seen.add(name)
            if inputs and args[0] is inputs[-1]:
                order[-1].append(name)
            else:
                order.append([name])
                inputs.append(args[0])

        return hook

    for name, module in inside.items():
        handles.append(module.register_forward_pre_hook(hook_for(name)))
    try:
        for run in runs:
            calls.clear()
            run_until_stop(run)
            if len(seen) == len(inside):
                break
    finally:
        for handle in handles:
            handle.remove()
    units = []
    for unit in order:  # the kernels of convolutions differ: each has statistics of its own
        apart = any(isinstance(inside[name], FakeQuantConv2d) for name in unit)
        units += [[name] for name in unit] if apart else [unit]
    return units, repeated
