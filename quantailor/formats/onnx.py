"""A packed model as an ONNX folder: `model.onnx` (opset 21), its config and tokenizer; written, read again, executed.

The file holds our integers and scales and whatever the recipe kept in float; it is refused, not approximated, where
ONNX cannot say a layer. A decoder takes keys and values of earlier positions if a cache is asked for.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import quantailor
from quantailor.errors import QualityGateFailed, QuantailorError, UsageError
from quantailor.evaluate.jitter import own_jitter
from quantailor.formats import onnx_check
from quantailor.formats.onnx_graph import is_doubled, on_integers, stored, with_layers
from quantailor.formats.onnx_trace import INPUTS, has_experts, trace
from quantailor.formats.receipt import ExportReceipt
from quantailor.models.experts import SplitExperts
from quantailor.models.prepare import PACKED
from quantailor.models.structure import modules_of
from quantailor.nn.packed import QuantEmbedding
from quantailor.spec import NF4, Int

FILE, DATA = "model.onnx", "model.onnx.data"
EXTERNAL_ABOVE = 1_500_000_000  # bytes: a protobuf file ends at 2 GiB
WEIGHTS_ONLY, ALONE = 1e-4, 1e-2  # how far logits, and the output of a layer alone, may be from ours, relative
_SLACK = 300_000  # bytes that nodes and constants may take, and 8 kB a layer


def write(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probe: Mapping[str, Tensor],
    *,
    external_above: int = EXTERNAL_ABOVE,
    cache: bool = False,
) -> ExportReceipt:
    """Fill an empty `folder` with the packed `model` and prove what lies there. The model is left as it is.

    `probe`: int64 [B, T] tokens and mask on which outputs are compared. With `cache` a decoder takes and gives keys and
    values, and what it generates is held against what the model does.
    Raises: UsageError where ONNX cannot say a layer or torch cannot trace the architecture; QualityGateFailed or
    QuantailorError if what was written is not what was meant.
    """
    plain, notes = _in_float32(model)
    layers: dict[str, Any] = dict(modules_of(plain, PACKED))
    if not layers:
        raise UsageError("no layer of this model is quantized; export a quantized folder")
    if indexed := [name for name, module in layers.items() if module.packed.spec.is_indexed]:
        raise UsageError(
            f"{indexed[0]}: its groups are in act-order, and ONNX's blocks lie side by side; convert it to own"
        )
    probe = _all_inputs(plain, tokenizer, probe)
    proto = with_layers(trace(plain, _example(plain, probe), cache=cache), plain)
    _describe(proto)
    path = folder / FILE
    size = _save(proto, path, external_above)
    _check_size(size, plain, layers)
    plain.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del proto

    read = onnx.load(path)  # with its external data, if it has some
    onnx.checker.check_model(str(path), full_check=True)
    differences = onnx_check.differing(onnx_check.read_layers(read), plain)
    difference = onnx_check.logit_difference(onnx_check.session(path, onnx_check.SESSION), plain, probe)
    by_default = onnx_check.logit_difference(onnx_check.session(path, {}), plain, probe)
    notes += _notes(plain, layers, cache)
    if cache:
        notes.append(onnx_check.about_generation(path, plain, probe))
    if by_default > max(1e-4, 2 * difference):
        notes.append(
            f"with ONNX Runtime's default settings the logits differ by {by_default:.1e}: it rounds the activations of "
            "float products to 8 bits by itself, and sums of int8 products overflow on x86 without VNNI; set session "
            f"options {' and '.join(onnx_check.SESSION)} to 1, as the file's metadata say"
        )
    alone = onnx_check.layer_difference(read, plain, probe)
    _check(differences, difference, alone, layers)
    notes.append(f"each layer alone, on the inputs that ours gets, differs by at most {max(alone.values()):.1e}")
    if any(module.scheme.input is not None for module in layers.values()):
        notes.append(_about_flips(onnx_check.activation_flips(read, plain, probe)))
        notes.append(
            f"this model's own logits move by {own_jitter(plain, probe):.1e} when its embeddings are moved by one unit "
            f"in the last place; the file's differ by {difference:.1e}"
        )
    files = tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
    return ExportReceipt(
        "onnx",
        files,
        len(layers),
        not differences,
        difference,
        tuple(notes),
        differences=differences,
        max_scale_difference=None if differences else 0.0,
    )


def _in_float32(model: PreTrainedModel) -> tuple[PreTrainedModel, list[str]]:
    """The model itself, or its copy in float32 where it computes in another type."""
    types = {t.dtype for t in (*model.parameters(), *_float_buffers(model)) if t.is_floating_point()} - {torch.float32}
    if not types:
        return model, []
    plain = copy.deepcopy(model).float()
    for _, module in modules_of(plain, QuantEmbedding):
        module.dtype = torch.float32
    plain.config.dtype = torch.float32
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
    return plain, [f"computes in float32, where the folder says {names}; compared with the model in float32"]


def _float_buffers(model: nn.Module) -> list[Tensor]:
    inside = tuple(f"{name}." for name, _ in modules_of(model, PACKED))
    return [b for name, b in model.named_buffers() if not name.startswith(inside)]


def _all_inputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probe: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The probe with every input that the tokenizer makes and the model takes."""
    ids = probe["input_ids"]
    result = {"input_ids": ids, "attention_mask": probe.get("attention_mask", torch.ones_like(ids))}
    takes = getattr(model.config, "type_vocab_size", 0) and "token_type_ids" in tokenizer.model_input_names
    if "token_type_ids" in probe or takes:
        result["token_type_ids"] = probe.get("token_type_ids", torch.zeros_like(ids))
    return result


def _example(model: PreTrainedModel, probe: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two rows of a few tokens to trace with: sizes 0 and 1 would be taken for constants."""
    limit = getattr(model.config, "max_position_embeddings", None)
    length = min(12, limit) if isinstance(limit, int) else 12
    return {name: torch.full((2, length), int(name == "attention_mask")) for name in INPUTS if name in probe}


def _describe(proto: onnx.ModelProto) -> None:
    proto.producer_name, proto.producer_version = "quantailor", quantailor.__version__
    settings = json.dumps(onnx_check.SESSION, sort_keys=True)
    proto.metadata_props.add(key="quantailor.session", value=settings)
    proto.metadata_props.add(key="quantailor.torch", value=metadata.version("torch"))


def _save(proto: onnx.ModelProto, path: Path, external_above: int) -> int:
    """Bytes of what was written: one file, or one and its weights beside it where protobuf could not take them all."""
    large = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > external_above
    onnx.save_model(proto, path, save_as_external_data=large, location=DATA if large else None, size_threshold=1024)
    return sum(p.stat().st_size for p in (path, path.with_name(DATA)) if p.exists())


def _check_size(size: int, model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Raises: QuantailorError if the file is larger than integers, scales and what was kept in float explain."""
    floats = [*model.parameters(), *_float_buffers(model), *(m.bias for m in layers.values() if m.bias is not None)]
    expected = sum(t.numel() * t.element_size() for t in {id(t): t for t in floats}.values())
    for packed in {id(m.packed): m.packed for m in layers.values()}.values():
        held = stored(packed)
        bits = 4 if held.kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4) else 8
        expected += held.q.numel() * bits // 8 + 4 * held.scale.numel() + 4 * held.q.shape[1]
        expected += 0 if held.zero_point is None else held.zero_point.numel()
    if size > (allowed := expected + _SLACK + 8_000 * len(layers)):
        raise QuantailorError(
            f"{FILE} takes {size:,} bytes where its tensors explain {allowed:,}: a weight was written twice or in "
            "float; please report this model"
        )


def _check(
    differences: Mapping[str, str], difference: float, alone: Mapping[str, float], layers: Mapping[str, Any]
) -> None:
    """Raises: QualityGateFailed where the file does not hold or does not compute what the model does.

    Where activations are rounded, a last bit decides some of them, and the whole model's logits follow; a layer alone
    has no such excuse, but for a rounding of its own where its scale is static: ONNX divides by it.
    """
    again = "nothing was written; please report this model"
    if differences:
        layer, what = next(iter(differences.items()))
        raise QualityGateFailed(f"{layer}: {what} in the ONNX file are not the model's; {again}")
    worst = max(alone, key=lambda name: alone[name])
    if not alone[worst] <= ALONE:
        raise QualityGateFailed(f"{worst} differs by {alone[worst]:.1e} in ONNX Runtime, {ALONE:g} is allowed; {again}")
    only_weights = all(module.scheme.input is None and module.scheme.output is None for module in layers.values())
    if only_weights and not difference <= WEIGHTS_ONLY:
        raise QualityGateFailed(
            f"logits differ by {difference:.1e} in ONNX Runtime, {WEIGHTS_ONLY:g} is allowed where only weights are "
            f"quantized; {again}"
        )


def _about_flips(flips: onnx_check.Flips) -> str:
    left = f"; {flips.left} layers not compared, since the file gives them other rows" if flips.left else ""
    if flips.first is None:
        return f"all {flips.total} integers of quantized inputs on the probe are equal{left}"
    return (
        f"{flips.count} of {flips.total} integers of quantized inputs on the probe are rounded to the other side: "
        f"first {flips.there} in {flips.first}, {flips.largest} of them the largest of a token, which a dynamic scale "
        f"puts halfway between two{left}"
    )


def _notes(model: PreTrainedModel, layers: Mapping[str, Any], cache: bool) -> list[str]:
    """What a reader of the file has to know."""
    notes = []
    specs = [module.scheme.weight for module in layers.values()]
    inputs = [module.scheme.input for module in layers.values()]
    small = [s for s in specs if s.grid.bits < 4]
    odd = [s for s in specs if isinstance(s.grid, Int) and 4 < s.grid.bits < 8]
    if small:
        notes.append(f"{len(small)} layers of fewer than 4 bits take 4 bits a weight: ONNX has no smaller type here")
    if odd:
        notes.append(f"{len(odd)} layers of 5 to 7 bits take 8 bits a weight")
    sizes = [(m.packed.in_features, m.packed.spec.group_size) for m in layers.values()]
    if ragged := [n for n, size in sizes if size is not None and n > size and n % size]:
        notes.append(
            f"{len(ragged)} layers have a shorter last group: ONNX defines it and ONNX Runtime reads it, OpenVINO "
            "(2026.4) does not"
        )
    if doubled := [s for s in specs if is_doubled(s)]:
        notes.append(f"{len(doubled)} layers have levels between the integers: stored as 2q + 1 with half the scale")
    if tables := [s for s in specs if isinstance(s.grid, NF4)]:
        notes.append(f"{len(tables)} layers are NF4: their levels come from a table, which no runtime fuses")
    if integer := [m for m in layers.values() if on_integers(m.scheme, m.packed)]:
        notes.append(f"{len(integer)} layers find the scale of each token in the graph and multiply integers")
    if any(s is not None for s in inputs):
        notes.append(
            "on x86 processors without VNNI, sums of int8 products overflow in ONNX Runtime's default kernels: "
            'set session option "session.x64quantprecision" to "1" there'
        )
    if has_experts(model):
        notes.append("experts gather their weights for each token and choice, which takes memory on long inputs")
    if any(True for _ in modules_of(model, SplitExperts)):
        notes.append("every expert runs on every token, those not chosen weighted by 0: no graph follows the router")
    if cache:
        notes.append("takes past_key_values.N.key and .value [batch, heads, earlier, width], gives present")
    elif model.can_generate():
        notes.append("no cache of keys and values: each call computes every position; onnx-cache has one")
    return notes
