"""One training step of a planned model: what runs and what lives, from a trace of a few of its blocks.

A model's repeated blocks are grouped by their shapes. The step is traced with a block of each group and once more
with two further ones; operators and peaks are linear in the number of blocks, so the whole model follows. The peak is
followed apart in each phase, and in each half of backward, since another of them is the highest in a deep model.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from quantailor.cost.skeleton import Kind, Skeleton
from quantailor.cost.stand_ins import adapt, spread_experts
from quantailor.cost.trace import Op, Trace, Tracer
from quantailor.models.structure import replace
from quantailor.nn.fake_quant import fake_quantized
from quantailor.recipe import block_prefixes
from quantailor.spec import QuantSpec, Scheme

Distance = Callable[[Tensor, Tensor], Tensor]  # (student [n, V], teacher [n, V]) -> 0-d
Group = tuple[str, str]  # (prefix of a list of blocks, signature of its blocks)
_BASE, _MORE = 1, 2  # blocks of a kind that are traced, and how many more the second time: an even number, so that
# half of backward ends in both as far into a block. A forward pass alone, which takes little, is traced from
# _FORWARD blocks on: where nothing is saved, the first block's peak may be another than the later ones'.
_FORWARD = 2


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes: `size` rows of `length` tokens, or images of `length` pixels a side."""

    size: int
    length: int


@dataclass(frozen=True)
class Step:
    """Of one micro-batch and one update: bytes by part and operators by count.

    `dynamic_peak`: most bytes of activations and gradients together; `gradients` all of them, which are kept between
    micro-batches. `saved_bytes`: what the forward pass leaves for backward, `saved_small_bytes` its part on the heap.
    """

    weight_bytes: int
    quantizer_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    trainable: int
    num_parameters: int
    teacher_bytes: int
    saved_bytes: int
    saved_small_bytes: int
    peaks: Mapping[str, int]
    ops: Counter[Op]
    update_ops: Counter[Op]
    num_blocks: int
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """Of products in one micro-batch, forward and backward, the teacher's included."""
        return sum(op.flops * n for op, n in self.ops.items())

    @property
    def dynamic_peak(self) -> int:
        return max(self.peaks.values(), default=0)


def trace_step(
    plan: Skeleton,
    schemes: Mapping[str, Scheme],
    batch: Batch,
    *,
    distance: Distance | None,
    lora: int | None = None,
    train: bool = True,
) -> Step:
    """The step of `plan` with these layers quantized; `schemes` empty is a float model.

    `distance`: of the logits to a float teacher's, as QAT minimizes it; None: the task's own loss, no teacher. `lora`:
    rank of adapters inside the rounding, which alone are trained. `train` False: a forward pass only.
    """
    notes: list[str] = []
    groups = _groups(plan.model)
    fewest = _BASE if train else _FORWARD
    base = {key: min(len(members), fewest) for key, members in groups.items()}
    with _shortened(plan.model, groups, dict.fromkeys(groups, fewest + _MORE)):
        model = copy.deepcopy(plan.model)
        teacher = copy.deepcopy(plan.model) if distance is not None else None
    with FakeTensorMode():
        notes += _faked(model, schemes)
        if teacher is not None:
            _faked(teacher, {})
        if lora is not None:
            adapt(model, lora)
        inputs = _inputs(plan, batch)

        def run(keep: Mapping[Group, int]) -> _Run:
            with _shortened(model, groups, keep), _shortened(teacher, groups, keep):
                return _traced(model, teacher, plan.kind, inputs, distance, train)

        first = run(base)
        result = first
        for key, members in groups.items():
            if (rest := len(members) - base[key]) > 0:
                more = min(_MORE, rest)
                result = result.plus(first, run({**base, key: base[key] + more}), rest / more)
    return Step(
        **{name: round(size) for name, size in result.sizes.items()},
        saved_bytes=round(result.saved),
        saved_small_bytes=round(result.saved_small),
        peaks={name: round(peak) for name, peak in result.peaks.items()},
        ops=_rounded(result.ops),
        update_ops=_rounded(result.update_ops),
        num_blocks=sum(map(len, groups.values())),
        notes=tuple(dict.fromkeys(notes)),
    )


@dataclass(frozen=True)
class _Run:
    """What one traced step had; `plus` is linear in all of it."""

    sizes: Mapping[str, float]
    saved: float
    saved_small: float
    peaks: Mapping[str, float]
    ops: Mapping[Op, float]
    update_ops: Mapping[Op, float]

    def plus(self, first: _Run, again: _Run, times: float) -> _Run:
        """This run and `times` what `again` has more than `first`."""

        def more(mine: Mapping[Any, float], less: Mapping[Any, float], much: Mapping[Any, float]) -> dict[Any, float]:
            keys = dict.fromkeys((*mine, *less, *much))
            return {k: mine.get(k, 0) + times * (much.get(k, 0) - less.get(k, 0)) for k in keys}

        return _Run(
            more(self.sizes, first.sizes, again.sizes),
            self.saved + times * (again.saved - first.saved),
            self.saved_small + times * (again.saved_small - first.saved_small),
            more(self.peaks, first.peaks, again.peaks),
            more(self.ops, first.ops, again.ops),
            more(self.update_ops, first.update_ops, again.update_ops),
        )


def _rounded(ops: Mapping[Op, float]) -> Counter[Op]:
    return Counter({op: round(count) for op, count in ops.items() if round(count) > 0})


def _faked(model: nn.Module, schemes: Mapping[str, Scheme]) -> list[str]:
    """Put fake tensors for those on meta, and quantized twins for the layers that are there. Returns notes."""
    _off_meta(model)
    notes = spread_experts(model)
    names = {name for name, _ in model.named_modules()}
    for name, scheme in schemes.items():
        if scheme.input is not None and scheme.input.outliers is not None:
            notes.append("outlier columns depend on the data: traced as if there were none")
            scheme = Scheme(scheme.weight, _plain(scheme), scheme.output)
        if name in names:
            replace(model, name, fake_quantized(model.get_submodule(name), scheme))
    return notes


def _off_meta(model: nn.Module) -> None:
    """Fake tensors of the CPU for those on meta: which kernel of attention runs depends on the device. Ties stay."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = made.setdefault(id(parameter), nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype))


def _plain(scheme: Scheme) -> QuantSpec:
    """The input's spec without outlier columns."""
    assert scheme.input is not None
    return dataclasses.replace(scheme.input, outliers=None)


def _inputs(plan: Skeleton, batch: Batch) -> dict[str, Tensor]:
    if plan.kind == "image":
        channels = getattr(plan.config, "num_channels", 3)
        return {"pixel_values": torch.zeros(batch.size, channels, batch.length, batch.length, dtype=plan.dtype)}
    ids = torch.zeros(batch.size, batch.length, dtype=torch.int64)
    return {"input_ids": ids}


def _sizes(model: nn.Module, teacher: nn.Module | None) -> dict[str, float]:
    """Bytes of what stays there during a step."""
    marks = ("weight_quantizer.", "input_quantizer.", "output_quantizer.")
    inside: dict[int, Tensor] = {}
    plain: dict[int, Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        (inside if any(mark in name for mark in marks) else plain)[id(tensor)] = tensor
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "weight_bytes": _bytes(plain.values()),
        "quantizer_bytes": _bytes(inside.values()),
        "gradient_bytes": _bytes(trained),
        "optimizer_bytes": 2 * _bytes(trained),
        "trainable": sum(p.numel() for p in trained),
        "num_parameters": sum(p.numel() for p in plain.values() if isinstance(p, nn.Parameter)),
        "teacher_bytes": 0 if teacher is None else _bytes((*teacher.parameters(), *teacher.buffers())),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _groups(model: nn.Module) -> dict[Group, list[int]]:
    """(prefix of a list of blocks, their signature) -> places in the list. A signature is types and shapes."""
    found: dict[Group, list[int]] = {}
    for prefix in block_prefixes(model):
        for place, block in enumerate(model.get_submodule(prefix.removesuffix(".")).children()):
            signature = "|".join(
                [f"{n}:{type(m).__name__}" for n, m in block.named_modules()]
                + [f"{n}{list(p.shape)}" for n, p in block.named_parameters()]
            )
            found.setdefault((prefix, signature), []).append(place)
    return found


@contextmanager
def _shortened(model: nn.Module | None, groups: Mapping[Group, list[int]], keep: Mapping[Group, int]) -> Iterator[None]:
    """Only the first `keep` blocks of each group hang in their lists, under their own names."""
    before = []
    for prefix in dict.fromkeys(prefix for prefix, _ in groups) if model is not None else ():
        holder = model.get_submodule(prefix.removesuffix("."))  # type: ignore[union-attr]
        places = {str(p) for key, members in groups.items() if key[0] == prefix for p in members[: keep[key]]}
        before.append((holder, holder._modules))
        kept = [(name, child) for i, (name, child) in enumerate(holder._modules.items()) if str(i) in places]
        holder._modules = dict(kept)
    try:
        yield
    finally:
        for holder, modules in before:
            holder._modules = modules


def _traced(
    model: nn.Module,
    teacher: nn.Module | None,
    kind: Kind,
    inputs: Mapping[str, Tensor],
    distance: Distance | None,
    train: bool,
) -> _Run:
    model.zero_grad(set_to_none=True)
    tracer = Tracer()
    for there in (model, teacher):
        if there is not None:
            tracer.own((*there.parameters(), *there.buffers()))
    tracer.own(inputs.values())
    call = {**inputs, **({"use_cache": False} if kind == "lm" else {})}
    sizes = _sizes(model, teacher)
    if not train:
        with tracer, tracer.phase("forward"), torch.no_grad():
            model(**call)
        return _Run(sizes, 0, 0, tracer.trace.peaks, tracer.trace.ops, {})
    with tracer:
        with tracer.phase("forward"):
            student = _scored(model(**call).logits, kind)
            tracer.trace.saved, tracer.trace.saved_small = tracer.live, tracer.live_small
        with tracer.phase("loss"):
            if teacher is not None and distance is not None:
                with torch.no_grad():
                    reference = _scored(teacher(**call).logits, kind)
                loss = distance(student, reference)
                del reference
            else:
                targets = torch.zeros(student.shape[0], dtype=torch.int64)
                loss = F.cross_entropy(student.float(), targets)
        del student
        half = _half_way(loss)
        with tracer.phase("backward, first half"), half(tracer):
            loss.backward()
        del loss
    update = _update(model, tracer.live)
    trace = tracer.trace
    return _Run(sizes, trace.saved, trace.saved_small, {**trace.peaks, **update.peaks}, trace.ops, update.ops)


def _half_way(loss: Tensor) -> Callable[[Tracer], Any]:
    """A context that turns the phase when half of the graph's nodes have run."""
    nodes, seen, queue = 0, set(), [loss.grad_fn]
    order = []
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        order.append(node)
        nodes += 1
        queue += [parent for parent, _ in node.next_functions]
    ran = 0

    @contextmanager
    def watching(tracer: Tracer) -> Iterator[None]:
        def count(_: Any) -> None:
            nonlocal ran
            ran += 1
            if ran == nodes // 2:
                tracer._phase = "backward, second half"
                peaks = tracer.trace.peaks
                peaks["backward, second half"] = max(peaks.get("backward, second half", 0), tracer.live)

        handles = [node.register_prehook(count) for node in order]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return watching


def _scored(logits: Tensor, kind: Kind) -> Tensor:
    """The rows of logits that count, picked by index as training picks them: [n, V]."""
    if kind != "lm":
        return logits
    rows = logits.shape[0] * (logits.shape[1] - 1)
    index = torch.zeros(rows, dtype=torch.int64)
    return logits[:, :-1][index, index]


def _update(model: nn.Module, live: int) -> Trace:
    """Clipping, the look for infinities and AdamW, parameter by parameter as torch runs them on a CPU: what is done for
    one of a size is done alike for all of it, so it is traced once and counted as often."""
    trained = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    alike = Counter((p.shape, p.dtype) for p in trained)
    first = {(p.shape, p.dtype): p for p in reversed(trained)}
    whole = Trace()
    for key, count in alike.items():
        part = _update_of(first[key], live)
        for op, times in part.ops.items():
            whole.ops[op] += count * times
        for phase, peak in part.peaks.items():
            whole.peaks[phase] = max(whole.peaks.get(phase, 0), peak)
    return whole


def _update_of(p: nn.Parameter, live: int) -> Trace:
    assert p.grad is not None
    mean, square = torch.zeros_like(p), torch.zeros_like(p)
    tracer = Tracer()
    tracer.own((p, p.grad, mean, square))
    tracer.live = live
    with tracer, tracer.phase("update"), torch.no_grad():
        torch.linalg.vector_norm(p.grad)
        torch.linalg.vector_norm(p.grad)
        p.grad.mul_(torch.ones(()))
        mean.lerp_(p.grad, 0.1)
        square.mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
        scale = (square.sqrt() / 1.0).add_(1e-8)
        p.addcdiv_(mean, scale, value=-1.0)
    return tracer.trace
