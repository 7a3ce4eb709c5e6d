"""What feeds what inside a block: where a factor a channel can move from one layer into the layers that read it.

    (source / s) -> consumers with columns * s        the block computes the same

A source is a norm (its gain and shift) or a linear layer (its output rows and bias). Nothing here knows an architecture
by name. A source's channels are multiplied by known factors, and whatever layer then sees its inputs multiplied by
them, column by column, is a consumer: that gives grouped-query attention, where a value channel reaches the columns of
several heads, and the value part of a fused q/k/v, without a word about either. Then everything is folded with random
factors, and only what leaves the block's output as it was is returned. A norm whose output also goes along the
residual fails there, and so does a weight tied to a layer that does not share the input.

The model must be in eval mode, with quantizers off. Parameters that modules outside of the block share are not seen.
Axes: C channels of the source, N inputs of a consumer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 64  # of each layer's input that are compared, a batch
_PROPORTIONAL = 1e-3  # what a column may differ from its multiple, relative: far above rounding, far below two levels
_SAME = 1e-4  # relative change of the block's output that is rounding
_UNDONE = 0.02  # of the effect of the source alone that may be left after folding
_CHOICES = 16  # ways to fold into modules that do not say which axis is their input
_ELSEWHERE = "its output is also used elsewhere: by the residual, or by what is no plain product"
_SPAN = 2.0  # factors of a probe lie in 2 ** (0.25 .. 0.25 + _SPAN)


@dataclass(frozen=True, eq=False)
class Consumer:
    """One parameter that multiplies a source's channels: `channel[j]` of [N] is the one that input j gets; -1 none."""

    name: str
    parameter: str
    axis: int
    channel: Tensor


@dataclass(frozen=True, eq=False)
class Feed:
    """A verified source and all its consumers. `movable` [C] says which of its channels may take another factor than 1.

    Names are relative to the block. `offset` is 1 where a norm multiplies by 1 + weight.
    """

    source: str
    axis: int
    offset: float
    movable: Tensor
    consumers: tuple[Consumer, ...]

    def spread(self, factor_C: Tensor, consumer: Consumer) -> Tensor:
        """The factor of each of a consumer's inputs, [N]."""
        channel = consumer.channel
        return torch.where(channel >= 0, factor_C[channel.clamp(min=0)], torch.ones_like(factor_C[:1]))


@dataclass(frozen=True)
class Refused:
    """A source that must keep its scale, the layers it would have moved to, and why."""

    source: str
    consumers: tuple[str, ...]
    reason: str


@torch.no_grad()
def fold(block: nn.Module, feed: Feed, factor_C: Tensor) -> None:
    """Divide the source's channels by `factor_C` (positive) and multiply the consumers' columns by it, in place.

    Computed in float32 and rounded to each parameter's own dtype: powers of two are exact in any.
    """
    factor = torch.where(feed.movable, factor_C.float(), torch.ones_like(factor_C, dtype=torch.float32))
    source = block.get_submodule(feed.source)
    _multiply(source.weight, factor.reciprocal(), feed.axis, feed.offset)
    if getattr(source, "bias", None) is not None:
        _multiply(source.bias, factor.reciprocal(), 0)
    for parameter, consumer in _parameters(block, feed):
        _multiply(parameter, feed.spread(factor, consumer), consumer.axis)


def touched(block: nn.Module, feed: Feed) -> list[nn.Parameter]:
    """The parameters that folding changes."""
    source: Any = block.get_submodule(feed.source)
    own = [source.weight, *([source.bias] if getattr(source, "bias", None) is not None else [])]
    return [*own, *(parameter for parameter, _ in _parameters(block, feed))]


@torch.no_grad()
def find_feeds(block: nn.Module, runs: Sequence[Callable[[], Tensor]]) -> tuple[list[Feed], list[Refused]]:
    """The verified feeds of a block, and the sources that must keep their scale. Leaves every parameter as it was.

    `runs[i]()` gives the block's output on a batch; only as many are used as it takes to reach every layer.
    """
    with _in_float32(block):
        probe = _Probe(block, runs)
        found = [probe.feed(name) for name in _sources(block)]
    return [f for f in found if isinstance(f, Feed)], [f for f in found if isinstance(f, Refused)]


def _sources(block: nn.Module) -> list[str]:
    """Norms and linear layers by name: whatever has a vector to scale, or rows of outputs."""
    found = []
    for name, module in block.named_modules():
        weight = module._parameters.get("weight")
        if name and weight is not None and (weight.dim() == 1 or _is_linear(module)):
            found.append(name)
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _out_axis(module: Any) -> int:
    """Where a source's output channels are; transformers' Conv1D stores its weight as [N, O]."""
    return 1 if type(module).__name__ == "Conv1D" else 0


class _Probe:
    """One block on the few batches that reach all of its layers."""

    def __init__(self, block: nn.Module, runs: Sequence[Callable[[], Tensor]]) -> None:
        self.block = block
        self.readers: dict[str, Any] = {
            name: module
            for name, module in block.named_modules()
            if not isinstance(module, nn.Embedding)
            and any(p.dim() > 1 for p in module._parameters.values() if p is not None)
        }
        self.runs: list[Callable[[], Tensor]] = []
        self.inputs: list[dict[str, list[Tensor]]] = []
        self.outputs: list[Tensor] = []
        unseen = set(self.readers)
        for run in runs:
            inputs, output = self._run(run)
            if unseen & set(inputs) or not self.runs:
                self.runs.append(run)
                self.inputs.append(inputs)
                self.outputs.append(output)
            unseen -= set(inputs)
            if not unseen:
                break
        self.unseen = unseen

    def _run(self, run: Callable[[], Tensor]) -> tuple[dict[str, list[Tensor]], Tensor]:
        """(sampled input rows of each reader, the block's output)."""
        inputs: dict[str, list[Tensor]] = {}

        def hook_for(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
                if x is not None and x.is_floating_point() and x.dim() > 0:
                    rows = x.detach().reshape(-1, x.shape[-1])
                    at = torch.linspace(0, len(rows) - 1, min(len(rows), _ROWS), device=x.device).long()
                    inputs.setdefault(name, []).append(rows[at].float())

            return hook

        handles = [m.register_forward_pre_hook(hook_for(n), with_kwargs=True) for n, m in self.readers.items()]
        try:
            output = run()
        finally:
            for handle in handles:
                handle.remove()
        return inputs, output.detach().float()

    def _with(self, feed: Feed, factor: Tensor) -> tuple[list[dict[str, list[Tensor]]], list[Tensor]]:
        """All runs with the source multiplied by `factor` and the feed's consumers divided by it."""
        with _restored(touched(self.block, feed)):
            fold(self.block, feed, factor.reciprocal())
            pairs = [self._run(run) for run in self.runs]
        return [inputs for inputs, _ in pairs], [output for _, output in pairs]

    def feed(self, name: str) -> Feed | Refused:
        """What a source feeds, verified; or why its scale must stay where it is."""
        source: Any = self.block.get_submodule(name)
        refused = Refused(name, (), "no layer reads its output channel by channel")
        for start in self._forms(name, source):
            found = self._settle(start, 0)
            if isinstance(found, Feed):
                return found
            if found.consumers:
                refused = found
        return refused

    def _forms(self, name: str, source: Any) -> Iterator[Feed]:
        """Ways in which this source may be scaled, without consumers yet."""
        axis, device = _out_axis(source), source.weight.device
        channels = source.weight.shape[axis]
        everything = torch.ones(channels, dtype=torch.bool, device=device)
        if source.weight.dim() == 1:
            yield Feed(name, 0, 0.0, everything, ())
            yield Feed(name, 0, 1.0, everything, ())  # such as Gemma's: 1 + weight
            return
        yield Feed(name, axis, 0.0, everything, ())
        widths = {m.in_features for m in self.readers.values() if isinstance(m, nn.Linear) and m is not source}
        widths |= {m.weight.shape[0] for m in self.readers.values() if type(m).__name__ == "Conv1D" and m is not source}
        # A fused projection: what only multiplies comes last, the values of q/k/v or the up half of gate/up.
        tails = {(channels - width) // 2 for width in widths if width < channels and not (channels - width) % 2}
        tails = {t for t in tails if any(channels == width + 2 * t and not width % t for width in widths)}
        tails |= {width for width in widths if channels == 2 * width}
        for tail in sorted(tails, reverse=True):
            yield Feed(name, axis, 0.0, torch.arange(channels, device=device) >= channels - tail, ())

    def _settle(self, feed: Feed, depth: int) -> Feed | Refused:
        """Add consumers until the output stays as it was. A layer behind a router shows only once that is folded."""
        alone, new = self._new_consumers(feed)
        names = tuple(dict.fromkeys(c.name for c in feed.consumers))
        if not new or depth == 4:
            return Refused(feed.source, names, _ELSEWHERE)
        names += tuple(new)
        source: Any = self.block.get_submodule(feed.source)
        unseen = [n for n in sorted(self.unseen) if _operands(self.readers[n], len(feed.movable))]
        if source.weight.dim() == 1 and unseen:  # an expert, say, that would read this too
            behind = ", ".join(unseen[:3])
            return Refused(feed.source, names, f"no data reached {behind}: whether it reads the same is unknown")
        refused = Refused(feed.source, names, _ELSEWHERE)
        for choice in itertools.islice(itertools.product(*new.values()), _CHOICES):
            wider = _with_consumers(feed, choice)
            if self._unchanged(wider, alone):
                return wider
            found = self._settle(wider, depth + 1)
            if isinstance(found, Feed):
                return found
            refused = max(refused, found, key=lambda r: len(r.consumers))
        return refused

    def _new_consumers(self, feed: Feed) -> tuple[list[Tensor], dict[str, list[Consumer]]]:
        """(outputs of a probe, ways to fold into each reader whose inputs came out multiplied by the probe's factors).

        Two probes give the two digits of a channel's number.
        """
        channels = len(feed.movable)
        number = torch.arange(channels, device=feed.movable.device)
        base = math.isqrt(channels - 1) + 1
        step = _SPAN / max(base - 1, 1)
        known = {c.name for c in feed.consumers}
        ratios: list[dict[str, Tensor]] = []
        outputs: list[list[Tensor]] = []
        for digit in (number // base, number % base):
            inputs, output = self._with(feed, torch.exp2(0.25 + step * digit))
            outputs.append(output)
            ratios.append({n: r for n in self.readers if n not in known and (r := self._ratio(n, inputs)) is not None})
            if not ratios[-1]:
                return output, {}
        found: dict[str, list[Consumer]] = {}
        for name in ratios[0].keys() & ratios[1].keys():
            high, low = (torch.log2(r[name].clamp(min=1e-6)) for r in ratios)
            digits = [((part - 0.25) / step) for part in (high, low)]
            off = [(d - d.round()).abs() > 0.25 for d in digits]
            channel = digits[0].round() * base + digits[1].round()
            dead = high.isnan()
            read = ~dead & (ratios[0][name] != 1)
            channel = torch.where(read, channel, -torch.ones_like(channel)).long()
            bad = read & (off[0] | off[1] | (channel < 0) | (channel >= channels))
            if not read.any() or bad.any() or not feed.movable[channel[read]].all():
                continue
            place = torch.arange(len(channel), device=channel.device)
            shift = channel[read][0] - place[read][0]
            if torch.equal(channel[read], place[read] + shift) and bool((place + shift < channels).all()):
                channel = torch.where(dead, place + shift, channel)  # what was always 0 follows its neighbours
            if ways := [Consumer(name, p, axis, channel) for p, axis in _operands(self.readers[name], len(channel))]:
                found[name] = ways
        return outputs[0], {name: found[name] for name in self.readers if name in found}

    def _ratio(self, name: str, inputs: list[dict[str, list[Tensor]]]) -> Tensor | None:
        """By how much each input of a reader was multiplied, [N]: exactly 1 where it was not, NaN where it is always 0.

        None where the reader's inputs are not a multiple of what they were, or all of them are what they were.
        """
        before = [x for batch in self.inputs for x in batch.get(name, ())]
        after = [x for batch in inputs for x in batch.get(name, ())]
        if not before or [x.shape for x in before] != [x.shape for x in after]:
            return None
        if len({x.shape[1] for x in before}) > 1:
            return None
        x, y = torch.cat(before), torch.cat(after)
        power = x.square().sum(0)
        ratio = (x * y).sum(0) / power
        away = (y - ratio * x).square().sum(0) > _PROPORTIONAL**2 * y.square().sum(0)
        if bool((away & (power > 0)).any()) or not bool(torch.isfinite(y).all()):
            return None
        ratio = torch.where((ratio - 1).abs() < 2 * _PROPORTIONAL, torch.ones_like(ratio), ratio)
        ratio[power == 0] = math.nan
        return ratio if bool((ratio[power > 0] != 1).any()) else None

    def _unchanged(self, feed: Feed, alone: list[Tensor]) -> bool:
        """Whether random factors leave the output as it was; `alone` is what they must not leave any of."""
        generator = torch.Generator().manual_seed(0)
        factor = torch.exp2(2 * torch.rand(len(feed.movable), generator=generator) - 1).to(feed.movable.device)
        for output, before, moved in zip(self._with(feed, factor)[1], self.outputs, alone):
            if output.shape != before.shape or not torch.equal(output.isfinite(), before.isfinite()):
                return False
            difference, whole, effect = (
                float(torch.linalg.vector_norm(t.nan_to_num(0, 0, 0).double()))
                for t in (output - before, before, moved - before)
            )
            if difference > _SAME * whole or (effect > _SAME * whole and difference > _UNDONE * effect):
                return False
        return True


def _with_consumers(feed: Feed, new: Sequence[Consumer]) -> Feed:
    consumers = (*feed.consumers, *new)
    read = torch.zeros_like(feed.movable)
    for consumer in consumers:
        read[consumer.channel[consumer.channel >= 0]] = True
    return Feed(feed.source, feed.axis, feed.offset, feed.movable & read, consumers)


def _operands(module: nn.Module, length: int) -> list[tuple[str, int]]:
    """(parameter, axis) that may multiply an input of this length: a Linear's columns; of others any such axis."""
    if isinstance(module, nn.Linear):
        return [("weight", 1)] if module.weight.shape[1] == length else []
    own = [(n, p) for n, p in module._parameters.items() if p is not None and p.dim() > 1]
    return [(n, axis) for n, p in own for axis in reversed(range(p.dim())) if p.shape[axis] == length]


def _parameters(block: nn.Module, feed: Feed) -> list[tuple[nn.Parameter, Consumer]]:
    """Each consumer's parameter, one that several share once."""
    found: dict[int, tuple[nn.Parameter, Consumer]] = {}
    for consumer in feed.consumers:
        parameter = getattr(block.get_submodule(consumer.name), consumer.parameter)
        found.setdefault(id(parameter), (parameter, consumer))
    return list(found.values())


def _multiply(parameter: Any, factor: Tensor, axis: int, offset: float = 0.0) -> None:
    shape = [-1 if i == axis else 1 for i in range(parameter.dim())]
    scaled = (parameter.float() + offset) * factor.view(shape) - offset
    parameter.copy_(scaled)


@contextmanager
def _restored(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    kept = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, value in kept:
            parameter.copy_(value)


@contextmanager
def _in_float32(block: nn.Module) -> Iterator[None]:
    """A block of half-precision parameters computes in float32; afterwards it holds the very tensors it held before."""
    every = (*block.parameters(), *block.buffers())
    kept = [(t, t.data) for t in every if t.is_floating_point() and t.dtype.itemsize < 4]
    if not kept:
        yield
        return

    def widen(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return _widened(args), _widened(kwargs)

    for tensor, data in kept:
        tensor.data = data.float()
    handle = block.register_forward_pre_hook(widen, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        for tensor, data in kept:
            tensor.data = data


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value
    if type(value) in (tuple, list):
        return type(value)(_widened(v) for v in value)
    if type(value) is dict:
        return {k: _widened(v) for k, v in value.items()}
    return value
