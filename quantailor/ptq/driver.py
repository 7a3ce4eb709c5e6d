"""Walks a prepared model block by block: calibrate on the quantized prefix, solve each layer, go on.

Within a block, layers are taken in the order they run, those that share an input (q/k/v, gate/up) together; what was
solved before is already quantized when the next statistics are taken. Only one such unit's statistics and one copy of
the hidden states are in memory at a time. `Calibration` is that work on one block or one set of layers; ptq/stream.py
uses it on models that are never whole in memory. Several processes may share the batches (ptq/distributed.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantailor import ptq
from quantailor.errors import UntrustedInput
from quantailor.models.loading import device_of
from quantailor.models.prepare import FAKE_QUANT, State, state_of
from quantailor.models.structure import blocks, modules_of
from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.nn.fake_quant import FakeQuant, FakeQuantEmbedding, set_rounded
from quantailor.numerics.measures import relative_error
from quantailor.progress import Progress
from quantailor.ptq import distributed
from quantailor.ptq.chain import Chain, as_chain
from quantailor.ptq.method import Finish, Method, OnBlock, OnModel, Refine, Report, Solution
from quantailor.ptq.points import calibrate_points, switch_off
from quantailor.ptq.statistics import Statistics, rows_of
from quantailor.ptq.walk import (
    SOLVED_ON_DATA,
    Call,
    FloatPath,
    Run,
    in_float,
    run_until_stop,
    split_call,
    stop,
    twin_of,
    units_of,
    without_cache,
)

Batch = Mapping[str, Tensor]
Methods = Callable[[str], Method]


def methods_of(state: State, default: str) -> Callable[[str], Chain]:
    """A layer's method by its name: its rule's, or `default`. Raises: UsageError on an unknown one."""
    named = {e.name: e.method for e in state.inventory if e.method}
    chains = {text: ptq.method(text) for text in {default, *named.values()}}
    return lambda name: chains[named.get(name, default)]


@torch.no_grad()
def calibrate(model: nn.Module, batches: Sequence[Batch], methods: Methods, progress: Progress | None = None) -> State:
    """Find integers and scales for every fake-quantized layer of `model`, in place.

    `batches` hold `input_ids` and `attention_mask` [B, T] (or a single `pixel_values`); `methods(name)` gives a
    layer's method. Where several processes run this, each takes its share of the batches and all end alike.
    Returns the model's state with a report a layer.
    Raises: UntrustedInput on empty data or where over 1 % of a layer's batches are not finite.
    """
    state = state_of(model)
    assert state is not None, "prepare the model first"
    check_batches(batches)
    was_training = model.training
    model.eval()
    with (progress or Progress()).task("calibrating", sum(1 for _ in modules_of(model, FAKE_QUANT))) as advance:
        switch_off(model)
        work = _WholeModel(model, distributed.share(batches), methods, state, advance)
        work.rewrite_model()
        for name, module in modules_of(model, FakeQuantEmbedding):
            work.solve(name, module, None)
        chain = work.chain()
        inside = {f"{prefix}.{name}" for prefix, block in chain for name, _ in modules_of(block, SOLVED_ON_DATA)}
        outside = [name for name, _ in modules_of(model, SOLVED_ON_DATA) if name not in inside]
        if inside and outside:
            order = work.order([*inside, *outside])
            before = order[: next((i for i, n in enumerate(order) if n in inside), 0)]
            work.whole_model(before)
            outside = [n for n in outside if n not in before]
        if inside:
            work.walk(chain)
        work.points_elsewhere()
        if outside:  # a model without blocks, or a head that a rule quantizes
            work.whole_model(outside)
    model.train(was_training)
    return state


def check_batches(batches: Sequence[Batch]) -> None:
    """Raises: UntrustedInput if there are none."""
    if not batches:
        raise UntrustedInput("calibration data is empty; give at least one sample")


@torch.no_grad()
def round_without_data(layers: Iterable[tuple[str, Any]], state: State, methods: Callable[[str], Chain]) -> None:
    """Integers for fake-quantized `layers` from their weights alone."""
    for name, module in layers:
        assert isinstance(module, FAKE_QUANT) and module.weight_quantizer is not None
        solution = methods(name).solve(module.weight_ON.detach().float(), None, module.weight_quantizer.spec)
        module.weight_quantizer.set_scale(solution.scale, solution.zero_point)
        state.layers[name] = solution.report


class Calibration:
    """Solves layers on data: units of layers that share an input, and blocks of such units.

    `masks`: a batch's rows that count, each [B, T] or None. `advance` is told of every layer solved.
    """

    def __init__(
        self, masks: Sequence[Tensor | None], methods: Methods, state: State, advance: Callable[[int], None]
    ) -> None:
        self.masks, self.state, self.advance = masks, state, advance
        self.methods = lambda name: as_chain(methods(name))
        self.solved: dict[int, str] = {}  # id of a weight's quantizer -> the layer it was solved for
        self.final: set[int] = set()  # ids of quantizers that compute on their grid from now on
        self.extra: dict[str, Report] = {}  # what came before a layer was solved: joins its report then

    def needs_float_path(self, names: Iterable[str]) -> bool:
        return any(self.methods(name).needs_float_path for name in names)

    def solve_block(
        self,
        prefix: str,
        block: nn.Module,
        calls: Sequence[Call],
        hidden: Sequence[Tensor],
        float_hidden: Sequence[Tensor] | None,
        keep: Callable[[Iterable[Tensor]], Sequence[Tensor]] = list,
    ) -> tuple[list[Run], Sequence[Tensor] | None]:
        """Solve a block's layers. `hidden[i]` is what batch i brings from the quantized prefix, `float_hidden[i]` what
        it brings in the float model, None where neither this block nor a later one asks for that.

        Returns the block's runs on `hidden`, and the float twin's outputs (None without `float_hidden`), which
        `keep` has stored.
        """
        inside = {f"{prefix}.{name}": module for name, module in modules_of(block, SOLVED_ON_DATA)}
        runs = [Run(block, hidden, i, call) for i, call in enumerate(calls)]
        self._rewrite_block(block, inside, runs)
        with in_float(inside.values(), except_for=self.final):
            calibrate_points(block, runs, self.masks, prefix)
        if float_hidden is None:
            self.solve_units(inside, runs)
            return runs, None
        twin = twin_of(block)
        float_runs = [Run(twin, float_hidden, i, call) for i, call in enumerate(calls)]
        self.solve_units(inside, runs, FloatPath(prefix, twin, float_runs))
        targets = keep(run() for run in float_runs)
        self._refine(block, inside, runs, targets)
        self._finish(block, twin, inside, runs, float_runs)
        return runs, targets

    def parts(self, hook: type, layers: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """Each part of the layers' methods that offers this hook, with the layers it is asked for, in chain order."""
        found: dict[int, tuple[Any, dict[str, Any]]] = {}
        for name, module in layers.items():
            for part in self.methods(name).parts_with(hook):
                found.setdefault(id(part), (part, {}))[1][name] = module
        return list(found.values())

    def _rewrite_block(self, block: nn.Module, inside: dict[str, Any], runs: list[Run]) -> None:
        for part, asked in self.parts(OnBlock, inside):
            with in_float(inside.values(), except_for=self.final):
                reports = part.on_block(block, asked, runs, self.masks)
            distributed.same_(block)
            self.add(distributed.from_rank(reports))

    def add(self, reports: dict[str, Report]) -> None:
        """Lines that join the layers' reports once they are solved."""
        for name, report in reports.items():
            self.extra[name] = {**self.extra.get(name, {}), **report}

    def _refine(self, block: nn.Module, inside: dict[str, Any], runs: list[Run], targets: Sequence[Tensor]) -> None:
        """Let a method that works on whole blocks move what `solve` found. Tied weights stay as they were solved."""
        free = {n: m for n, m in inside.items() if "tied_to" not in self.state.layers.get(n, {})}
        for part, layers in self.parts(Refine, free):
            self._moved(block, part.refine(block, layers, runs, targets, self.masks))

    def _finish(
        self, block: nn.Module, twin: nn.Module, inside: dict[str, Any], runs: list[Run], float_runs: list[Run]
    ) -> None:
        for part, layers in self.parts(Finish, inside):
            self._moved(block, part.finish(block, twin, layers, runs, float_runs, self.masks))

    def _moved(self, block: nn.Module, reports: dict[str, Report]) -> None:
        distributed.same_(block)  # a part that looked at its own samples alone: the first process's result counts
        for name, report in distributed.from_rank(reports).items():
            self.state.layers[name] = {**self.state.layers[name], **report}

    def solve_units(
        self, inside: dict[str, Any], runs: Sequence[Callable[[], Any]], float_path: FloatPath | None = None
    ) -> None:
        """Statistics and integers for the layers `inside` what `runs` run, unit by unit, in the order they run."""
        if not inside:
            return
        with in_float(inside.values(), except_for=self.final):
            units, repeated = distributed.agree_on_units(*units_of(inside, runs))
        for unit in units:
            with in_float(inside.values(), except_for=self.final):
                once = repeated.isdisjoint(unit)
                statistics = self._observe({n: inside[n] for n in unit}, runs, once, float_path if once else None)
            self._solve_together({name: inside[name] for name in unit}, statistics)
        seen = {name for unit in units for name in unit}
        for name in inside:
            if name not in seen:
                self.state.notes.append(f"{name}: no calibration data reached it; rounded to nearest without data")
                self.solve(name, inside[name], None)

    def _observe(
        self, unit: dict[str, Any], runs: Sequence[Callable[[], Any]], once: bool, float_path: FloatPath | None
    ) -> Statistics:
        """Statistics of the unit's shared input over all batches, and ranges for its static quantizers.

        `once`: the unit runs once a pass, so the pass may end there. `float_path` gives the same rows in the float
        model, for methods that ask.
        """
        first_name, first = next(iter(unit.items()))
        full = any(self.methods(name).needs_hessian for name in unit) and getattr(first, "groups", 1) == 1
        crossed = full and float_path is not None and self.needs_float_path(unit)
        statistics = Statistics.empty(first.weight_ON.shape[1], full, first.weight.device, crossed)
        quantizers = [
            q
            for side in ("input_quantizer", "output_quantizer")
            for m in unit.values()
            if isinstance(q := getattr(m, side), ActivationQuantizer)
        ]
        for quantizer in quantizers:
            quantizer.start_calibration()
        distributed.start_ranges(quantizers)
        current: dict[str, Tensor | None] = {"mask": None, "float": None}

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x, paired = args[0], current["float"]
            if paired is None or paired.shape != x.shape:
                statistics.cross = None  # other rows went here in the float model: an expert's, say
            same = None if paired is None or statistics.cross is None else rows_of(paired, module, current["mask"])
            statistics.add(rows_of(x, module, current["mask"]), same)

        handles = [first.register_forward_pre_hook(hook)]
        if once:
            handles.append(list(unit.values())[-1].register_forward_hook(stop))
        try:
            for i, (run, mask) in enumerate(zip(runs, self.masks)):
                if i == 0 and distributed.rank() > 0:
                    distributed.same_bins(quantizers)
                current["mask"] = mask
                if crossed and float_path is not None:
                    current["float"] = float_path.input_of(first_name, i)
                for quantizer in quantizers:
                    quantizer.mask = mask
                run_until_stop(run)
                if i == 0 and distributed.rank() == 0:
                    distributed.same_bins(quantizers)
        finally:
            for handle in handles:
                handle.remove()
        statistics.share()
        distributed.merge_ranges(quantizers)
        statistics.check(first_name)
        for quantizer in quantizers:
            quantizer.mask = None
            quantizer.finish_calibration()
        return statistics

    def _solve_together(self, unit: dict[str, Any], statistics: Statistics) -> None:
        """A unit's layers; with several processes each solves some of them, and all get every solution."""
        world, rank = distributed.world(), distributed.rank()
        found: dict[str, Solution] = {}
        if world > 1:
            turns = [name for name, module in unit.items() if id(module.weight_quantizer) not in self.solved]
            found = {n: self._solution(n, unit[n], statistics) for n in turns[rank::world]}
            found = {n: solution for part in distributed.from_all(found) for n, solution in part.items()}
        for name, module in unit.items():
            self.solve(name, module, statistics, found.get(name))

    def _solution(self, name: str, module: FakeQuant, statistics: Statistics | None) -> Solution:
        quantizer = module.weight_quantizer
        assert quantizer is not None
        return self.methods(name).solve(module.weight_ON.detach().float().clone(), statistics, quantizer.spec)

    def solve(
        self, name: str, module: FakeQuant, statistics: Statistics | None, solution: Solution | None = None
    ) -> None:
        """Integers for one layer, set into its module, with a line for the receipt. A tied weight is solved once.

        `solution`: where another process has found it already.
        """
        self._solve(name, module, statistics, solution)
        self.advance(1)

    def _solve(self, name: str, module: FakeQuant, statistics: Statistics | None, solution: Solution | None) -> None:
        quantizer = module.weight_quantizer
        self.final |= {id(q) for q in (quantizer, module.input_quantizer, module.output_quantizer)}
        if quantizer is None:
            return
        first = self.solved.setdefault(id(quantizer), name)
        if first != name:
            self.state.layers[name] = {**self.state.layers[first], "tied_to": first}
            return
        weight = module.weight_ON.detach().float().clone()  # `set_rounded` will move the module's own
        if solution is None:
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


class _WholeModel(Calibration):
    """A model that is in memory: its blocks one after the other, and what stands outside them by whole passes."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        methods: Methods,
        state: State,
        advance: Callable[[int], None],
    ) -> None:
        device = device_of(model)
        self.model = model
        self.batches = [{k: v.to(device) for k, v in batch.items() if k != "labels"} for batch in batches]
        self.runs = [lambda batch=batch: self.model(**batch) for batch in self.batches]
        super().__init__([batch.get("attention_mask") for batch in self.batches], methods, state, advance)

    def rewrite_model(self) -> None:
        """Parts that rewrite the whole float model, before anything is measured on it."""
        layers = dict(modules_of(self.model, FAKE_QUANT))
        for part, asked in self.parts(OnModel, layers):
            with in_float(layers.values(), except_for=self.final):
                self.add(part.on_model(self.model, asked))

    def chain(self) -> list[tuple[str, nn.Module]]:
        """The blocks from the first with a layer to solve to the last; none where they cannot be run by themselves."""
        found = blocks(self.model)
        busy = [i for i, (_, block) in enumerate(found) if any(True for _ in modules_of(block, SOLVED_ON_DATA))]
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
            fed = fed and (not called or split_call(args, kwargs)[0] is last)
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
        units = distributed.agree_on_units(*units_of({n: self.model.get_submodule(n) for n in names}, self.runs))[0]
        return [name for unit in units for name in unit]

    def walk(self, named_blocks: list[tuple[str, nn.Module]]) -> None:
        """Blocks in order."""
        hidden, calls = self._capture([block for _, block in named_blocks])
        float_hidden: Sequence[Tensor] | None = list(hidden)  # the same tensors until a block has been quantized
        names = [
            [f"{prefix}.{name}" for name, _ in modules_of(block, SOLVED_ON_DATA)] for prefix, block in named_blocks
        ]
        for index, (prefix, block) in enumerate(named_blocks):
            if not any(self.needs_float_path(later) for later in names[index:]):
                float_hidden = None
            of_block: list[Call] = [lambda call=calls[i][index]: call for i in range(len(self.batches))]  # type: ignore[misc]
            runs, float_hidden = self.solve_block(prefix, block, of_block, hidden, float_hidden)
            for i, run in enumerate(runs):
                if index + 1 < len(named_blocks):
                    hidden[i] = run()
                calls[i][index].clear()  # what only this block needed is free now

    def points_elsewhere(self) -> None:
        """Points of blocks that were not walked, by whole passes, before the layers that are solved so."""
        with in_float([m for _, m in modules_of(self.model, FAKE_QUANT)], except_for=self.final):
            calibrate_points(self.model, self.runs, self.masks)

    def whole_model(self, names: list[str]) -> None:
        """Layers outside the blocks, or a model without blocks: statistics by whole forward passes."""
        self.solve_units({name: self.model.get_submodule(name) for name in names}, self.runs)

    def _capture(self, modules: list[nn.Module]) -> tuple[list[Tensor], list[list[list[Any]]]]:
        """Run the model in float and note what each block is called with.

        Returns the first block's hidden states a batch, and per batch and block a list [args, kwargs] without them.
        """
        hidden: list[Tensor] = []
        calls: list[list[list[Any]]] = []

        def first_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden.append(split_call(args, kwargs)[0])

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[-1].append(split_call(args, kwargs)[1])

        handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
        handles.append(modules[0].register_forward_pre_hook(first_hook, with_kwargs=True))
        try:
            layers = [m for _, m in modules_of(self.model, FAKE_QUANT)]
            with in_float(layers, except_for=self.final):
                for batch in self.batches:
                    calls.append([])
                    self.model(**without_cache(self.model, batch))
        finally:
            for handle in handles:
                handle.remove()
        return hidden, calls


def _output_error(weight: Tensor, rounded: Tensor, statistics: Statistics) -> float:
    """||(W - W_hat) X|| / ||W X||, from X X^T, or from its diagonal alone where that is all there is."""
    difference = weight - rounded
    if statistics.hessian is None:
        top, bottom = (difference.square() @ statistics.diagonal).sum(), (weight.square() @ statistics.diagonal).sum()
    else:
        top = ((difference @ statistics.hessian) * difference).sum()
        bottom = ((weight @ statistics.hessian) * weight).sum()
    return float((top.clamp(min=0) / bottom).sqrt()) if bottom > 0 else 0.0
