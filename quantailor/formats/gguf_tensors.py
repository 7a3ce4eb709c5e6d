"""A packed model as the tensors of a GGUF file: named, ordered, padded, one made at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from quantailor.errors import UsageError
from quantailor.formats.gguf_blocks import BLOCK, BYTES, Blocks, encode
from quantailor.formats.gguf_layers import Rounding, kind_of, to_blocks, why_not
from quantailor.formats.gguf_metadata import ffn_width_of
from quantailor.formats.gguf_names import Architecture, interleave
from quantailor.models.prepare import PACKED
from quantailor.nn.packed import PackedWeight, QuantLinear

_INNER = ("ffn_gate", "ffn_up")  # whose rows are the feed-forward part's inner values; ffn_down's columns are


@dataclass(frozen=True)
class Item:
    """One tensor of the file. `make` gives its bytes as an array (uint8 [rows, bytes] for blocks)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    num_bytes: int
    make: Callable[[], np.ndarray]


@dataclass
class Plan:
    """All that a file will hold. `blocks` gives a layer's blocks anew, for comparing; `layers`: module -> tensor."""

    items: list[Item] = field(default_factory=list)
    layers: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, Callable[[], tuple[Blocks, Rounding]]] = field(default_factory=dict)
    ffn_width: int = 0
    notes: list[str] = field(default_factory=list)


def plan(model: PreTrainedModel, arch: Architecture) -> Plan:
    """What the file of `model`, packed or float, will hold.

    Raises: UsageError naming the first layer that GGUF has no place for, its scheme and the nearest that works.
    """
    config: Any = model.config
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, PACKED)}
    for name, module in layers.items():
        _check(name, module, arch)
    own_width = ffn_width_of(config)
    down = [m for name, m in layers.items() if arch.kind(arch.stem(name) or "") == "ffn_down"]
    result = Plan(ffn_width=-(-own_width // BLOCK) * BLOCK if down else own_width)
    if result.ffn_width != own_width:
        result.notes.append(
            f"the feed-forward width of {own_width} is padded to {result.ffn_width} by zeros, since rows are whole "
            f"blocks of {BLOCK}: same outputs, and a quantailor that reads the file takes them out"
        )
    if inputs := [m for m in layers.values() if m.scheme.input is not None]:
        result.notes.append(
            f"{len(inputs)} layers also quantize their inputs ({inputs[0].scheme}), which GGUF cannot say: only the "
            "weights are the trained ones; llama.cpp rounds inputs to 8 bits in blocks of 32 on its own"
        )
    wide = [m.packed for m in layers.values() if m.packed.spec.group_size != BLOCK]
    if wide:
        result.notes.append(f"{len(wide)} layers with wider groups repeat their scales for each block of {BLOCK}")
    small = [m.packed for m in layers.values() if m.packed.spec.grid.bits not in (4, 8)]
    if small:
        result.notes.append(f"{len(small)} layers of fewer bits take the room of blocks of 4 or 8 bits: same integers")
    _add_all(result, model, arch, layers)
    return result


def _check(name: str, module: Any, arch: Architecture) -> None:
    stem, length = arch.stem(name), module.packed.in_features
    if stem is None:
        raise UsageError(f"{name}: GGUF has no name for it in a {arch.name}; keep this layer in float by a rule")
    reason = why_not(module.scheme, length)
    if reason is None and length % BLOCK and arch.kind(stem) != "ffn_down":
        reason = f"rows of {length} weights are no whole blocks of {BLOCK}; the nearest that works is float, by a rule"
    if reason is not None:
        raise UsageError(f"{name}: GGUF cannot hold {module.scheme} here: {reason}")


def _add_all(result: Plan, model: PreTrainedModel, arch: Architecture, layers: dict[str, Any]) -> None:
    config: Any = model.config
    written: dict[int, str] = {}  # a packed weight or a storage, so that a tied head is not written twice
    inside = tuple(f"{name}." for name in layers)
    for name, module in layers.items():
        stem = arch.stem(name)
        assert stem is not None
        if (first := written.setdefault(id(module.packed), stem)) != stem:
            if (first, stem) != ("token_embd", "output"):
                raise UsageError(f"{name}: shares its weight with {first}, which GGUF cannot say; untie them first")
            continue
        _add_blocks(result, name, stem, module.packed, arch, config)
        if isinstance(module, QuantLinear) and module.bias is not None:
            _add_float(result, f"{stem}.bias", module.bias, arch, config, transposed=False)
    for key, tensor in model.state_dict(keep_vars=True).items():
        if key.startswith(inside):
            continue
        module_name, _, part = key.rpartition(".")
        stem = arch.stem(module_name)
        if stem is None or part not in ("weight", "bias"):
            raise UsageError(f"{key}: GGUF has no name for this tensor in a {arch.name}; save the model instead")
        if stem == "output" and written.get(id(tensor)) == "token_embd":
            continue
        written[id(tensor)] = stem
        transposed = part == "weight" and arch.kind(stem) in arch.transposed
        _add_float(result, f"{stem}.{part}", tensor.detach(), arch, config, transposed=transposed)
    for tensor in _rope_factors(model):
        _add_float(result, "rope_freqs.weight", tensor, arch, config, transposed=False)


def _heads(arch: Architecture, stem: str, config: Any) -> int | None:
    """How many heads the rows of `stem` are interleaved in; None if they stay."""
    if arch.kind(stem) not in arch.interleaved:
        return None
    return int(config.num_key_value_heads if arch.kind(stem) == "attn_k" else config.num_attention_heads)


def _add_blocks(result: Plan, name: str, stem: str, weight: PackedWeight, arch: Architecture, config: Any) -> None:
    kind, heads = kind_of(weight.spec), _heads(arch, stem, config)
    rows = result.ffn_width if arch.kind(stem) in _INNER else weight.out_features
    length = -(-weight.in_features // BLOCK) * BLOCK

    def blocks() -> tuple[Blocks, Rounding]:
        try:
            made, rounding = to_blocks(weight, rows)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
        if heads is not None:
            offset = None if made.offset is None else interleave(made.offset, heads)
            made = Blocks(kind, interleave(made.q, heads), interleave(made.scale, heads), offset)
        return made, rounding

    target = f"{stem}.weight"
    result.layers[name], result.blocks[target] = target, blocks
    num_bytes = rows * length // BLOCK * BYTES[kind]
    result.items.append(Item(target, kind, (rows, length), num_bytes, lambda: encode(blocks()[0])))


def _add_float(result: Plan, target: str, tensor: Tensor, arch: Architecture, config: Any, *, transposed: bool) -> None:
    """Vectors in float32, which llama.cpp asks for; matrices in the model's own type."""
    stem = target.rpartition(".")[0]
    kinds = {torch.float16: "F16", torch.bfloat16: "BF16"}
    kind = "F32" if tensor.dim() == 1 else kinds.get(tensor.dtype, "F32")
    pad = result.ffn_width - ffn_width_of(config)

    def make() -> np.ndarray:
        values = tensor.cpu().t() if transposed else tensor.cpu()
        if (heads := _heads(arch, stem, config)) is not None:
            values = interleave(values, heads)
        if pad and arch.kind(stem) in _INNER:
            values = F.pad(values, (0, 0, 0, pad) if values.dim() == 2 else (0, pad))
        elif pad and arch.kind(stem) == "ffn_down" and values.dim() == 2:
            values = F.pad(values, (0, pad))
        if kind == "BF16":
            return values.contiguous().view(torch.int16).numpy().view(np.uint8)
        return values.to(torch.float16 if kind == "F16" else torch.float32).contiguous().numpy()

    shape = list(tensor.shape[::-1] if transposed else tensor.shape)
    if arch.kind(stem) in _INNER:
        shape[0] += pad
    elif arch.kind(stem) == "ffn_down" and len(shape) == 2:
        shape[1] += pad
    num_bytes = int(np.prod(shape)) * (4 if kind == "F32" else 2)
    result.items.append(Item(target, kind, tuple(shape), num_bytes, make))


def _rope_factors(model: PreTrainedModel) -> Iterator[Tensor]:
    """By what llama3's scaling divides each rotary frequency: float32 [head_dim / 2]; nothing without it."""
    config: Any = model.config
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type") != "llama3":
        return
    rotary: Any = model.get_submodule("model.rotary_emb")
    scaled = rotary.inv_freq.detach().double().cpu()
    steps = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float64) / (2 * len(scaled))
    yield (rope["rope_theta"] ** -steps / scaled).float()
