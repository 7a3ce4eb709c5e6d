"""How packed tensors are named and laid out on disk: compressed-tensors where a scheme can be said in it, else our own.

compressed-tensors (stock transformers reads it, which tests hold; vLLM's layout, by its documentation):
    pack-quantized   LAYER.weight_packed int32 [O, words], LAYER.weight_scale [O, G], LAYER.weight_shape int64 [2]
    int-quantized    LAYER.weight int8 [O, N], LAYER.weight_scale [O, 1]            (8-bit activations, per token, or
                     per tensor with LAYER.input_scale [1])
our own: the buffers of `PackedWeight` under LAYER.packed, and LAYER.input_scale where activations are static.

Axes: O out, N in, G groups a row. The integers are the same in memory and in both layouts; nothing is rounded here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from quantailor.models.experts import experts_of
from quantailor.numerics.packing import pack, words_per_row
from quantailor.recipe import Inventory, in_features
from quantailor.spec import Int, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, Scheme

EXPERTS = r".*experts\.[0-9]+\.(gate_proj|up_proj|down_proj)$"
Format = Literal["compressed-tensors", "quantailor"]


def why_not_compressed_tensors(inventory: Inventory) -> str | None:
    """The first thing in the inventory that compressed-tensors' layout cannot say; None if it can say all."""
    for entry in inventory:
        if entry.scheme is None:
            continue
        if entry.kind != "Linear":
            return f"{entry.name} is a {entry.kind}"
        if entry.tied_to is not None:
            return f"{entry.name} shares its weight with {entry.tied_to}"
        if reason := _unsayable(entry.scheme, in_features(entry.kind, entry.shape)):
            return f"{entry.name}: {reason}"
    if point := next((p for p in inventory.points if p.spec is not None), None):
        return f"{point.name} is a quantized point inside a block"
    return _mixed_unit(inventory) or _mixed_experts(inventory)


_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))


def _mixed_unit(inventory: Inventory) -> str | None:
    """The first layers of two schemes that serving engines multiply as one matrix, with the nearest that works."""
    linear = {entry.name: entry for entry in inventory if entry.kind == "Linear"}
    for name, entry in linear.items():
        parent, _, last = name.rpartition(".")
        for parts in _FUSED:
            if last != parts[0]:
                continue
            unit = [found for part in parts if (found := linear.get(f"{parent}.{part}" if parent else part))]
            other = next((e for e in unit if e.scheme != entry.scheme), None)
            if other is None:
                continue
            widest = max((e.scheme for e in unit if e.scheme), key=_bits)
            return (
                f"{name} is {entry.scheme or 'float'} and {other.name} {other.scheme or 'float'}, which serving "
                f"engines fuse: one scheme for {{{', '.join(parts)}}}; the nearest that works is {widest} for each, "
                "by a rule"
            )
    return None


def _mixed_experts(inventory: Inventory) -> str | None:
    """transformers stacks the experts of a model into one tensor, from weights alone and of one scheme."""
    experts = [entry for entry in inventory if entry.kind == "Linear" and experts_of([entry.name])]
    first = next((entry for entry in experts if entry.scheme is not None), None)
    if first is None or first.scheme is None:
        return None
    if first.scheme.input is not None:
        nearest = dataclasses.replace(first.scheme, input=None)
        return f"{first.name}: experts have no place for quantized inputs there; the nearest that works is {nearest}"
    other = next((entry for entry in experts if entry.scheme != first.scheme), None)
    if other is None:
        return None
    return (
        f"{first.name} is {first.scheme} and {other.name} {other.scheme or 'float'}, and transformers reads all "
        f"experts of a model in one scheme; the nearest that works is {first.scheme} for each, by a rule"
    )


def _bits(scheme: Scheme) -> tuple[int, int]:
    weight = scheme.weight
    return (0, 0) if weight is None else (weight.grid.bits, -(weight.group_size or 10**9))


def _unsayable(scheme: Scheme, length: int) -> str | None:
    weight, activations = scheme.weight, scheme.input
    if weight is None or scheme.output is not None:
        return "only weights, or weights and inputs, have a place there"
    grid = weight.grid
    if not isinstance(grid, Int) or not grid.symmetric or grid.narrow or grid.bits not in (2, 4, 8):
        return f"its grid {grid} is not symmetric with 2, 4 or 8 bits"
    if not isinstance(weight.granularity, PerChannel | PerGroup):
        return "its scale is per tensor"
    if weight.is_indexed:
        return "its groups are in act-order, which compressed-tensors reads no more since 0.18"
    if isinstance(weight.granularity, PerGroup) and length % weight.granularity.size:
        return f"groups of {weight.granularity.size} leave a shorter last one of {length} inputs"
    if activations is not None and activations.outliers is not None:
        return "LLM.int8 keeps outlier columns of its inputs in float"
    if activations is not None and activations.group_size is not None:
        return f"its activations have a scale for each group of {activations.group_size}"
    if activations is not None and not (is_plain_int8(activations) and grid.bits == 8 and weight.group_size is None):
        return (
            "only 8-bit channel weights go with activations, and those must be 8-bit, per token or static per tensor; "
            "the nearest that works is w8a8"
        )
    return None


def is_plain_int8(spec: QuantSpec) -> bool:
    return spec.grid == Int(8) and isinstance(spec.granularity, PerToken if spec.dynamic else PerTensor)


def compressed_tensors_config(inventory: Inventory) -> dict[str, Any]:
    """The `quantization_config` that says the inventory. Modules are named exactly: none is caught by chance."""
    schemes: dict[Scheme, list[str]] = {}
    for name, scheme in inventory.quantized.items():
        schemes.setdefault(scheme, []).append(name)
    groups = {}
    for index, (scheme, names) in enumerate(schemes.items()):
        assert scheme.weight is not None and isinstance(scheme.weight.grid, Int)
        grouped = scheme.weight.group_size is not None
        weights = {
            "num_bits": scheme.weight.grid.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group" if grouped else "channel",
            "dynamic": False,
        } | ({"group_size": scheme.weight.group_size} if grouped else {})
        dynamic = scheme.input is not None and scheme.input.dynamic
        inputs = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "token" if dynamic else "tensor",
            "dynamic": dynamic,
        }
        groups[f"group_{index}"] = {
            "targets": _targets(names) if len(schemes) > 1 else names,
            "weights": weights,
            "input_activations": inputs if scheme.input else None,
            "output_activations": None,
            "format": _ct_format(scheme),
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": [e.name for e in inventory if e.scheme is None and e.kind == "Linear"],
        "config_groups": groups,
    }


def _targets(names: list[str]) -> list[str]:
    """Exact names, but for experts a pattern: by it transformers finds the scheme of theirs among several."""
    dense = [name for name in names if not experts_of([name])]
    return dense + (["re:" + EXPERTS] if len(dense) < len(names) else [])


def _ct_format(scheme: Scheme) -> str:
    return "int-quantized" if scheme.input is not None else "pack-quantized"


def to_compressed_tensors(name: str, packed: Mapping[str, Tensor], scheme: Scheme, length: int) -> dict[str, Tensor]:
    """One layer's `PackedWeight` buffers under the names and shapes of compressed-tensors."""
    scale = packed["scale"]
    if scheme.input is not None:
        return {f"{name}.weight": packed["q"], f"{name}.weight_scale": scale}
    words = packed["words"] if "words" in packed else pack(packed["q"].to(torch.int16) + 128, 8)
    shape = torch.tensor([words.shape[0], length], dtype=torch.int64)
    return {f"{name}.weight_packed": words, f"{name}.weight_scale": scale, f"{name}.weight_shape": shape}


def turn_highest_bits(values: Tensor) -> None:
    """u - 128 in 8 bits is u with its highest bit turned, here where it lies: a copy would count at a model's peak."""
    values.view(torch.uint8).bitwise_xor_(128)


def from_compressed_tensors(
    name: str, stored: Mapping[str, Tensor], scheme: Scheme, turn: Callable[[Tensor], object] = turn_highest_bits
) -> dict[str, Tensor]:
    """The inverse: buffers of a `PackedWeight`, without their prefix. Uses up the layer's tensors in `stored`; weights
    of 8 bits alone, which may lie where their words lay, are right once `turn` or who it tells has turned their bits.
    Raises: KeyError naming what is missing, ValueError if shapes contradict each other."""
    scale = stored[f"{name}.weight_scale"].float()
    if scheme.input is not None:
        return {"q": stored[f"{name}.weight"], "scale": scale}
    words = stored[f"{name}.weight_packed"]
    rows, length = (int(v) for v in stored[f"{name}.weight_shape"])
    if rows != words.shape[0]:
        raise ValueError(f"{name}: weight_shape says {rows} rows, weight_packed has {words.shape[0]}")
    assert scheme.weight is not None
    if scheme.weight.grid.bits == 8:
        if words.shape[1] != words_per_row(length, 8):
            raise ValueError(f"{name}: {words.shape[1]} words a row do not hold {length} values of 8 bits")
        q = words.contiguous().view(torch.int8)[:, :length].contiguous()
        turn(q)
        return {"q": q, "scale": scale}
    return {"words": words, "scale": scale}


COMPRESSED_NAMES = ("weight", "weight_packed", "weight_scale", "weight_shape")
