"""SmoothQuant: move outliers of a layer's input into its weight, so that both fit their grids.

    Y = (X diag(s)^-1) (diag(s) W^T),     s_j = max |x_j|^alpha / max |w_j|^(1 - alpha)

The division is folded into what feeds the layer (models/feeds.py finds and verifies that), for all of its readers
together: `max |w_j|` runs over the columns of all of them. alpha is searched for each source by what it is for, the
error of its readers' outputs with weights and inputs on their grids, and nothing is folded unless that error falls.
A common factor cancels on every grid (only the threshold of outlier columns would see it), so s is scaled to a
geometric mean of 1 over the channels that are in use.
Where a parameter is of half precision, factors are rounded to powers of two, so that folding rounds nothing (but for
gains stored less 1).

Source: Xiao et al. 2023, arXiv:2211.10438, Eq. 3-4. Different here: alpha a source instead of one for all (there 0.5);
values and the MLP's inner channels are sources as well, not only norms.
Axes: C channels of a source, N inputs of a reader, T rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.models.feeds import Consumer, Feed, Refused, find_feeds, fold, touched
from quantailor.models.structure import modules_of
from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.nn.fake_quant import FakeQuantLinear
from quantailor.numerics import grids
from quantailor.numerics.grouping import from_groups, to_groups
from quantailor.numerics.measures import relative_error
from quantailor.observers.weights import weight_scale
from quantailor.ptq.method import Masks, Report, Runs
from quantailor.ptq.statistics import rows_of
from quantailor.spec import PerTensor, QuantSpec, RangeMethod

_FINALISTS = 3
_LIMIT = 1024.0  # factors stay within this of their mean: beyond it half precision would lose what is scaled


def smoothing_factors(x_max_C: Tensor, w_max_C: Tensor, alpha: float) -> Tensor:
    """Eq. 4 up to a common factor, [C]; 1 for a channel that was never active or whose columns are all 0."""
    used = (x_max_C > 0) & (w_max_C > 0)
    s = x_max_C.double().pow(alpha) / w_max_C.double().pow(1 - alpha)
    return centred(s, used, s[used].log().mean().exp())


def centred(s_C: Tensor, used_C: Tensor, center: Tensor) -> Tensor:
    """s / center, float32 and within a sane range; 1 where a channel is not in use."""
    s = (s_C / center).clamp(1 / _LIMIT, _LIMIT)
    return torch.where(used_C & torch.isfinite(s), s, torch.ones_like(s)).float()


@dataclass(frozen=True)
class SmoothQuant:
    alphas: tuple[float, ...] = tuple(round(0.05 * i, 2) for i in range(20))
    rows: int = 512  # of each layer's input that alphas are scored on; maxima are taken over all
    needs_hessian: bool = False
    needs_float_path: bool = False

    def on_block(self, block: nn.Module, layers: Mapping[str, Any], runs: Runs, masks: Masks) -> dict[str, Report]:
        """Fold what helps into the block, in place. Returns a report a layer: what was folded where, or why not."""

        def candidates(readers: Sequence[Reader], feed: Feed) -> Iterator[tuple[float, Tensor]]:
            x_max, w_max = largest_inputs(readers, feed), largest_weights(readers, feed)
            for alpha in self.alphas:
                yield alpha, smoothing_factors(x_max, w_max, alpha)

        return rescale("smoothquant", block, layers, runs, masks, self.rows, _smoothable, candidates)


def _smoothable(module: Any) -> str | None:
    """Why a layer has nothing to smooth."""
    return None if module.input_quantizer is not None else "weight-only scheme: it has no activations to smooth"


@dataclass
class Reader:
    """A quantized layer that a source feeds, and what calibration shows of its input.

    `channel` [N] is the consumer's; `x` [T, N] a sample of rows; `x_max`, `abs_sum`, `square_sum` [N] are over all of
    `num_rows`.
    """

    name: str
    module: Any
    channel: Tensor
    x: Tensor
    x_max: Tensor
    abs_sum: Tensor
    square_sum: Tensor
    num_rows: int

    @cached_property
    def target(self) -> Tensor:
        """The float output [T, O], without bias."""
        return self.x @ self.module.weight_ON.detach().float().t()

    def hat(self, s_N: Tensor, range_method: RangeMethod | None) -> Tensor:
        """The output [T, O] with columns times s and inputs divided by it, both on their grids, without bias.

        The weight's range is the scheme's own, as RTN would search it, or `range_method`.
        """
        w, x = self.module.weight_ON.detach().float() * s_N, self.x / s_N
        spec: QuantSpec = self.module.weight_quantizer.spec
        if range_method is None:
            w = fake_weight(w, spec, self.square_sum / s_N.square() / max(self.num_rows, 1))
        else:
            w = fake_weight(w, dataclasses.replace(spec, range=range_method), None)
        if self.module.input_quantizer is not None:
            x = fake_activation(x, self.module.input_quantizer.spec)
        return x @ w.t()


def fake_weight(weight_ON: Tensor, spec: QuantSpec, importance_N: Tensor | None) -> Tensor:
    """A weight rounded to nearest on the grid that `spec` finds for it. [O, N] -> [O, N]"""
    usable = importance_N is not None and bool((importance_N > 0).any())
    scale, zero_point = weight_scale(weight_ON, spec, importance_N if usable else None)
    q = grids.encode(to_groups(weight_ON, spec.group_size), scale, zero_point, spec.grid)
    return from_groups(grids.decode(q, scale, zero_point, spec.grid), weight_ON.shape[1])


def fake_activation(x_TN: Tensor, spec: QuantSpec) -> Tensor:
    """Inputs on their grid, as the layer itself puts them there; a static range is calibrated on these rows."""
    quantizer = ActivationQuantizer(spec, x_TN.device)
    quantizer.start_calibration()
    quantizer(x_TN)
    quantizer.finish_calibration()
    return quantizer(x_TN)


def output_error(readers: Sequence[Reader], feed: Feed, s_C: Tensor, range_method: RangeMethod | None = None) -> float:
    """sqrt of the mean over readers of ||Y_hat - Y||^2 / ||Y||^2, for inputs / s and weights * s on their grids."""
    total = 0.0
    for reader in readers:
        y_hat = reader.hat(feed.spread(s_C, _consumer(feed, reader)), range_method)
        total += relative_error(y_hat, reader.target) ** 2
    return (total / len(readers)) ** 0.5


def largest_inputs(readers: Sequence[Reader], feed: Feed) -> Tensor:
    """max |x| of each of the source's channels, [C]."""
    return _over_channels(readers, feed, lambda reader: reader.x_max)


def largest_weights(readers: Sequence[Reader], feed: Feed) -> Tensor:
    """max |w| over all columns of all readers that a channel reaches, [C]."""
    return _over_channels(readers, feed, lambda reader: reader.module.weight_ON.detach().float().abs().amax(0))


def mean_inputs(readers: Sequence[Reader], feed: Feed) -> Tensor:
    """mean |x| of each of the source's channels over the rows and columns that see it, [C]."""
    total = torch.zeros(len(feed.movable), device=feed.movable.device)
    count = torch.zeros_like(total)
    for reader in readers:
        read = reader.channel >= 0
        total.index_add_(0, reader.channel[read], reader.abs_sum[read])
        count.index_add_(0, reader.channel[read], torch.full_like(total, reader.num_rows)[:1].expand(int(read.sum())))
    return total / count.clamp(min=1)


def _over_channels(readers: Sequence[Reader], feed: Feed, of: Callable[[Reader], Tensor]) -> Tensor:
    result = torch.zeros(len(feed.movable), device=feed.movable.device)
    for reader in readers:
        read = reader.channel >= 0
        result.scatter_reduce_(0, reader.channel[read], of(reader)[read], "amax")
    return result


def _consumer(feed: Feed, reader: Reader) -> Consumer:
    return next(c for c in feed.consumers if c.name == reader.name)


Candidates = Callable[[Sequence[Reader], Feed], Iterator[tuple[float, Tensor]]]


@torch.no_grad()
def rescale(
    key: str,
    block: nn.Module,
    layers: Mapping[str, Any],
    runs: Runs,
    masks: Masks,
    rows: int,
    refuses: Callable[[Any], str | None],
    candidates: Candidates,
) -> dict[str, Report]:
    """Search a factor for every source that feeds a layer asked for, and fold those that lower the output error.

    `candidates` gives (alpha, s [C]) for a source. They are compared on min-max ranges; the few best then on the
    scheme's own, whose search costs many times as much, and the winner must beat no scaling. `refuses(module)` says
    why a layer has no use for it. Reports under `key`.
    """
    prefix = _prefix(block, layers)
    asked = {
        name.removeprefix(prefix): module for name, module in layers.items() if isinstance(module, FakeQuantLinear)
    }
    wanting = {name for name, module in asked.items() if module.weight_quantizer is not None and not refuses(module)}
    reports: dict[str, Report] = {}
    if wanting:
        quantized = {n: m for n, m in modules_of(block, FakeQuantLinear) if m.weight_quantizer is not None}
        solved = {name for name, module in quantized.items() if module.weight_quantizer.enabled}
        with _in_float([quantized[name] for name in solved]):
            feeds, refused = find_feeds(block, runs)
        used = [f for f in feeds if any(c.name in wanting for c in f.consumers)]
        # Norms first: a layer that is a source as well is scored with its rows as they were.
        used.sort(key=lambda f: block.get_submodule(f.source).weight.dim())  # type: ignore[operator]
        seen = _observe(
            {n: quantized[n] for f in used for c in f.consumers if (n := c.name) in quantized}, runs, masks, rows
        )
        reports = _refusals(wanting, used, refused)
        scaled: set[int] = set()
        for feed in used:
            names = [c.name for c in feed.consumers if c.name in quantized]
            report = _cannot(block, feed, quantized, solved, scaled) or _search(
                block,
                feed,
                [seen[n].reader(quantized[n], c) for c in feed.consumers if (n := c.name) in seen],
                candidates,
            )
            if "folded_into" in report:
                report["folded_into"] = prefix + feed.source
                scaled |= _columns(block, feed)
            reports |= {name: dict(report) for name in names if "folded_into" not in reports.get(name, {})}
    for full, module in layers.items():
        if (name := full.removeprefix(prefix)) not in reports:
            kind = None if name in asked else "no linear layer: only those are scaled"
            reports[name] = {"left": kind or refuses(module) or "its weight is not quantized"}
    return {prefix + name: {key: report} for name, report in reports.items()}


def _prefix(block: nn.Module, layers: Mapping[str, Any]) -> str:
    """What full names have in front of the block's own."""
    local = {id(module): name for name, module in block.named_modules()}
    full, module = next(iter(layers.items()))
    return full.removesuffix(local[id(module)])


def _refusals(wanting: set[str], used: Sequence[Feed], refused: Sequence[Refused]) -> dict[str, Report]:
    fed = {c.name for f in used for c in f.consumers}
    reasons = {name: f"{r.source} keeps its scale: {r.reason}" for r in refused for name in r.consumers}
    nothing = "nothing in its block feeds it channel by channel"
    return {name: {"left": reasons.get(name, nothing)} for name in wanting - fed}


def _cannot(
    block: nn.Module, feed: Feed, quantized: Mapping[str, Any], solved: set[str], scaled: set[int]
) -> Report | None:
    """Why a verified feed must stay as it is all the same."""
    if on_grid := [name for name in (feed.source, *(c.name for c in feed.consumers)) if name in solved]:
        return {"left": f"{on_grid[0]} is on its grid already"}
    if _columns(block, feed) & scaled:
        return {"left": "its columns were scaled together with another source's"}
    if feed.source in quantized and isinstance(quantized[feed.source].weight_quantizer.spec.granularity, PerTensor):
        return {"left": f"{feed.source} has one scale for all its rows, which scaling some of them would spoil"}
    return None


def _columns(block: nn.Module, feed: Feed) -> set[int]:
    """Ids of the parameters whose columns the feed scales."""
    return {id(getattr(block.get_submodule(c.name), c.parameter)) for c in feed.consumers}


def _search(block: nn.Module, feed: Feed, readers: Sequence[Reader], candidates: Candidates) -> Report:
    """Fold the candidate of least error if it is better than none."""
    readers = [reader for reader in readers if reader.num_rows]
    if not readers:
        return {"left": "no calibration data reached it"}
    one = torch.ones(len(feed.movable), device=feed.movable.device)
    exact = any(p.dtype.itemsize < 4 for p in touched(block, feed))
    tried: list[tuple[float, float, Tensor]] = []
    for alpha, s in candidates(readers, feed):
        s = torch.where(feed.movable, torch.exp2(s.log2().round()) if exact else s, one)
        tried.append((output_error(readers, feed, s, "minmax"), alpha, s))
    finalists = sorted(tried, key=lambda t: t[0])[:_FINALISTS]
    before = output_error(readers, feed, one)
    after, alpha, s = min(
        ((output_error(readers, feed, s), a, s) for _, a, s in finalists),
        key=lambda t: t[0],
        default=(before, 0.0, one),
    )
    if not after < before:
        return {"left": "no factor lowers the error of its output", "error_before": before}
    fold(block, feed, s)
    return {"alpha": alpha, "error_before": before, "error_after": after, "folded_into": feed.source}


@contextmanager
def _in_float(modules: Sequence[Any]) -> Iterator[None]:
    """Solved layers compute in float while it is found out what feeds what."""
    quantizers = [
        q for m in modules for q in (m.weight_quantizer, m.input_quantizer, m.output_quantizer) if q is not None
    ]
    before = [quantizer.enabled for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer, enabled in zip(quantizers, before):
            quantizer.enabled = enabled


@dataclass
class _Seen:
    """Sums over all rows of one layer's input, and a sample of them."""

    sample: list[Tensor] = field(default_factory=list)
    x_max: Tensor | None = None
    abs_sum: Tensor | None = None
    square_sum: Tensor | None = None
    num_rows: int = 0

    def add(self, x_TN: Tensor, limit: int) -> None:
        if not len(x_TN) or not bool(torch.isfinite(x_TN).all()):  # the driver counts these batches and judges them
            return
        x = x_TN.detach().float()
        sums = x.abs().amax(0), x.abs().sum(0), x.square().sum(0)
        if self.x_max is None or self.abs_sum is None or self.square_sum is None:
            self.x_max, self.abs_sum, self.square_sum = sums
        else:
            self.x_max = torch.maximum(self.x_max, sums[0])
            self.abs_sum, self.square_sum = self.abs_sum + sums[1], self.square_sum + sums[2]
        self.num_rows += len(x)
        at = torch.linspace(0, len(x) - 1, min(limit, len(x)), device=x.device).long()
        self.sample.append(x[at])

    def reader(self, module: Any, consumer: Consumer) -> Reader:
        none = torch.zeros(len(consumer.channel), device=consumer.channel.device)
        x_max, abs_sum, square_sum = (none if t is None else t for t in (self.x_max, self.abs_sum, self.square_sum))
        x = torch.cat(self.sample) if self.sample else none[None][:0]
        return Reader(consumer.name, module, consumer.channel, x, x_max, abs_sum, square_sum, self.num_rows)


def _observe(modules: Mapping[str, Any], runs: Runs, masks: Masks, rows: int) -> dict[str, _Seen]:
    """One pass over the data: what each module gets, at most about `rows` rows of it kept."""
    seen = {name: _Seen() for name in modules}
    limit = max(1, -(-rows // max(len(runs), 1)))
    current: list[Tensor | None] = [None]

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name].add(rows_of(args[0], module, current[0]), limit)

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in modules.items()]
    try:
        for run, mask in zip(runs, masks):
            current[0] = mask
            run()
    finally:
        for handle in handles:
            handle.remove()
    return seen
