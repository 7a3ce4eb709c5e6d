"""What an ONNX file holds and what it computes, found by the public `onnx` and `onnxruntime` packages.

The integers of a layer are looked for as a runtime finds them: from its product back along the graph to initializers.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from quantailor.evaluate.measuring import measuring
from quantailor.formats.onnx_graph import ZERO, is_doubled
from quantailor.models.prepare import PACKED
from quantailor.models.structure import modules_of
from quantailor.nn.packed import QuantEmbedding, QuantLinear
from quantailor.numerics.measures import relative_max_difference

# Otherwise ONNX Runtime multiplies dequantized weights with activations that it rounds to 8 bits by itself, and, on x86
# processors without VNNI, lets pairs of int8 products overflow 16 bits: whole layers are then off by tens of percent.
SESSION = {"session.qdq_matmulnbits_accuracy_level": "1", "session.x64quantprecision": "1"}
IN_MEMORY = 1_500_000_000  # bytes of weights that a graph may have to be handed over without a file
_PRODUCT = re.compile(r"(.+)/product")


@dataclass(frozen=True)
class Held:
    """A layer's weight as found in a file: `q` [O, N], `scale` float32 [O, G] or [1, 1], `zero_point` [O, G] or None;
    `block_size` inputs share a scale (None: all); `input_scale` of a static activation, or None."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None
    block_size: int | None
    input_scale: float | None


class _Graph:
    """Values of a graph by name: initializers, who makes a value, who takes it."""

    def __init__(self, proto: onnx.ModelProto, folder: Path | None) -> None:
        self.base = str(folder) if folder else ""
        self.initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.maker = {out: node for node in proto.graph.node for out in node.output}
        self.takers: dict[str, list[onnx.NodeProto]] = {}
        for node in proto.graph.node:
            for name in node.input:
                self.takers.setdefault(name, []).append(node)

    def array(self, name: str) -> np.ndarray[Any, Any]:
        values = numpy_helper.to_array(self.initializers[name], self.base)
        return values.astype(np.float32 if values.dtype.kind == "f" else np.int16)

    def through(self, name: str, *kinds: str) -> tuple[str, int]:
        """Back through nodes of these kinds: (the value before them, how many of them were Transpose)."""
        turns = 0
        while name in self.maker and self.maker[name].op_type in kinds:
            turns += self.maker[name].op_type == "Transpose"
            name = self.maker[name].input[0]
        return name, turns


def read_layers(proto: onnx.ModelProto, folder: Path | None = None) -> dict[str, Held]:
    """Layer -> what its product multiplies with. `folder`: where external data of `proto` lies.

    Raises: KeyError, ValueError where a layer's product does not lead to initializers.
    """
    graph = _Graph(proto, folder)
    result = {}
    for node in proto.graph.node:
        match = _PRODUCT.fullmatch(node.name)
        if match is None:
            continue
        operand = node.input[0] if node.op_type == "Gather" else node.input[1]
        source, _ = graph.through(operand, "Transpose")
        if source in graph.initializers and node.op_type != "MatMulInteger":
            continue  # a float weight that layers share
        result[match[1]] = (
            _integers(graph, node, operand) if node.op_type == "MatMulInteger" else _reals(graph, node, operand)
        )
    return result


def _integers(graph: _Graph, node: onnx.NodeProto, operand: str) -> Held:
    """A MatMulInteger, its sums scaled by the DequantizeLinear that takes them."""
    source, turns = graph.through(operand, "Transpose", "Cast")
    q = _rows(graph.array(source), rows=turns % 2 == 1)
    (scaled,) = (taker for taker in graph.takers[node.output[0]] if taker.op_type == "DequantizeLinear")
    scale = graph.array(scaled.input[1])
    zero_point = None
    if len(node.input) > 3:
        zero_point = torch.from_numpy(graph.array(graph.through(node.input[3], "Cast")[0])).reshape(-1, 1)
    return Held(q, torch.from_numpy(scale).reshape(-1, 1), zero_point, None, None)


def _reals(graph: _Graph, node: onnx.NodeProto, operand: str) -> Held:
    """A product with a weight that DequantizeLinear, or a table, makes real."""
    source, turns = graph.through(operand, "Transpose")
    rows = (turns % 2 == 1) != (node.op_type == "Gather")
    made = graph.maker[source]
    if made.op_type == "Mul":
        return _from_table(graph, made, rows)
    if made.op_type != "DequantizeLinear":
        raise ValueError(f"{node.name} multiplies with the result of a {made.op_type}, not with a stored weight")
    q = graph.array(made.input[0])
    attributes = {a.name: a.i for a in made.attribute}
    block = attributes.get("block_size", 0) or None
    scale = graph.array(made.input[1])
    if scale.ndim and attributes.get("axis", 1) != int(rows == (block is not None)):
        raise ValueError(f"{made.name} has its scales along axis {attributes.get('axis', 1)}, not that of the outputs")
    zero = graph.array(made.input[2]) if len(made.input) > 2 else None
    return Held(
        _rows(q, rows),
        _scales(scale, rows, block),
        None if zero is None else _scales(zero, rows, block),
        block,
        _input_scale(graph, node.input[0]) if node.op_type == "MatMul" else None,
    )


def _from_table(graph: _Graph, made: onnx.NodeProto, rows: bool) -> Held:
    """NF4: levels[index] * scale[block]."""
    index = graph.through(graph.maker[made.input[0]].input[1], "Cast")[0]
    spread = graph.maker[made.input[1]]
    scale = graph.array(spread.input[0])
    if spread.op_type == "Unsqueeze":
        return Held(_rows(graph.array(index), rows), torch.from_numpy(scale).reshape(-1, 1), None, None, None)
    block = int((graph.array(spread.input[1]) == 0).sum())
    return Held(_rows(graph.array(index), rows), _scales(scale, rows, block), None, block, None)


def _rows(values: np.ndarray[Any, Any], rows: bool) -> Tensor:
    """[O, N], whichever way it lies."""
    return torch.from_numpy(np.ascontiguousarray(values if rows else values.T))


def _scales(values: np.ndarray[Any, Any], rows: bool, block: int | None) -> Tensor:
    return torch.from_numpy(values.copy()).reshape(-1, 1) if block is None else _rows(values, rows)


def _input_scale(graph: _Graph, name: str) -> float | None:
    """The scale of the static activation that is this value; None if it is none."""
    made = graph.maker.get(name)
    if made is None or made.op_type not in ("DequantizeLinear", "Mul") or not made.input[1].endswith(".input_scale"):
        return None
    if made.op_type == "DequantizeLinear" and int(graph.array(made.input[2])) != ZERO:
        raise ValueError(f"{made.name} has zero point {int(graph.array(made.input[2]))}, and {ZERO} is meant")
    return float(graph.array(made.input[1]))


def differing(found: Mapping[str, Held], model: nn.Module) -> dict[str, str]:
    """Layer of the packed `model` -> what is not in the file as it is in the layer; empty where all of it is."""
    result = {}
    for name, module in modules_of(model, PACKED):
        if name not in found:
            result[name] = "is not in the file"
        elif parts := _unequal(found[name], module):
            result[name] = ", ".join(parts)
    return result


def _unequal(held: Held, module: Any) -> list[str]:
    packed = module.packed
    q, scale = held.q, held.scale
    if is_doubled(packed.spec):
        q, scale = (q - 1) // 2, scale * 2
    zero_point = packed.zero_points()
    parts = [] if _same(q, packed.integers()) else ["integers"]
    parts += [] if _same(scale, packed.scales()) else ["scales"]
    if isinstance(zero_point, Tensor):
        parts += [] if held.zero_point is not None and _same(held.zero_point, zero_point) else ["zero points"]
    elif held.zero_point is not None and bool(held.zero_point.any()):
        parts.append("zero points")
    groups = packed.scales().shape[1]
    if held.block_size != (packed.spec.group_size if groups > 1 else None):
        parts.append("group size")
    static = getattr(module, "input_scale", None)
    if static is not None and held.input_scale != float(static):
        parts.append("input scale")
    return parts


def _same(found: Tensor, ours: Tensor) -> bool:
    if found.shape != ours.shape:
        return False
    return torch.equal(found, ours) if ours.is_floating_point() else torch.equal(found.int(), ours.int())


def session(source: Path | onnx.ModelProto, settings: Mapping[str, str]) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU, with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    if isinstance(source, Path):
        return _opened(source, options)
    if sum(len(tensor.raw_data) for tensor in source.graph.initializer) <= IN_MEMORY:
        return _opened(source.SerializeToString(), options)
    with tempfile.TemporaryDirectory() as folder:  # a protobuf message ends at 2 GiB
        copy = onnx.ModelProto()
        copy.CopyFrom(source)
        onnx.save_model(copy, path := Path(folder) / "model.onnx", save_as_external_data=True, location="data")
        return _opened(path, options)


def _opened(source: Path | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    given = str(source) if isinstance(source, Path) else source
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def outputs(running: onnxruntime.InferenceSession, probe: Mapping[str, Tensor], names: list[str]) -> list[Tensor]:
    taken = {value.name: value.shape for value in running.get_inputs()}
    given = {name: value.numpy() for name, value in probe.items() if name in taken}
    rows = len(next(iter(probe.values())))
    for name, shape in taken.items():
        if name.startswith("past_key_values.") and name not in given:  # nothing came before
            given[name] = np.zeros((rows, shape[1], 0, shape[3]), dtype=np.float32)
    found = running.run(names, given)
    return [torch.from_numpy(np.asarray(value)) for value in found]


def logit_difference(running: onnxruntime.InferenceSession, model: nn.Module, probe: Mapping[str, Tensor]) -> float:
    """The largest difference to `model`'s logits, relative to the largest, where there is a token: on the probe, and on
    a part of it of another batch size and length."""
    whole = dict(probe)
    rows, length = whole["input_ids"].shape
    part = {name: value[: max(1, rows // 2), : max(1, length // 2 + 1)] for name, value in whole.items()}
    worst = 0.0
    for inputs in (whole, part):
        with measuring(model):
            ours = model(**inputs).logits.float()
        theirs = outputs(running, inputs, ["logits"])[0]
        if theirs.shape != ours.shape:
            return float("inf")
        if ours.dim() == 3:
            there = inputs["attention_mask"].bool()
            ours, theirs = ours[there], theirs[there]
        worst = max(worst, relative_max_difference(theirs, ours))
    return worst


def generate(running: onnxruntime.InferenceSession, prompt: Tensor, new_tokens: int) -> Tensor:
    """Greedy tokens int64 [B, new_tokens] behind `prompt` int64 [B, T], of a file with a cache: after the prompt one
    token a call, with the keys and values that the call before gave."""
    presents = [value.name for value in running.get_outputs() if value.name.startswith("present.")]
    feeds = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    generated: list[Tensor] = []
    for _ in range(new_tokens):
        logits, *cache = outputs(running, feeds, ["logits", *presents])
        generated.append(logits[:, -1].argmax(-1, keepdim=True))
        mask = torch.ones(len(prompt), prompt.shape[1] + len(generated), dtype=torch.int64)
        feeds = {"input_ids": generated[-1], "attention_mask": mask}
        feeds |= {name.replace("present", "past_key_values", 1): value for name, value in zip(presents, cache)}
    return torch.cat(generated, dim=1)


def about_generation(path: Path, model: nn.Module, probe: Mapping[str, Tensor], new_tokens: int = 16) -> str:
    """How many greedy tokens are the model's own, behind the beginning of the probe's rows."""
    prompt = probe["input_ids"][:, : max(1, probe["input_ids"].shape[1] // 4)]
    limit = getattr(model.config, "max_position_embeddings", None)
    count = min(new_tokens, limit - prompt.shape[1]) if isinstance(limit, int) else new_tokens
    theirs = generate(session(path, SESSION), prompt, count)
    with measuring(model):
        ours, past, ids = [], None, prompt
        for _ in range(count):
            out = model(input_ids=ids, past_key_values=past, use_cache=True)
            past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ours.append(ids)
    same = (theirs == torch.cat(ours, dim=1)).long().cumprod(1).sum(1)  # up to the first that differs
    return f"of {count} greedy tokens behind {len(prompt)} prompts the first {same.tolist()} are the model's"


def layer_difference(proto: onnx.ModelProto, model: nn.Module, probe: Mapping[str, Tensor]) -> dict[str, float]:
    """Layer -> the largest difference of its output, relative to the largest, when the file's operators of that layer
    are given what `model`'s layer is given. No rounding before it, in other layers, has a part in that."""
    layers = dict(modules_of(model, PACKED))
    alone, inputs, outs = _alone(proto, layers)
    with _passing(model, layers) as seen, measuring(model):
        model(**probe)
    given = {value: seen[name][0] for name, value in inputs.items()}
    found = outputs(session(alone, SESSION), given, list(outs.values()))
    return {name: relative_max_difference(theirs, seen[name][1]) for name, theirs in zip(outs, found)}


def _alone(proto: onnx.ModelProto, layers: Mapping[str, Any]) -> tuple[onnx.ModelProto, dict[str, str], dict[str, str]]:
    """The layers' operators without what is between them: (graph, each layer's input, each layer's output)."""
    of = [(node, node.name.partition("/")[0]) for node in proto.graph.node]
    nodes = [(node, name) for node, name in of if name in layers and "/" in node.name]
    known = {tensor.name for tensor in proto.graph.initializer} | {out for node, _ in nodes for out in node.output}
    alone = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    alone.graph.name = "layers"
    alone.graph.initializer.extend(proto.graph.initializer)
    inputs: dict[str, str] = {}
    outs: dict[str, str] = {}
    for node, name in nodes:
        copy = alone.graph.node.add()
        copy.CopyFrom(node)
        for place, value in enumerate(node.input):
            ends = [out for other, out in outs.items() if other != name]
            if value and (value not in known or value in ends):
                inputs[name] = copy.input[place] = f"{name}/x"
        outs[name] = node.output[0]
    for name, value in inputs.items():
        lookup = isinstance(layers[name], QuantEmbedding)
        kind = onnx.TensorProto.INT64 if lookup else onnx.TensorProto.FLOAT
        alone.graph.input.append(onnx.helper.make_tensor_value_info(value, kind, None))
    alone.graph.output.extend(onnx.ValueInfoProto(name=value) for value in outs.values())
    return alone, inputs, outs


@dataclass(frozen=True)
class Flips:
    """Integers of quantized inputs that differ between a file and a model, of how many; the first layer where one does,
    how many do there, and how many of these are the largest of their token. `left`: layers not compared, since they
    get other rows in the file: an expert there may see every token, here those that are routed to it."""

    count: int
    total: int
    first: str | None
    there: int
    largest: int
    left: int = 0


def activation_flips(proto: onnx.ModelProto, model: nn.Module, probe: Mapping[str, Tensor]) -> Flips:
    """Where the file and `model` round an activation to different integers.

    Both round the same reals, up to the last bits of what came before: a value that lies between two integers goes to
    the one here and to the other there.
    """
    names = {node.name for node in proto.graph.node}
    watched = {}
    for name, module in modules_of(model, QuantLinear):
        of = [f"{name}/input/{kind}" for kind in ("quantized", "rounded") if f"{name}/input/{kind}" in names]
        if of and module.scheme.input is not None:
            watched[name] = of[0]
    watching = onnx.ModelProto()
    watching.CopyFrom(proto)
    watching.graph.output.extend(onnx.ValueInfoProto(name=value) for value in watched.values())
    found = outputs(session(watching, SESSION), probe, list(watched.values()))
    with _passing(model, watched) as seen, measuring(model):
        model(**probe)
    count = total = there = largest = left = 0
    first = None
    for (name, value), theirs in zip(watched.items(), found):
        mine = model.get_submodule(name)._quantize_input(seen[name][0]).q.int()  # type: ignore[operator]
        same = theirs.int() - (ZERO if value.endswith("quantized") else 0)
        rows = mine.shape[:-1].numel()
        if same.numel() % max(1, rows) or not mine.numel() <= same.numel() < 2 * mine.numel():  # a last group is padded
            left += 1
            continue
        differ = same.reshape(*mine.shape[:-1], -1)[..., : mine.shape[-1]] != mine
        if first is None and bool(differ.any()):
            first, there = name, int(differ.sum())
            largest = int((differ & (mine.abs() >= mine.abs().amax(-1, keepdim=True) - 1)).sum())
        count += int(differ.sum())
        total += mine.numel()
    return Flips(count, total, first, there, largest, left)


@contextmanager
def _passing(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """(input, output) of each of these layers, as they run while this is open."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_for(name: str) -> Any:
        return lambda _module, args, out: kept.__setitem__(name, (args[0].detach().clone(), out.detach().float()))

    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
