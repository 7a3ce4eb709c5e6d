"""compressed-tensors folders made by others (llm-compressor and the like), versions up to 0.20.

    pack-quantized   LAYER.weight_packed int32 [O, words], .weight_scale [O, G], .weight_shape int64 [2],
                     .weight_zero_point int32 [ceil(O * b / 32), G] packed along the outputs, where asymmetric
    int-quantized,   LAYER.weight int8 [O, N], .weight_scale [O, G] or [1], .weight_zero_point int8,
    naive-quantized  .input_scale [1] of static activations
    both             .weight_g_idx int32 [N], act-order "group" (written up to 0.17)

Integers are stored as u = q + 2^(b-1), zero points alike. 3, 5, 6 and 7 bits came with whole fields in a word up to
0.17, and come as an unbroken stream since: the shape tells which. Floating-point formats (FP8, FP4) and sparse ones are
refused.

Source: the format documentation and QuantizationConfig of compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantailor.errors import QuantailorError, UntrustedInput, UsageError
from quantailor.formats.foreign_layer import FLOATS, Layer, Slot, Taken, check_type, from_unsigned
from quantailor.nn.packed import PackedWeight
from quantailor.numerics.packing import unpack, words_per_row
from quantailor.spec import Int, PerTensor, PerToken, QuantSpec, Scheme

_READ = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense", None)
_PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale")
_AS_FLOAT = "decompress it with compressed-tensors (dequantize=True), save that, and quantize it here"


@dataclass(frozen=True)
class _Group:
    """One entry of `config_groups`."""

    name: str
    targets: tuple[str, ...]
    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    inputs: QuantSpec | None


def read_layers(config: Mapping[str, Any], stored: dict[str, Tensor], slots: Mapping[str, Slot]) -> Taken:
    """`config`: the folder's `quantization_config`; `stored`: every tensor by the model's own names.

    Raises: UsageError for a format or grid that is not read, UntrustedInput where a layer contradicts itself.
    """
    _check_format(config)
    groups = [_group(name, value) for name, value in _dict(config.get("config_groups"), "config_groups").items()]
    result = Taken(rest=dict(stored))
    if config.get("kv_cache_scheme"):
        result.notes.append("its scheme for the cache of keys and values is not applied: the cache stays in float")
    names = [key.removesuffix(".weight_scale") for key in stored if key.endswith(".weight_scale")]
    for name in sorted(names):
        slot = slots.get(name)
        if slot is None or slot.kind not in ("Linear", "Embedding"):
            raise UntrustedInput(f"it quantizes {name}, which is no layer of this model to quantize; use a sound copy")
        group = _group_of(name, slot, groups)
        parts = {part: result.rest.pop(f"{name}.{part}", None) for part in _PARTS}
        for zeros in ("input_zero_point", "output_zero_point"):  # symmetric ones, which some writers keep
            if (zero := result.rest.pop(f"{name}.{zeros}", None)) is not None and bool(zero.any()):
                raise UsageError(f"{name}: its activations have a zero point, which is not read; {_AS_FLOAT}")
        try:
            layer, note = _layer(name, group, parts, slot, result.rest.pop(f"{name}.bias", None))
        except QuantailorError:
            raise
        except (ValueError, RuntimeError, IndexError) as error:
            raise UntrustedInput(f"{name}: {error}; use a sound copy") from error
        result.layers[name] = layer
        result.notes += [f"{name}: {note}"] if note else []
    return result


def _check_format(config: Mapping[str, Any]) -> None:
    groups = _dict(config.get("config_groups"), "config_groups")
    formats = [config.get("format"), *(value.get("format") for value in groups.values() if isinstance(value, dict))]
    if other := next((f for f in formats if f not in _READ), None):
        raise UsageError(f"its format {str(other)[:40]!r} is none of {', '.join(filter(None, _READ))}; {_AS_FLOAT}")
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        raise UsageError(f"its weights are stored sparsely ({str(sparsity.get('format'))[:40]}); {_AS_FLOAT}")
    if config.get("transform_config"):
        raise UsageError(f"it rotates activations at run time (transform_config), which is not read; {_AS_FLOAT}")
    if config.get("quantization_status") not in (None, "compressed"):
        raise UsageError(f"its quantization_status is {str(config.get('quantization_status'))[:40]!r}; {_AS_FLOAT}")


def _dict(value: Any, name: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UntrustedInput(f"its {name} is no object; use a sound copy")
    return value


def _group(name: str, value: Any) -> _Group:
    value = _dict(value, f"config group {name[:40]!r}")
    targets, weights = value.get("targets"), _dict(value.get("weights"), f"weights of {name[:40]!r}")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets) or not weights:
        raise UntrustedInput(f"its config group {name[:40]!r} has no targets or no weights; use a sound copy")
    bits, strategy, size = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
    strategy = strategy or ("group" if type(size) is int and size > 0 else "channel" if size == -1 else "tensor")
    if weights.get("type", "int") != "int" or type(bits) is not int or not 2 <= bits <= 8:
        kind = f"{bits}-bit {weights.get('type', 'int')}"
        raise UsageError(f"its weights are {kind[:40]}, which is no integer grid of 2 to 8 bits; {_AS_FLOAT}")
    if strategy not in ("tensor", "channel", "group"):
        raise UsageError(f"its weights have a scale for each {str(strategy)[:40]}, which is not read; {_AS_FLOAT}")
    if strategy == "group" and (type(size) is not int or size < 1):
        raise UntrustedInput(f"its group_size is {str(size)[:40]}; use a sound copy")
    if value.get("output_activations"):
        raise UsageError(f"its config group {name[:40]!r} quantizes outputs, which is not read; {_AS_FLOAT}")
    return _Group(
        name,
        tuple(targets),
        bits,
        weights.get("symmetric", True) is not False,
        strategy,
        size if strategy == "group" else None,
        _inputs(value.get("input_activations")),
    )


def _inputs(value: Any) -> QuantSpec | None:
    if value is None:
        return None
    value = _dict(value, "input_activations")
    dynamic, strategy = value.get("dynamic", False), value.get("strategy")
    plain = value.get("type", "int") == "int" and value.get("symmetric", True) is not False
    bits = value.get("num_bits", 8)
    if plain and type(bits) is int and 2 <= bits <= 8:
        if dynamic is True and strategy in (None, "token"):
            return QuantSpec(Int(bits), PerToken(), dynamic=True, range="minmax")
        if dynamic is False and strategy in (None, "tensor"):
            return QuantSpec(Int(bits), PerTensor(), range="minmax")
    what = f"{bits}-bit {value.get('type', 'int')} by {strategy}, {'dynamic' if dynamic else 'static'}"
    raise UsageError(
        f"its activations are {what[:80]}: only symmetric integers are read, per token found at each call or per "
        f"tensor fixed beforehand; {_AS_FLOAT}"
    )


def _group_of(name: str, slot: Slot, groups: list[_Group]) -> _Group:
    """As the library matches: an exact name before a pattern, a pattern before a type."""
    for matches in (
        lambda target: target == name,
        lambda target: target.startswith("re:") and _matches(target[3:], name),
        lambda target: target == slot.kind,
    ):
        for group in groups:
            if any(matches(target) for target in group.targets):
                return group
    raise UntrustedInput(f"no config group targets {name}, which is stored quantized; use a sound copy")


def _matches(pattern: str, name: str) -> bool:
    """A pattern of a stranger's file, which must not be one that takes for ever."""
    if len(pattern) > 1000 or len(re.findall(r"[*+{]", pattern)) > 4 or re.search(r"\)[*+{]", pattern):
        raise UsageError(f"its target {pattern[:60]!r} could take for ever to match; name the layers instead")
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise UntrustedInput(f"its target {pattern[:60]!r} is no regular expression; use a sound copy") from error


def _layer(
    name: str, group: _Group, parts: Mapping[str, Tensor | None], slot: Slot, bias: Tensor | None
) -> tuple[Layer, str | None]:
    scale, zero, index = parts["weight_scale"], parts["weight_zero_point"], parts["weight_g_idx"]
    assert scale is not None
    check_type(f"{name}.weight_scale", scale, *FLOATS)
    if scale.dim() != 2:
        scale = scale.reshape(-1, 1)
    groups, bits = scale.shape[1], group.bits
    size = group.group_size if groups > 1 or index is not None else None
    middle = 2 ** (bits - 1)
    if (packed := parts["weight_packed"]) is not None:
        u_ON = _unpacked(name, packed, parts["weight_shape"], bits, slot)
    elif (q := parts["weight"]) is not None:
        check_type(f"{name}.weight", q, torch.int8, shape=(slot.rows, slot.length))
        u_ON = q.to(torch.int16) + middle
    else:
        raise ValueError("it has a scale and neither weight nor weight_packed")
    if group.symmetric or zero is None:
        if zero is not None and bool(zero.any()):
            raise ValueError("its config says symmetric, and it has zero points that are not 0")
        if not group.symmetric:
            raise ValueError("its config says asymmetric, and it has no zero points")
        zero_OG = torch.full(scale.shape, middle)
    elif packed is not None and zero.dtype == torch.int32:
        zero_OG = _unpacked_along_rows(zero, bits, slot.rows)
    else:
        check_type(f"{name}.weight_zero_point", zero, torch.int8)
        zero_OG = zero.reshape(scale.shape).to(torch.int16) + middle
    if group.inputs is not None and index is not None:
        raise UsageError(f"{name}: act-order with quantized inputs is not read; {_AS_FLOAT}")
    if group.strategy == "tensor":
        if scale.numel() != 1 or zero_OG.numel() != 1:
            raise ValueError(f"its config says one scale, and it has {scale.numel()}")
        scale, zero_OG = scale.expand(slot.rows, 1), zero_OG.expand(slot.rows, 1)
    weight, note = from_unsigned(u_ON, scale, zero_OG, bits, size, index)
    if group.strategy == "tensor":
        weight = _per_tensor(weight)
    scheme = Scheme(weight=weight.spec, input=group.inputs)
    return Layer(scheme, weight, bias, _input_scale(name, group, parts["input_scale"])), note


def _input_scale(name: str, group: _Group, scale: Tensor | None) -> Tensor | None:
    if group.inputs is None or group.inputs.dynamic:
        if scale is not None:
            raise ValueError("it has an input_scale, and its config fixes no activations beforehand")
        return None
    if scale is None or scale.numel() != 1 or scale.dtype not in FLOATS:
        raise ValueError("its static activations have no input_scale of one number")
    return scale.float().reshape(1)


def _per_tensor(weight: PackedWeight) -> PackedWeight:
    spec = QuantSpec(weight.spec.grid, PerTensor())
    one = PackedWeight(spec, weight.out_features, weight.in_features)
    for part, buffer in weight.named_buffers():
        setattr(one, part, buffer[:1].clone() if part in ("scale", "zero_point") else buffer)
    return one


def _unpacked(name: str, words: Tensor, shape: Tensor | None, bits: int, slot: Slot) -> Tensor:
    check_type(f"{name}.weight_packed", words, torch.int32)
    if shape is not None and shape.tolist() != [slot.rows, slot.length]:
        raise ValueError(f"weight_shape says {str(shape.tolist())[:60]}, the model {[slot.rows, slot.length]}")
    if words.dim() != 2 or words.shape[0] != slot.rows:
        raise ValueError(f"weight_packed {list(words.shape)} has not the {slot.rows} rows of the model")
    stream, per_word = words_per_row(slot.length, bits), 32 // bits
    whole = -(-slot.length // per_word)
    if words.shape[1] == stream and (stream != whole or slot.length <= per_word or 32 % bits == 0):
        return unpack(words, bits, slot.length)
    if words.shape[1] != whole or stream == whole:
        raise ValueError(f"{words.shape[1]} words a row are not those of {slot.length} values of {bits} bits")
    return _whole_fields(words, bits, slot.length)


def _whole_fields(words: Tensor, bits: int, length: int) -> Tensor:
    """Up to 0.17: as many fields as fit into a word, its top bits unused."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    fields = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return fields.flatten(1)[:, :length].to(torch.uint8)


def _unpacked_along_rows(words: Tensor, bits: int, rows: int) -> Tensor:
    turned = words.t().contiguous()
    if turned.shape[1] == words_per_row(rows, bits):
        return unpack(turned, bits, rows).t()
    if turned.shape[1] != -(-rows // (32 // bits)):
        raise ValueError(f"{turned.shape[1]} words do not hold {rows} zero points of {bits} bits")
    return _whole_fields(turned, bits, rows).t()
