"""Where a model's points are, found by watching one pass, and how quantizers are hung on them.

Nothing here knows an architecture by name. Attention is what calls transformers' attention interface; a residual add is
a sum of the stream that a block is given (nn/residual.py); norms and nonlinearities are modules of their own kind in
the blocks. Our attention function is proved on the model before it is used: without points it must give what the
model's own eager one gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS

from quantailor.errors import UsageError
from quantailor.models.structure import blocks, modules_of
from quantailor.nn import attention, residual
from quantailor.nn.points import POINTS, make_point, quantize_output
from quantailor.numerics.measures import relative_max_difference
from quantailor.points import NAMES, PointEntry, Points
from quantailor.recipe import Entry, block_prefixes
from quantailor.spec import Scheme

_NOT_NONLINEAR = ("Identity", "LinearActivation")
NONLINEAR: tuple[type, ...] = tuple(  # of transformers' activations
    {
        kind
        for value in ACT2CLS.values()
        if isinstance(kind := value[0] if isinstance(value, tuple) else value, type)
        and kind.__name__ not in _NOT_NONLINEAR
    }
)
_LINEAR = ("Linear", "Conv1D")
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}  # of ours against the model's eager attention; else 2e-2


def is_norm(module: nn.Module) -> bool:
    """A LayerNorm or an RMSNorm, by the end of its class's name, as every architecture calls its own."""
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


@dataclass
class Watched:
    """What one pass showed. `attention`: module name -> whether its keys and values are kept in a cache."""

    attention: dict[str, bool] = field(default_factory=dict)
    norms: list[str] = field(default_factory=list)
    nonlinear: list[str] = field(default_factory=list)
    adds: dict[str, int] = field(default_factory=dict)  # block -> residual adds
    repeated: set[str] = field(default_factory=set)  # blocks that ran more than once
    unknown: set[str] = field(default_factory=set)  # options of attention that ours does not have
    interface: bool = True


def find_points(
    model: nn.Module, points: Points, entries: Sequence[Entry], probe: Mapping[str, Tensor] | None = None
) -> tuple[PointEntry, ...]:
    """Every point of `model`, with its spec from `points` or the reason why it is kept.

    `entries`: its layers as a recipe assigned them. `probe`: keyword arguments of `model.forward`; by default tokens
    spread over the vocabulary. The model is left as it was.
    Raises: UsageError where a point is asked for that the model does not have, or whose attention cannot be replaced.
    """
    probe = dict(probe) if probe is not None else default_probe(model)
    seen = _watch(model, probe)
    found = list(_found(model, seen, entries, points))
    for name in points.asked:
        if not any(entry.point == name and entry.spec is not None for entry in found):
            raise UsageError(f"point {name!r}: {_why_none(name, model, seen)}")
    if points.scores or points.kv:
        _prove(model, probe, seen)
    return tuple(found)


def default_probe(model: nn.Module) -> dict[str, Tensor]:
    """Two rows of tokens, the second padded at its end. Raises: UsageError where the vocabulary is not known."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(size, int) or size < 4:
        raise UsageError("points are found by watching one pass, and this model takes no tokens; give calibration data")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ids = torch.linspace(1, size - 1, 24, device=device).long().reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    probe = {"input_ids": ids, "attention_mask": mask}
    return probe | ({"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {})


def uses_interface(model: nn.Module) -> bool:
    """Whether transformers says that the model's attention can be replaced."""
    return isinstance(model, PreTrainedModel) and model._can_set_attn_implementation()


@torch.no_grad()
def _watch(model: nn.Module, probe: Mapping[str, Tensor]) -> Watched:
    seen = Watched(interface=uses_interface(model))
    names = {id(module): name for name, module in model.named_modules()}
    named_blocks = [(name, block) for name, block in blocks(model) if name]

    def on_call(kept: list[str], name: str) -> Any:
        def hook(*_: Any) -> None:
            if name not in kept:
                kept.append(name)

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, module in model.named_modules():
            kind = seen.norms if is_norm(module) else seen.nonlinear if isinstance(module, NONLINEAR) else None
            if kind is not None:
                stack.callback(module.register_forward_hook(on_call(kind, name)).remove)
            if is_norm(module):
                stack.callback(module.register_forward_hook(residual.follow_norm).remove)
        stack.enter_context(_counting(named_blocks, seen))
        calls = stack.enter_context(attention.watched())
        if seen.interface:
            stack.enter_context(implementation(model, attention.IMPLEMENTATION))
        try:
            result = model(**probe)
        except Exception as error:  # a probe of ours need not suit every model
            first = str(error).splitlines()[0][:120] if str(error) else ""
            raise UsageError(
                f"points are found by watching one pass, and this model's failed ({type(error).__name__}: {first}); "
                "leave them out"
            ) from error
    has_cache = getattr(result, "past_key_values", None) is not None
    for module, options in calls:
        seen.attention[names[id(module)]] = has_cache and bool(getattr(module, "is_causal", False))
        seen.unknown |= options & _CHANGES
    return seen


_CHANGES = frozenset({"s_aux", "sinks", "head_mask", "alibi"})  # what some attention functions add to the scores


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def implementation(model: PreTrainedModel | Any, name: str) -> Iterator[None]:
    """Another attention implementation for the block."""
    attention.register()
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _counting(named: Sequence[tuple[str, nn.Module]], seen: Watched) -> Iterator[None]:
    """Count each block's residual adds."""

    def counted(name: str, own: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
            with residual.Stream(hidden, None) as stream:
                result = own(*args, **kwargs)
            seen.repeated |= {name} & set(seen.adds)
            seen.adds[name] = stream.count
            return result

        return forward

    before = [(block, block.__dict__.get("forward")) for _, block in named]
    for name, block in named:
        block.forward = counted(name, block.forward)
    try:
        yield
    finally:
        for block, own in before:
            if own is None:
                del block.forward
            else:
                block.forward = own


def _found(model: nn.Module, seen: Watched, entries: Sequence[Entry], points: Points) -> Iterator[PointEntry]:
    """Entries in the order of blocks, and within one of `NAMES`."""
    named = [(name, block) for name, block in blocks(model) if name]
    firsts = {next((name for name, _ in named if name.startswith(prefix)), "") for prefix in block_prefixes(model)}
    numbers = {name: number for number, (name, _) in enumerate(named)}

    def block_of(name: str) -> int | None:
        return next((n for block, n in numbers.items() if name == block or name.startswith(f"{block}.")), None)

    def entry(point: str, name: str, kind: str, why_not: str | None = None) -> PointEntry:
        spec = getattr(points, point) if why_not is None else None
        reason = why_not or ("asked for" if spec else f"not asked for: {point}=a8 quantizes it")
        return PointEntry(name, point, kind, block_of(name), spec, reason)

    def kind(name: str) -> str:
        return type(model.get_submodule(name)).__name__

    outside = "outside the repeated blocks"
    lines: list[PointEntry] = []
    for name, cached in seen.attention.items():
        where = outside if named and block_of(name) is None else None
        no_cache = None if cached else "nothing is cached here: keys and values are outputs of Linear layers (output)"
        lines.append(entry("scores", f"{name}.score_point", "scores", where or _no_interface(seen)))
        lines.append(entry("kv", f"{name}.key_point", "keys", where or no_cache))
        lines.append(entry("kv", f"{name}.value_point", "values", where or no_cache))
        always = "softmax stays in float, and what it gives"
        lines.append(PointEntry(f"{name}.probabilities", "probabilities", "softmax", block_of(name), None, always))
    for point, names in (("norm", seen.norms), ("gelu", seen.nonlinear)):
        for name in names:
            where = outside if named and block_of(name) is None else None
            lines.append(entry(point, f"{name}.output_point", kind(name), where))
    for block, count in seen.adds.items():
        lines += [entry("residual", f"{block}.residual_points.{i}", "add") for i in range(count)]
        if block in firsts:
            again = "the first block runs more than once, so its input is not the embeddings alone"
            line = entry(
                "embedding", f"{block}.embedding_point", "embeddings", again if block in seen.repeated else None
            )
            lines.append(dataclasses.replace(line, block=None))
    for layer in entries:
        if layer.kind in _LINEAR:
            why = _why_no_output(layer, bool(named), block_of(layer.name))
            lines.append(entry("output", f"{layer.name}.output_quantizer", layer.kind, why))
    order = (*NAMES, "probabilities")
    place = {id(line): i for i, line in enumerate(lines)}
    yield from sorted(
        lines, key=lambda e: (len(numbers) if e.block is None else e.block, order.index(e.point), place[id(e)])
    )


def _no_interface(seen: Watched) -> str | None:
    return None if seen.interface else "its attention does not use transformers' interface"


def _why_no_output(layer: Entry, has_blocks: bool, block: int | None) -> str | None:
    if layer.scheme is None:
        return f"the layer itself is: {layer.reason}"
    return "outside the repeated blocks" if has_blocks and block is None else None


def _why_none(name: str, model: nn.Module, seen: Watched) -> str:
    """Why a model has no point of a class, and the way out."""
    who = type(model).__name__
    if name in ("scores", "kv") and not seen.attention:
        return (
            f"the attention of {who} does not go through transformers' AttentionInterface, where scores, keys and "
            "values are quantized; leave it out, or quantize the Linear outputs: output=a8"
        )
    return {
        "scores": f"{who} has no attention inside its blocks; leave it out",
        "kv": f"{who} keeps no cache of keys and values; leave it out: they are Linear outputs here, output=a8",
        "norm": f"{who} has no LayerNorm or RMSNorm inside its blocks; leave it out",
        "gelu": f"{who} applies its nonlinearity as a function, not as a module; leave it out: the next Linear's input "
        "is quantized by the scheme (a8)",
        "residual": f"no sum of the residual stream was seen in the blocks of {who}; leave it out",
        "embedding": f"{who} has no repeated blocks, or one that runs more than once: what the embeddings give has no "
        "place of its own there; leave it out",
        "output": f"no Linear layer of {who} is quantized inside its blocks; name a scheme that does, such as w8a8",
    }[name]


@torch.no_grad()
def _prove(model: Any, probe: Mapping[str, Tensor], seen: Watched) -> None:
    """Raises: UsageError unless our attention without points gives what the model's eager one gives."""
    who = type(model).__name__
    if seen.unknown:
        raise UsageError(
            f"the attention of {who} has {', '.join(sorted(seen.unknown))}, which quantized scores do not know; "
            "leave scores and kv out"
        )
    results = []
    with evaluating(model):
        for name in ("eager", attention.IMPLEMENTATION):
            with implementation(model, name):
                output = model(**probe)
            results.append((output.logits if hasattr(output, "logits") else output[0]).double())
    difference = relative_max_difference(results[1], results[0])
    if not difference <= _TOLERANCE.get(model.dtype, 2e-2):
        raise UsageError(
            f"the attention of {who} does something that ours does not (outputs differ by {difference:.1e} of the "
            "largest); leave scores and kv out"
        )


def with_outputs(entries: Sequence[Entry], points: Sequence[PointEntry]) -> tuple[Entry, ...]:
    """The layers' entries with the output specs that were asked for put into their schemes."""
    specs = {e.name.removesuffix(".output_quantizer"): e.spec.quant for e in points if e.point == "output" and e.spec}

    def scheme(entry: Entry) -> Scheme | None:
        if entry.scheme is None or entry.name not in specs or entry.scheme.output is not None:
            return entry.scheme
        return Scheme(entry.scheme.weight, entry.scheme.input, specs[entry.name])

    return tuple(dataclasses.replace(entry, scheme=scheme(entry)) for entry in entries)


_SLOTS = {
    "scores": ("score_point",),
    "kv": ("key_point", "value_point"),
    "norm": ("output_point",),
    "gelu": ("output_point",),
    "embedding": ("embedding_point",),
}


def install_points(
    model: nn.Module, points: Sequence[PointEntry], *, packed: bool = False, device: torch.device | str | None = None
) -> None:
    """Hang quantizers on `model` for the entries with a spec, and let it call them; outputs belong to their layers.

    Raises: AttributeError where the model has no such place.
    """
    asked = [e for e in points if e.spec is not None and e.point != "output"]
    for entry in asked:
        assert entry.spec is not None
        quantizer = make_point(entry.name, entry.spec, device, packed)
        at, _, slot = entry.name.rpartition(".")
        if slot not in _SLOTS.get(entry.point, (slot,)):
            raise AttributeError(f"{entry.name} is no place of a {entry.point}")
        if entry.point == "residual":
            block = model.get_submodule(at.rpartition(".")[0])
            if not hasattr(block, "residual_points"):
                block.residual_points = nn.ModuleList()
            if int(slot) != len(block.residual_points):  # type: ignore[arg-type]
                raise AttributeError(f"{entry.name} is not the next residual add of its block")
            block.residual_points.append(quantizer)  # type: ignore[union-attr, operator]
            residual.give_points(block)
            continue
        module = model.get_submodule(at)
        module.add_module(slot, quantizer)
        if entry.point == "embedding":
            residual.give_points(module)
        elif entry.point in ("norm", "gelu"):
            module.register_forward_hook(quantize_output)
    for name in dict.fromkeys(e.name.rpartition(".residual_points.")[0] for e in asked if e.point == "residual"):
        for module in model.get_submodule(name).modules():
            if is_norm(module):
                module.register_forward_hook(residual.follow_norm)
    if held := dict.fromkeys(e.name.rpartition(".")[0] for e in asked if e.point in ("scores", "kv")):
        attention.register()
        model.set_attn_implementation(attention.IMPLEMENTATION)  # type: ignore[operator]
        for name in held:
            model.get_submodule(name).register_forward_hook(attention.check_used)


def freeze_static_outputs(model: nn.Module, points: Sequence[PointEntry]) -> None:
    """Static outputs that are not to be learned stay as calibrated."""
    for entry in points:
        if entry.point == "output" and entry.spec is not None and not entry.spec.quant.dynamic:
            quantizer: Any = model.get_submodule(entry.name)
            quantizer.log_scale.requires_grad_(entry.spec.learned)


def points_of(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of the points that hang on the model, simulated or packed."""
    return list(modules_of(model, POINTS))
