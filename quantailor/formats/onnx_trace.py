"""A packed model as an ONNX graph in which each quantized layer is still one node: `quantailor::Layer`.

torch's exporter sees placeholders, never a quantized weight: it can neither fold, dequantize nor copy one. Float layers
that share a weight get a placeholder too, since the exporter would write a tied table twice, the second time
transposed.
"""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from quantailor.errors import UsageError
from quantailor.models.prepare import PACKED
from quantailor.nn.packed import QuantConv2d, QuantEmbedding

DOMAIN, LAYER = "quantailor", "Layer"
OPSET = 21  # the first with blocked DequantizeLinear and 4-bit tensors
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_LOGGERS = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")


class _Placeholder(nn.Module):
    """Stands for a layer: the shape it gives, and its name in the graph."""

    def __init__(self, name: str, width: int, is_lookup: bool) -> None:
        super().__init__()
        self.name, self.width, self.is_lookup = name, width, is_lookup

    @property
    def weight(self) -> Tensor:
        """For code that looks at `.weight.dtype` or `.weight.device`."""
        return torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        leading = x.shape if self.is_lookup else x.shape[:-1]
        result: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{LAYER}",
            (x,),
            attrs={"layer": self.name},
            dtype=torch.float32,
            shape=(*leading, self.width),
            version=1,
        )
        return result


class _Logits(nn.Module):
    """The model with its inputs by position and nothing but logits as its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        more: dict[str, Any] = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        parameters = inspect.signature(self.model.forward).parameters
        if "use_cache" in parameters:
            more["use_cache"] = False
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **more).logits
        return logits


class _WithCache(nn.Module):
    """The model with the keys and values of earlier positions as inputs, and all that there are now as outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past_key_values):
            cache.update(keys, values, layer)
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def past_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(heads, width of a head) of the keys and values that each layer caches.

    Raises: UsageError for a model without such a cache, or whose layers keep something else than all positions.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with torch.no_grad():
        cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None) if model.can_generate() else None
    if not isinstance(cache, DynamicCache):
        raise UsageError(f"{type(model).__name__} keeps no keys and values to generate from; export onnx without cache")
    layers: list[Any] = list(cache.layers)
    if odd := {type(layer).__name__ for layer in layers} - {DynamicLayer.__name__}:
        raise UsageError(f"a layer caches as {min(odd)}, not every position; export onnx without cache")
    return [(layer.keys.shape[1], layer.keys.shape[3]) for layer in layers]


def past_names(num_layers: int, kind: str) -> list[str]:
    """Names of the cache's tensors in the graph, in order; `kind` is `past_key_values` (inputs) or `present`."""
    return [f"{kind}.{layer}.{part}" for layer in range(num_layers) for part in ("key", "value")]


def shared_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Embedding]:
    """Float Linear and Embedding layers whose weight another one has as well, by name."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Embedding):
            owners.setdefault(id(module.weight), []).append(name)
    names = [name for together in owners.values() if len(together) > 1 for name in together]
    return {name: model.get_submodule(name) for name in names}  # type: ignore[misc]


def has_experts(model: PreTrainedModel) -> bool:
    """Whether the way that the model's experts are computed can be chosen."""
    return model._can_set_experts_implementation() and any(p.dim() == 3 for p in model.parameters())


def trace(model: PreTrainedModel, probe: Mapping[str, Tensor], *, cache: bool = False) -> onnx.ModelProto:
    """The graph of `model`, packed and in float32, for any batch and any length that its positions allow.

    `probe`: inputs int64 [B, T], both at least 2; names as in `INPUTS`. With `cache` the graph also takes the keys and
    values of earlier positions, [B, heads, P, width] a layer, with an attention mask [B, P + T], and gives all.
    Raises: UsageError where a convolution is quantized, or torch's exporter cannot trace the architecture.
    """
    skeleton = _with_placeholders(model)
    if has_experts(model):
        skeleton.set_experts_implementation("batched_mm")  # the default, a grouped product, has no ONNX operator
    traced, kwargs, shapes, names, out = (_cached if cache else _plain)(model, skeleton, probe)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                traced.eval(),
                (),
                kwargs=kwargs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=names,
                output_names=out,
                verbose=False,
            )
    except Exception as error:  # its exporter raises many types, each of which says that it cannot
        raise UsageError(
            f"torch's ONNX exporter cannot trace {type(model).__name__}: {_cause(error)}; "
            "export hf, which needs no trace"
        ) from error
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    _strip(proto)
    return proto


_Traced = tuple[nn.Module, dict[str, Any], dict[str, Any], list[str], list[str]]


def _plain(model: PreTrainedModel, skeleton: PreTrainedModel, probe: Mapping[str, Tensor]) -> _Traced:
    """(module, its arguments, their axes, names of inputs, of outputs)."""
    names = [name for name in INPUTS if name in probe]
    batch, length = Dim("batch"), Dim("sequence", max=_positions(model))
    shapes = {name: {0: batch, 1: length} for name in names}
    return _Logits(skeleton), {name: probe[name] for name in names}, shapes, names, ["logits"]


def _cached(model: PreTrainedModel, skeleton: PreTrainedModel, probe: Mapping[str, Tensor]) -> _Traced:
    """As `_plain`, with three earlier positions."""
    of_layers = past_shapes(model)
    ids = probe["input_ids"]
    batch, earlier = ids.shape[0], 3
    past = [(torch.zeros(batch, h, earlier, w), torch.zeros(batch, h, earlier, w)) for h, w in of_layers]
    mask = torch.ones(batch, earlier + ids.shape[1], dtype=torch.int64)
    kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": past}
    rows, width, places, whole = (Dim.AUTO,) * 4  # the mask's length is a sum of two, which only it can find
    shapes: dict[str, Any] = {"input_ids": {0: rows, 1: width}, "attention_mask": {0: rows, 1: whole}}
    shapes["past_key_values"] = [({0: rows, 2: places}, {0: rows, 2: places}) for _ in of_layers]
    names = ["input_ids", "attention_mask", *past_names(len(of_layers), "past_key_values")]
    return _WithCache(skeleton), kwargs, shapes, names, ["logits", *past_names(len(of_layers), "present")]


def _with_placeholders(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` that shares its float tensors and has placeholders for its quantized and its tied layers."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for name, module in model.named_modules():
        if isinstance(module, QuantConv2d):
            raise UsageError(f"{name} ({module.scheme}) is a convolution: not written to ONNX; keep it by a rule")
        if isinstance(module, PACKED):
            lookup = isinstance(module, QuantEmbedding)
            width = module.packed.in_features if lookup else module.packed.out_features
            memo[id(module)] = _Placeholder(name, width, lookup)
    for name, layer in shared_layers(model).items():
        lookup = isinstance(layer, nn.Embedding)
        memo[id(layer)] = _Placeholder(name, layer.weight.shape[int(lookup)], lookup)
    return copy.deepcopy(model, memo)


def _positions(model: PreTrainedModel) -> int | None:
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter has to say of itself on the way is for its developers; failures are raised all the same."""
    before = {name: logging.getLogger(name).level for name in _LOGGERS}
    try:
        for name in before:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _strip(proto: onnx.ModelProto) -> None:
    """Take out what torch notes beside each node: stack traces with the paths of this machine, and its own types."""
    graph = proto.graph
    proto.doc_string, proto.graph.doc_string = "", ""
    del proto.metadata_props[:], graph.metadata_props[:]
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        del item.metadata_props[:]
        item.doc_string = ""
    del graph.value_info[:]  # shapes in torch's own symbols; every runtime infers them anew
