"""Walks a prepared model block by block: calibrate on the quantized prefix, solve each layer, go on.

Within a block, layers are taken in the order they run, those that share an input (q/k/v, gate/up) together; what was
solved before is already quantized when the next statistics are taken. Only one such unit's statistics and one copy of
the hidden states are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.errors import UntrustedInput
from quantailor.models.loading import device_of
from quantailor.models.prepare import FAKE_QUANT, State, state_of
from quantailor.models.structure import blocks, modules_of
from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.nn.fake_quant import FakeQuant, FakeQuantConv2d, FakeQuantEmbedding, FakeQuantLinear, set_rounded
from quantailor.numerics.measures import relative_error
from quantailor.progress import Progress
from quantailor.ptq.method import Method
from quantailor.ptq.statistics import Statistics, rows_of

Batch = Mapping[str, Tensor]


class _Stop(Exception):
    """Raised inside a forward pass once what was wanted has been seen."""


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Sequence[Batch], methods: Callable[[str], Method], progress: Progress | None = None
) -> State:
    """Find integers and scales for every fake-quantized layer of `model`, in place.

    `batches` hold `input_ids` and `attention_mask` [B, T] (or a single `pixel_values`); `methods(name)` gives a
    layer's method. Returns the model's state with a report a layer.
    Raises: UntrustedInput on empty data or where over 1 % of a layer's batches are not finite.
    """
    state = state_of(model)
    assert state is not None, "prepare the model first"
    if not batches:
        raise UntrustedInput("calibration data is empty; give at least one sample")
    was_training = model.training
    model.eval()
    work = _Calibration(model, batches, methods, state)
    names = [(prefix, block) for prefix, block in blocks(model) if any(True for _ in modules_of(block, FAKE_QUANT))]
    covered: set[str] = set()
    with (progress or Progress()).task("calibrating", sum(1 for _ in modules_of(model, FAKE_QUANT))) as advance:
        for name, module in modules_of(model, FakeQuantEmbedding):
            work.solve(name, module, None)  # type: ignore[arg-type]
            covered.add(name)
            advance(1)
        if names and names[0][0]:
            covered |= work.walk(names, advance)
        rest = [name for name, _ in modules_of(model, FAKE_QUANT) if name not in covered]
        if rest:  # a model without blocks, or a head that a rule quantizes
            work.whole_model(rest, advance)
    model.train(was_training)
    return state


class _Calibration:
    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], methods: Callable[[str], Method], state: State
    ) -> None:
        self.model, self.methods, self.state = model, methods, state
        device = device_of(model)
        self.batches = [{k: v.to(device) for k, v in batch.items() if k != "labels"} for batch in batches]
        self.masks = [batch.get("attention_mask") for batch in self.batches]

    def walk(self, named_blocks: list[tuple[str, nn.Module]], advance: Callable[[int], None]) -> set[str]:
        """Blocks in order. Returns the names of the layers that were solved."""
        hidden, calls = self._capture([block for _, block in named_blocks])
        solved: set[str] = set()
        for index, (prefix, block) in enumerate(named_blocks):
            runs = [_Run(block, hidden[i], calls[i][index]) for i in range(len(self.batches))]
            inside = {f"{prefix}.{name}": module for name, module in modules_of(block, FAKE_QUANT)}
            inside = {n: m for n, m in inside.items() if not isinstance(m, FakeQuantEmbedding)}
            self._solve_units(inside, runs, advance)
            solved |= set(inside)
            for i, run in enumerate(runs):
                hidden[i] = run()
                for call in calls[i][index]:
                    call.clear()  # what only this block needed is free now
        return solved

    def whole_model(self, names: list[str], advance: Callable[[int], None]) -> None:
        """Layers outside the blocks, or a model without blocks: statistics by whole forward passes."""
        inside = {name: self.model.get_submodule(name) for name in names}
        self._solve_units(inside, [lambda batch=batch: self.model(**batch) for batch in self.batches], advance)

    def _solve_units(
        self, inside: dict[str, nn.Module], runs: Sequence[Callable[[], Any]], advance: Callable[[int], None]
    ) -> None:
        with _weights_float(inside.values(), except_for=()):
            units = _units(inside, runs[0])
        done: list[nn.Module] = []
        for unit in units:
            with _weights_float(inside.values(), except_for=done):
                statistics = self._observe({name: inside[name] for name in unit}, runs)
            for name in unit:
                self.solve(name, inside[name], statistics)  # type: ignore[arg-type]
                done.append(inside[name])
                advance(1)
        seen = {name for unit in units for name in unit}
        for name in inside:
            if name not in seen:
                self.state.notes.append(f"{name}: no calibration data reached it; rounded to nearest without data")
                self.solve(name, inside[name], None)  # type: ignore[arg-type]
                advance(1)

    def _observe(self, unit: dict[str, nn.Module], runs: Sequence[Callable[[], Any]]) -> Statistics:
        """Statistics of the unit's shared input over all batches, and ranges for its static input quantizers."""
        first_name, first = next(iter(unit.items()))
        full = any(self.methods(name).needs_hessian for name in unit) and getattr(first, "groups", 1) == 1
        statistics = Statistics.empty(first.weight_ON.shape[1], full, first.weight.device)  # type: ignore[union-attr,index,arg-type]
        quantizers = [m.input_quantizer for m in unit.values() if isinstance(m.input_quantizer, ActivationQuantizer)]
        outputs = [m.output_quantizer for m in unit.values() if isinstance(m.output_quantizer, ActivationQuantizer)]
        for quantizer in (*quantizers, *outputs):
            quantizer.start_calibration()
        current: dict[str, Tensor | None] = {"mask": None}

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            statistics.add(rows_of(args[0], module, current["mask"]))

        handle = first.register_forward_pre_hook(hook)
        last = list(unit.values())[-1].register_forward_hook(_stop)
        try:
            for run, mask in zip(runs, self.masks):
                current["mask"] = mask
                for quantizer in (*quantizers, *outputs):
                    quantizer.mask = mask
                _run_until_stop(run)
        finally:
            handle.remove()
            last.remove()
        statistics.check(first_name)
        for quantizer in (*quantizers, *outputs):
            quantizer.mask = None
            quantizer.finish_calibration()
        return statistics

    def solve(self, name: str, module: FakeQuant, statistics: Statistics | None) -> None:
        """Integers for one layer, set into its module, with a line for the receipt."""
        quantizer = module.weight_quantizer
        if quantizer is None:
            return
        weight = module.weight_ON.detach().float()
        solution = self.methods(name).solve(weight, statistics, quantizer.spec)
        quantizer.set_scale(solution.scale, solution.zero_point)
        q = solution.q
        set_rounded(module, q)
        rounded = quantizer.dequantize(q)
        report = {**solution.report, "weight_error": relative_error(rounded, weight)}
        if statistics is not None and statistics.importance is not None:
            report["output_error"] = _output_error(weight, rounded, statistics)
            report["rows"] = statistics.num_rows
        if "fallback" in report:
            self.state.notes.append(f"{name}: {report['method']} instead of the method asked for: {report['fallback']}")
        self.state.layers[name] = report

    def _capture(self, modules: list[nn.Module]) -> tuple[list[Tensor], list[list[list[Any]]]]:
        """Run the model in float and note what each block is called with.

        Returns the first block's hidden states a batch, and per batch and block a list [args, kwargs] without them.
        """
        hidden: list[Tensor] = []
        calls: list[list[list[Any]]] = []

        def first_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden.append(args[0] if args else kwargs["hidden_states"])

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states" or args}
            calls[-1].append([list(args[1:]), rest])

        handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
        handles.append(modules[0].register_forward_pre_hook(first_hook, with_kwargs=True))
        try:
            layers = [m for _, m in modules_of(self.model, FAKE_QUANT) if not isinstance(m, FakeQuantEmbedding)]
            with _weights_float(layers, except_for=()):
                for batch in self.batches:
                    calls.append([])
                    self.model(
                        **{**batch, "use_cache": False} if "input_ids" in batch and _takes_cache(self.model) else batch
                    )
        finally:
            for handle in handles:
                handle.remove()
        return hidden, calls


class _Run:
    """One block on one batch, as the model would call it."""

    def __init__(self, block: nn.Module, hidden: Tensor, call: list[Any]) -> None:
        self.block, self.hidden, self.call = block, hidden, call

    def __call__(self) -> Tensor:
        args, kwargs = self.call
        result = self.block(self.hidden, *args, **kwargs)
        return result[0] if isinstance(result, tuple) else result


def _takes_cache(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "use_cache", False))


def _stop(*_: Any) -> None:
    raise _Stop


def _run_until_stop(run: Callable[[], Any]) -> None:
    try:
        run()
    except _Stop:
        return


@contextmanager
def _weights_float(modules: Any, except_for: Sequence[nn.Module]) -> Iterator[None]:
    """Layers not solved yet compute in float, so that their unsolved grids do not disturb what is calibrated."""
    switched = []
    keep = {id(m) for m in except_for}
    for module in modules:
        for quantizer in (module.weight_quantizer, module.input_quantizer, module.output_quantizer):
            if quantizer is not None and id(module) not in keep and quantizer.enabled:
                quantizer.enabled = False
                switched.append(quantizer)
    try:
        yield
    finally:
        for quantizer in switched:
            quantizer.enabled = True


def _units(inside: dict[str, nn.Module], run: Callable[[], Any]) -> list[list[str]]:
    """Layer names in the order they run, those called with the very same tensor together."""
    order: list[list[str]] = []
    inputs: list[Tensor] = []
    seen: set[str] = set()
    handles = []

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
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
        run()
    finally:
        for handle in handles:
            handle.remove()
    convs = {n for n, m in inside.items() if isinstance(m, FakeQuantConv2d)}
    assert all(isinstance(m, FakeQuantLinear | FakeQuantConv2d) for m in inside.values())
    split = [[n] for unit in order if convs & set(unit) for n in unit]  # kernels differ: each its own statistics
    return split + [unit for unit in order if not convs & set(unit)] if convs else order


def _output_error(weight: Tensor, rounded: Tensor, statistics: Statistics) -> float:
    """||(W - W_hat) X|| / ||W X||, from X X^T, or from its diagonal alone where that is all there is."""
    difference = weight - rounded
    if statistics.hessian is None:
        top, bottom = (difference.square() @ statistics.diagonal).sum(), (weight.square() @ statistics.diagonal).sum()
    else:
        top = ((difference @ statistics.hessian) * difference).sum()
        bottom = ((weight @ statistics.hessian) * weight).sum()
    return float((top.clamp(min=0) / bottom).sqrt()) if bottom > 0 else 0.0
