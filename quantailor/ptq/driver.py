"""Walks a prepared model block by block: calibrate on the quantized prefix, solve each layer, go on.

Within a block, layers are taken in the order they run, those that share an input (q/k/v, gate/up) together; what was
solved before is already quantized when the next statistics are taken. Only one such unit's statistics and one copy of
the hidden states are in memory at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantailor import ptq
from quantailor.errors import UntrustedInput
from quantailor.models.loading import device_of
from quantailor.models.prepare import FAKE_QUANT, State, state_of
from quantailor.models.structure import blocks, modules_of
from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.nn.fake_quant import FakeQuant, FakeQuantConv2d, FakeQuantEmbedding, FakeQuantLinear, set_rounded
from quantailor.numerics.measures import relative_error
from quantailor.progress import Progress
from quantailor.ptq.chain import Chain, as_chain
from quantailor.ptq.method import Finish, Method, OnBlock, OnModel, Refine, Report
from quantailor.ptq.statistics import Statistics, rows_of

Batch = Mapping[str, Tensor]
_SOLVED_ON_DATA = (FakeQuantLinear, FakeQuantConv2d)  # an embedding has no input to take statistics of


def methods_of(state: State, default: str) -> Callable[[str], Chain]:
    """A layer's method by its name: its rule's, or `default`. Raises: UsageError on an unknown one."""
    named = {e.name: e.method for e in state.inventory if e.method}
    chains = {text: ptq.method(text) for text in {default, *named.values()}}
    return lambda name: chains[named.get(name, default)]


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
    with (progress or Progress()).task("calibrating", sum(1 for _ in modules_of(model, FAKE_QUANT))) as advance:
        work.rewrite_model()
        for name, module in modules_of(model, FakeQuantEmbedding):
            work.solve(name, module, None)
            advance(1)
        chain = work.chain()
        inside = {f"{prefix}.{name}" for prefix, block in chain for name, _ in modules_of(block, _SOLVED_ON_DATA)}
        outside = [name for name, _ in modules_of(model, _SOLVED_ON_DATA) if name not in inside]
        if inside and outside:
            order = work.order([*inside, *outside])
            before = order[: next((i for i, n in enumerate(order) if n in inside), 0)]
            work.whole_model(before, advance)
            outside = [n for n in outside if n not in before]
        if inside:
            work.walk(chain, advance)
        if outside:  # a model without blocks, or a head that a rule quantizes
            work.whole_model(outside, advance)
    model.train(was_training)
    return state


class _Calibration:
    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], methods: Callable[[str], Method], state: State
    ) -> None:
        self.model, self.state = model, state
        self.methods = lambda name: as_chain(methods(name))
        device = device_of(model)
        self.batches = [{k: v.to(device) for k, v in batch.items() if k != "labels"} for batch in batches]
        self.masks = [batch.get("attention_mask") for batch in self.batches]
        self.runs = [lambda batch=batch: self.model(**batch) for batch in self.batches]
        self.solved: dict[int, str] = {}  # id of a weight's quantizer -> the layer it was solved for
        self.final: set[int] = set()  # ids of quantizers that compute on their grid from now on
        self.extra: dict[str, Report] = {}  # what came before a layer was solved: joins its report then

    def chain(self) -> list[tuple[str, nn.Module]]:
        """The blocks from the first with a layer to solve to the last; none where they cannot be run by themselves."""
        found = blocks(self.model)
        busy = [i for i, (_, block) in enumerate(found) if any(True for _ in modules_of(block, _SOLVED_ON_DATA))]
        if not busy or not found[0][0]:
            return []
        found = found[busy[0] : busy[-1] + 1]
        if self._is_chain([block for _, block in found]):
            return found
        self.state.notes.append(
            f"the blocks from {found[0][0]} to {found[-1][0]} do not just feed one another: "
            "each layer was calibrated by passes of the whole model"
        )
        return []

    def _is_chain(self, modules: list[nn.Module]) -> bool:
        """Whether each block runs once a pass, in this order, on the very output of the one before."""
        called: list[int] = []
        fed = True
        last: Any = None

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            nonlocal fed, last
            fed = fed and (not called or _call(args, kwargs)[0] is last)
            called.append(id(module))
            last = result[0] if isinstance(result, tuple) else result

        handles = [m.register_forward_hook(hook, with_kwargs=True) for m in modules]
        try:
            self.runs[0]()
        finally:
            for handle in handles:
                handle.remove()
        return fed and called == [id(m) for m in modules]

    def order(self, names: list[str]) -> list[str]:
        """The layers in the order they run."""
        return [name for unit in _units({n: self.model.get_submodule(n) for n in names}, self.runs)[0] for name in unit]

    def walk(self, named_blocks: list[tuple[str, nn.Module]], advance: Callable[[int], None]) -> None:
        """Blocks in order."""
        hidden, calls = self._capture([block for _, block in named_blocks])
        float_hidden = list(hidden)  # the same tensors until a block has been quantized
        for index, (prefix, block) in enumerate(named_blocks):
            runs = [_Run(block, hidden[i], calls[i][index]) for i in range(len(self.batches))]
            inside = {f"{prefix}.{name}": module for name, module in modules_of(block, _SOLVED_ON_DATA)}
            self._rewrite_block(block, inside, runs)
            twin = self._twin(block) if any(self.methods(n).needs_float_path for n in inside) else None
            float_runs = (
                [_Run(twin, float_hidden[i], calls[i][index]) for i in range(len(self.batches))] if twin else None
            )
            self._solve_units(inside, runs, advance, _FloatPath(prefix, twin, float_runs) if float_runs else None)
            if float_runs:
                float_hidden = [run() for run in float_runs]
                self._refine(block, inside, runs, float_hidden)
                self._finish(block, twin, inside, runs, float_runs)
            for i, run in enumerate(runs):
                if block is not named_blocks[-1][1]:
                    hidden[i] = run()
                calls[i][index].clear()  # what only this block needed is free now

    def _twin(self, block: nn.Module) -> nn.Module:
        """The block as it is in the float model."""
        twin = copy.deepcopy(block)
        for _, module in modules_of(twin, FAKE_QUANT):
            for quantizer in (module.weight_quantizer, module.input_quantizer, module.output_quantizer):
                if quantizer is not None:
                    quantizer.enabled = False
        return twin

    def _parts(self, hook: type, layers: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """Each part of the layers' methods that offers this hook, with the layers it is asked for, in chain order."""
        found: dict[int, tuple[Any, dict[str, Any]]] = {}
        for name, module in layers.items():
            for part in self.methods(name).parts_with(hook):
                found.setdefault(id(part), (part, {}))[1][name] = module
        return list(found.values())

    def rewrite_model(self) -> None:
        """Parts that rewrite the whole float model, before anything is measured on it."""
        layers = dict(modules_of(self.model, FAKE_QUANT))
        for part, asked in self._parts(OnModel, layers):
            with _in_float(layers.values(), except_for=self.final):
                self._add(part.on_model(self.model, asked))

    def _rewrite_block(self, block: nn.Module, inside: dict[str, Any], runs: list[_Run]) -> None:
        for part, asked in self._parts(OnBlock, inside):
            with _in_float(inside.values(), except_for=self.final):
                self._add(part.on_block(block, asked, runs, self.masks))

    def _add(self, reports: dict[str, Report]) -> None:
        for name, report in reports.items():
            self.extra[name] = {**self.extra.get(name, {}), **report}

    def _refine(self, block: nn.Module, inside: dict[str, Any], runs: list[_Run], targets: list[Tensor]) -> None:
        """Let a method that works on whole blocks move what `solve` found. Tied weights stay as they were solved."""
        free = {n: m for n, m in inside.items() if "tied_to" not in self.state.layers.get(n, {})}
        for part, layers in self._parts(Refine, free):
            for name, report in part.refine(block, layers, runs, targets, self.masks).items():
                self.state.layers[name] = {**self.state.layers[name], **report}

    def _finish(
        self, block: nn.Module, twin: nn.Module | None, inside: dict[str, Any], runs: list[_Run], float_runs: list[_Run]
    ) -> None:
        for part, layers in self._parts(Finish, inside):
            for name, report in part.finish(block, twin, layers, runs, float_runs, self.masks).items():
                self.state.layers[name] = {**self.state.layers[name], **report}

    def whole_model(self, names: list[str], advance: Callable[[int], None]) -> None:
        """Layers outside the blocks, or a model without blocks: statistics by whole forward passes."""
        self._solve_units({name: self.model.get_submodule(name) for name in names}, self.runs, advance)

    def _solve_units(
        self,
        inside: dict[str, nn.Module],
        runs: Sequence[Callable[[], Any]],
        advance: Callable[[int], None],
        float_path: _FloatPath | None = None,
    ) -> None:
        with _in_float(inside.values(), except_for=self.final):
            units, repeated = _units(inside, runs)
        for unit in units:
            with _in_float(inside.values(), except_for=self.final):
                once = repeated.isdisjoint(unit)
                statistics = self._observe({n: inside[n] for n in unit}, runs, once, float_path if once else None)
            for name in unit:
                self.solve(name, inside[name], statistics)  # type: ignore[arg-type]
                advance(1)
        seen = {name for unit in units for name in unit}
        for name in inside:
            if name not in seen:
                self.state.notes.append(f"{name}: no calibration data reached it; rounded to nearest without data")
                self.solve(name, inside[name], None)  # type: ignore[arg-type]
                advance(1)

    def _observe(
        self, unit: dict[str, Any], runs: Sequence[Callable[[], Any]], stop: bool, float_path: _FloatPath | None
    ) -> Statistics:
        """Statistics of the unit's shared input over all batches, and ranges for its static quantizers.

        `stop`: a pass may end once the unit has run, since it runs only once. `float_path` gives the same rows in the
        float model, for methods that ask.
        """
        first_name, first = next(iter(unit.items()))
        full = any(self.methods(name).needs_hessian for name in unit) and getattr(first, "groups", 1) == 1
        crossed = full and float_path is not None and any(self.methods(name).needs_float_path for name in unit)
        statistics = Statistics.empty(first.weight_ON.shape[1], full, first.weight.device, crossed)
        quantizers = [m.input_quantizer for m in unit.values() if isinstance(m.input_quantizer, ActivationQuantizer)]
        outputs = [m.output_quantizer for m in unit.values() if isinstance(m.output_quantizer, ActivationQuantizer)]
        for quantizer in (*quantizers, *outputs):
            quantizer.start_calibration()
        current: dict[str, Tensor | None] = {"mask": None, "float": None}

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x, paired = args[0], current["float"]
            if paired is None or paired.shape != x.shape:
                statistics.cross = None  # other rows went here in the float model: an expert's, say
            same = None if paired is None or statistics.cross is None else rows_of(paired, module, current["mask"])
            statistics.add(rows_of(x, module, current["mask"]), same)

        handles = [first.register_forward_pre_hook(hook)]
        if stop:
            handles.append(list(unit.values())[-1].register_forward_hook(_stop))
        try:
            for i, (run, mask) in enumerate(zip(runs, self.masks)):
                current["mask"] = mask
                if crossed and float_path is not None:
                    current["float"] = float_path.input_of(first_name, i)
                for quantizer in (*quantizers, *outputs):
                    quantizer.mask = mask
                _run_until_stop(run)
        finally:
            for handle in handles:
                handle.remove()
        statistics.check(first_name)
        for quantizer in (*quantizers, *outputs):
            quantizer.mask = None
            quantizer.finish_calibration()
        return statistics

    def solve(self, name: str, module: FakeQuant, statistics: Statistics | None) -> None:
        """Integers for one layer, set into its module, with a line for the receipt. A tied weight is solved once."""
        quantizer = module.weight_quantizer
        self.final |= {id(q) for q in (quantizer, module.input_quantizer, module.output_quantizer)}
        if quantizer is None:
            return
        first = self.solved.setdefault(id(quantizer), name)
        if first != name:
            self.state.layers[name] = {**self.state.layers[first], "tied_to": first}
            return
        weight = module.weight_ON.detach().float().clone()  # `set_rounded` will move the module's own
        solution = self.methods(name).solve(weight, statistics, quantizer.spec)
        quantizer.set_scale(solution.scale, solution.zero_point)
        q = solution.q
        set_rounded(module, q)
        rounded = quantizer.dequantize(q)
        report = {**solution.report, **self.extra.get(name, {}), "weight_error": relative_error(rounded, weight)}
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
            hidden.append(_call(args, kwargs)[0])

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[-1].append(_call(args, kwargs)[1])

        handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
        handles.append(modules[0].register_forward_pre_hook(first_hook, with_kwargs=True))
        try:
            layers = [m for _, m in modules_of(self.model, FAKE_QUANT)]
            with _in_float(layers, except_for=self.final):
                for batch in self.batches:
                    calls.append([])
                    self.model(
                        **{**batch, "use_cache": False} if "input_ids" in batch and _takes_cache(self.model) else batch
                    )
        finally:
            for handle in handles:
                handle.remove()
        return hidden, calls


class _FloatPath:
    """A block of the float model, for the inputs its layers would have had."""

    def __init__(self, prefix: str, block: nn.Module | None, runs: list[_Run]) -> None:
        self.prefix, self.block, self.runs = prefix, block, runs

    def input_of(self, name: str, batch: int) -> Tensor | None:
        """What the layer called `name` gets on a batch; None if that is not a row for each of the block's rows."""
        assert self.block is not None
        kept: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            kept.append(args[0])
            raise _Stop

        handle = self.block.get_submodule(name.removeprefix(f"{self.prefix}.")).register_forward_pre_hook(hook)
        try:
            _run_until_stop(self.runs[batch])
        finally:
            handle.remove()
        if not kept:
            return None
        x, whole = kept[0], self.runs[batch].hidden
        batched = x.dim() == whole.dim() and x.shape[0] == whole.shape[0]
        return x if batched or x.shape[:-1].numel() == whole.shape[:-1].numel() else None


class _Run:
    """One block on one batch, as the model would call it."""

    def __init__(self, block: nn.Module, hidden: Tensor, call: list[Any]) -> None:
        self.block, self.hidden, self.call = block, hidden, call

    def __call__(self) -> Tensor:
        args, kwargs = self.call
        result = self.block(self.hidden, *args, **kwargs)
        return result[0] if isinstance(result, tuple) else result


def _call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """What a block works on, and [the rest of its arguments, by name the rest]."""
    if args:
        return args[0], [list(args[1:]), dict(kwargs)]
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return kwargs[name], [[], {key: value for key, value in kwargs.items() if key != name}]


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
def _in_float(modules: Any, except_for: set[int]) -> Iterator[None]:
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


def _units(inside: dict[str, nn.Module], runs: Sequence[Callable[[], Any]]) -> tuple[list[list[str]], set[str]]:
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
            run()
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


def _output_error(weight: Tensor, rounded: Tensor, statistics: Statistics) -> float:
    """||(W - W_hat) X|| / ||W X||, from X X^T, or from its diagonal alone where that is all there is."""
    difference = weight - rounded
    if statistics.hessian is None:
        top, bottom = (difference.square() @ statistics.diagonal).sum(), (weight.square() @ statistics.diagonal).sum()
    else:
        top = ((difference @ statistics.hessian) * difference).sum()
        bottom = ((weight @ statistics.hessian) * weight).sum()
    return float((top.clamp(min=0) / bottom).sqrt()) if bottom > 0 else 0.0
