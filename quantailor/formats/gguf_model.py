"""Anyone's GGUF as a model with packed layers: the file's integers and scales, taken over as they are.

Q8_0, Q4_0 and Q4_1 matrices become packed layers; where no grid of ours has a layer's exact values (offsets between
steps, negative 8-bit scales) it stays in float with those values, and a note says so. Strict as every reader here: each
tensor that the architecture has, none too many, each of its shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantailor.errors import UntrustedInput
from quantailor.formats import gguf_metadata, gguf_tokenizer, plugin
from quantailor.formats.gguf_blocks import Blocks
from quantailor.formats.gguf_layers import to_packed
from quantailor.formats.gguf_names import ARCHITECTURES, Architecture, deinterleave, is_zero
from quantailor.formats.gguf_reader import GGUFFile, open_gguf
from quantailor.models.loading import CONFIG_ERRORS, check_shapes, quiet_transformers
from quantailor.models.prepare import State
from quantailor.nn.packed import PackedWeight
from quantailor.recipe import Inventory, Recipe, Rule
from quantailor.spec import Scheme
from quantailor.store.paths import shown

_BLOCKS = ("Q8_0", "Q4_0", "Q4_1")
_IGNORED = "rope_freqs.weight"  # said by the config


@dataclass(frozen=True)
class FromGGUF:
    """A model read from a file, with its tokenizer where the file has one; `notes`: what is not as in the file."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    notes: tuple[str, ...]


def read_gguf(path: str | Path) -> FromGGUF:
    """Load a GGUF file of a Llama, Qwen2, Qwen3 or GPT-2.

    The model carries its state as one that quantailor packed does: it can be saved, checked, trained on.
    Raises: UntrustedInput naming the file, what is wrong or not read, and a way out.
    """
    quiet_transformers()
    file = open_gguf(path)
    try:
        return _read(file)
    except UntrustedInput as error:
        where = shown(file.path)
        raise error if where in str(error) else UntrustedInput(f"{where} is not taken: {error}") from error
    except (*CONFIG_ERRORS, IndexError) as error:  # a UsageError is a ValueError
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise UntrustedInput(f"{shown(file.path)} does not hold one sound model: {first}; use a sound copy") from error


def _read(file: GGUFFile) -> FromGGUF:
    shapes = {name: info.shape for name, info in file.tensors.items()}
    settings = gguf_metadata.to_config(file.metadata, shapes)
    arch = ARCHITECTURES[settings["model_type"]]
    heads = {"attn_q": settings.get("num_attention_heads", 1), "attn_k": settings.get("num_key_value_heads", 1)}
    if heads["attn_q"] % heads["attn_k"]:
        raise UntrustedInput(f"its {heads['attn_q']} heads are no multiple of its {heads['attn_k']} of keys")
    num_layers = settings["n_layer" if arch.name == "gpt2" else "num_hidden_layers"]
    if num_layers > len(shapes):
        raise UntrustedInput(f"it promises {num_layers} blocks and has {len(shapes)} tensors")
    config = CONFIG_MAPPING[arch.name].from_dict(settings)
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _check_names(skeleton, arch, shapes)
    padded = gguf_metadata.FFN_WIDTH in file.metadata
    _check_shapes(file, skeleton, arch, gguf_metadata.ffn_width_of(config) if padded else None)
    tokenizer = gguf_tokenizer.from_metadata(file.metadata, settings["vocab_size"])
    tensors, packed, notes = _take(file, arch, heads, gguf_metadata.ffn_width_of(config) if padded else None)
    return FromGGUF(_built(config, skeleton, tensors, packed), tokenizer, tuple(notes))


def _check_names(skeleton: Any, arch: Architecture, shapes: Mapping[str, Any]) -> None:
    """What the model has and what the file has are the same."""
    tied = set(getattr(skeleton, "all_tied_weights_keys", {}) or {}) if "output.weight" not in shapes else set()
    due = {}
    for name in skeleton.state_dict():
        module, _, part = name.rpartition(".")
        due[f"{arch.stem(module)}.{part}"] = name
    missing = sorted(target for target, name in due.items() if target not in shapes and name not in tied)
    if missing:
        raise UntrustedInput(f"it lacks tensor {missing[0]}, which a {arch.name} has")
    if unexpected := sorted(set(shapes) - set(due) - {_IGNORED}):
        raise UntrustedInput(f"it has tensor {unexpected[0]}, which a {arch.name} has not")


def _check_shapes(file: GGUFFile, skeleton: Any, arch: Architecture, ffn_width: int | None) -> None:
    """Before anything is read. `ffn_width`: the model's, where the file's is padded to whole blocks."""
    shapes = {}
    for target, info in file.tensors.items():
        stem, _, part = target.rpartition(".")
        module = arch.module(stem)
        if target == _IGNORED or module is None:
            continue
        shape = list(info.shape)
        axis = {"ffn_up": 0, "ffn_gate": 0, "ffn_down": 1}.get(arch.kind(stem))
        if ffn_width is not None and axis is not None and axis < len(shape) and shape[axis] - ffn_width in range(32):
            shape[axis] = ffn_width
        if len(shape) == 2 and arch.kind(stem) in arch.transposed:
            shape.reverse()
        shapes[f"{module}.{part}"] = shape
    check_shapes(file.path, skeleton, shapes)


def _take(
    file: GGUFFile, arch: Architecture, heads: Mapping[str, int], ffn_width: int | None
) -> tuple[dict[str, Tensor], dict[str, PackedWeight], list[str]]:
    """(float tensors, packed weights by module, notes). `ffn_width`: what is left when padding is taken out."""
    tensors: dict[str, Tensor] = {}
    packed: dict[str, PackedWeight] = {}
    notes: list[str] = []
    for target in file.tensors:
        stem, _, part = target.rpartition(".")
        module, kind = arch.module(stem), arch.kind(stem)
        if target == _IGNORED or module is None:
            continue
        value = file.read(target)
        length = None
        if isinstance(value, Blocks):
            value = _ordered(value, kind, heads if kind in arch.interleaved else {})
            value, length = _trimmed(value, target, kind, ffn_width)
            made = to_packed(value, length)
            if not isinstance(made, str):
                packed[module] = made[0]
                notes += [f"{target}: {made[1]}"] if made[1] else []
                continue
            notes.append(f"{target}: kept in float, with exactly the file's values, since {made}")
            value = value.dequantize()[:, :length].contiguous()
        else:
            if kind in arch.interleaved:
                value = deinterleave(value, heads[kind])
            if ffn_width is not None:
                value = _trimmed_float(value, target, kind, ffn_width)
        if value.dim() == 2 and kind in arch.transposed:
            value = value.t().contiguous()
        tensors[f"{module}.{part}"] = value.float()
    return tensors, packed, notes


def _ordered(blocks: Blocks, kind: str, heads: Mapping[str, int]) -> Blocks:
    if kind not in heads:
        return blocks
    q, scale = deinterleave(blocks.q, heads[kind]), deinterleave(blocks.scale, heads[kind])
    offset = None if blocks.offset is None else deinterleave(blocks.offset, heads[kind])
    return Blocks(blocks.kind, q, scale, offset)


def _trimmed(blocks: Blocks, target: str, kind: str, ffn_width: int | None) -> tuple[Blocks, int | None]:
    """Without padding rows, and how many columns count. Raises: UntrustedInput if padding is not zero."""
    if ffn_width is None or kind not in ("ffn_up", "ffn_gate", "ffn_down"):
        return blocks, None
    dense = blocks.dequantize()
    if kind == "ffn_down":
        if blocks.offset is None and not is_zero(dense[:, ffn_width:]):
            raise UntrustedInput(f"its padding in {target} is not zero")
        return blocks, ffn_width
    if not is_zero(dense[ffn_width:]):
        raise UntrustedInput(f"its padding in {target} is not zero")
    offset = None if blocks.offset is None else blocks.offset[:ffn_width]
    return Blocks(blocks.kind, blocks.q[:ffn_width], blocks.scale[:ffn_width], offset), None


def _trimmed_float(value: Tensor, target: str, kind: str, ffn_width: int) -> Tensor:
    axis = {"ffn_up": 0, "ffn_gate": 0, "ffn_down": 1}.get(kind)
    if axis is None or axis >= value.dim():
        return value
    if not is_zero(value.narrow(axis, ffn_width, value.shape[axis] - ffn_width)):
        raise UntrustedInput(f"its padding in {target} is not zero")
    return value.narrow(axis, 0, ffn_width).contiguous()


def _built(config: Any, skeleton: Any, tensors: dict[str, Tensor], packed: dict[str, PackedWeight]) -> PreTrainedModel:
    """The model, with its state, from `skeleton`'s names: packed layers in place and every tensor assigned."""
    embedding = next((name for name in packed if name.endswith(("embed_tokens", "wte"))), None)
    if config.tie_word_embeddings and embedding is not None:
        packed = {**packed, "lm_head": packed[embedding]}
    if not packed:
        return _assembled(config, tensors)
    schemes = {name: Scheme(weight=weight.spec) for name, weight in packed.items()}
    rules = tuple(Rule(scheme, pattern=name) for name, scheme in schemes.items())
    counts = list(schemes.values())
    inventory = Recipe(Scheme(), rules).assign(skeleton)
    inventory = Inventory(tuple(replace(e, reason=_reason(e.scheme)) for e in inventory))
    state = State(max(counts, key=counts.count), inventory, "gguf")
    shapes = {name: (weight.out_features, weight.in_features) for name, weight in packed.items()}
    biases = {name for name in packed if f"{name}.bias" in tensors}
    config.quantization_config = plugin.own_config(state, shapes, biases, {})
    tied = {entry.name for entry in inventory if entry.tied_to is not None}
    for name, weight in packed.items():
        if name not in tied:
            tensors |= {f"{name}.packed.{part}": value for part, value in weight.named_buffers()}
    model: Any = _assembled(config, tensors)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)  # its marks would keep Trainer from training it further
    model.quantailor_state = state
    result: PreTrainedModel = model
    return result


def _reason(scheme: Scheme | None) -> str:
    return "as in the GGUF file" if scheme is not None else "float in the GGUF file"


def _assembled(config: Any, tensors: dict[str, Tensor]) -> PreTrainedModel:
    plugin.register()
    architecture: Any = AutoModelForCausalLM._model_mapping[type(config)]
    model, info = architecture.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(key):
            raise UntrustedInput(f"its tensors do not make the model: {key.replace('_', ' ')} {sorted(info[key])[0]}")
    result: PreTrainedModel = model.eval()
    return result
