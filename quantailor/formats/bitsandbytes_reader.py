"""bitsandbytes folders: `quant_method: bitsandbytes`, NF4 (with or without doubly quantized scales) and LLM.int8.

    4 bits   LAYER.weight         uint8 [O * N / 2, 1]   two level indices a byte, the first in the high half
             LAYER.weight.absmax  float32, one a block of 64 of the flattened weight; doubly quantized: uint8 codes
             LAYER.weight.quant_map float32 [16]         the levels
             LAYER.weight.nested_absmax, .nested_quant_map    absmax = map[code] * nested_absmax[block] + offset
             LAYER.weight.quant_state.bitsandbytes__nf4       JSON: block size, shape, offset
    8 bits   LAYER.weight int8 [O, N], LAYER.SCB float32 [O]  x = q * SCB / 127; LAYER.weight_format

NF4's levels are ours, so a dequantized weight is equal to the last bit. Doubly quantized scales are 8-bit codes of a
table that our nf4-dq has not: they are taken as the float32 numbers they stand for. FP4 has levels that no grid of
ours has and is refused.

Source: arXiv:2305.14314, arXiv:2208.07339, and the state dict of bitsandbytes' QuantState and Linear8bitLt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantailor.errors import QuantailorError, UntrustedInput, UsageError
from quantailor.formats.foreign_layer import Layer, Slot, Taken, check_type
from quantailor.nn.packed import PackedWeight
from quantailor.numerics import nf4
from quantailor.numerics.packing import pack
from quantailor.spec import NF4, Int, PerChannel, PerGroup, PerToken, QuantSpec, Scheme

_STATE = ".weight.quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 100_000
_AS_FLOAT = "load it with bitsandbytes, dequantize() it, save that, and quantize it here"


def read_layers(config: Mapping[str, Any], stored: dict[str, Tensor], slots: Mapping[str, Slot]) -> Taken:
    """`config`: the folder's `quantization_config`; `stored`: every tensor by the model's own names.

    Raises: UsageError for options that contradict each other or a grid that is not ours, UntrustedInput where a layer
    contradicts itself.
    """
    four, eight = bool(config.get("load_in_4bit")), bool(config.get("load_in_8bit"))
    if four and eight:
        raise UsageError("its config asks for load_in_4bit and load_in_8bit together; a weight has one width")
    if eight and config.get("bnb_4bit_quant_type") == "nf4":
        raise UsageError(
            "its config asks for load_in_8bit with bnb_4bit_quant_type='nf4': NF4 is a table of 16 levels, 4 bits by "
            "definition, and has no 8-bit form; which was meant cannot be told: save it again with one of the two"
        )
    if not (four or eight):
        raise UsageError("its config asks for neither load_in_4bit nor load_in_8bit; use a sound copy")
    result = Taken(rest=dict(stored))
    if eight:
        _read_8_bit(config, stored, slots, result)
    else:
        _read_4_bit(stored, slots, result)
    return result


def _slot(name: str, slots: Mapping[str, Slot]) -> Slot:
    slot = slots.get(name)
    if slot is None or slot.kind != "Linear":
        raise UntrustedInput(f"it quantizes {name}, which is no linear layer of this model; use a sound copy")
    return slot


def _read_8_bit(
    config: Mapping[str, Any], stored: Mapping[str, Tensor], slots: Mapping[str, Slot], result: Taken
) -> None:
    threshold = config.get("llm_int8_threshold", 6.0)
    if type(threshold) not in (int, float) or not threshold >= 0:
        raise UntrustedInput(f"its llm_int8_threshold is {str(threshold)[:40]}; use a sound copy")
    outliers = float(threshold) or None
    inputs = QuantSpec(Int(8), PerToken(), dynamic=True, range="minmax", outliers=outliers)
    scheme = Scheme(weight=QuantSpec(Int(8), PerChannel()), input=inputs)
    for name in sorted(key.removesuffix(".SCB") for key in stored if key.endswith(".SCB")):
        slot, rest = _slot(name, slots), result.rest
        q, scb = rest.pop(f"{name}.weight", None), rest.pop(f"{name}.SCB").flatten()
        order = rest.pop(f"{name}.weight_format", None)
        if q is None:
            raise UntrustedInput(f"{name} has no weight; download or copy the folder again")
        check_type(f"{name}.weight", q, torch.int8, shape=(slot.rows, slot.length))
        check_type(f"{name}.SCB", scb, torch.float32, shape=(slot.rows,))
        if order is not None and bool(order.any()):
            raise UsageError(f"{name} is ordered for one GPU's tiles (weight_format {order.tolist()}); {_AS_FLOAT}")
        assert scheme.weight is not None
        weight = PackedWeight(scheme.weight, slot.rows, slot.length)
        empty = scb == 0
        weight.q = torch.where(empty[:, None], torch.zeros_like(q), q).contiguous()
        weight.scale = torch.where(empty, 1.0, scb / 127)[:, None].contiguous()
        result.layers[name] = Layer(scheme, weight, rest.pop(f"{name}.bias", None))
    result.notes.append(
        "LLM.int8 of bitsandbytes: the same integers and scales; inputs are rounded with a step of largest / 127.5 "
        "here and of largest / 127 there"
    )


def _read_4_bit(stored: Mapping[str, Tensor], slots: Mapping[str, Slot], result: Taken) -> None:
    doubled = 0
    for key in sorted(key for key in stored if _STATE in key):
        name, _, kind = key.partition(_STATE)
        if kind != "nf4":
            raise UsageError(f"{name} is {kind[:20]} of bitsandbytes, whose levels no grid of ours has; {_AS_FLOAT}")
        slot, rest = _slot(name, slots), result.rest
        state = _state(name, rest.pop(key))
        names = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
        parts = {part: rest.pop(f"{name}.weight{part}", None) for part in names}
        try:
            weight, nested = _nf4(name, parts, state, slot)
        except QuantailorError:
            raise
        except (ValueError, RuntimeError, IndexError) as error:
            raise UntrustedInput(f"{name}: {error}; use a sound copy") from error
        doubled += nested
        result.layers[name] = Layer(Scheme(weight=weight.spec), weight, rest.pop(f"{name}.bias", None))
    if doubled:
        result.notes.append(
            f"{doubled} layers have doubly quantized scales by bitsandbytes' own table: taken as the float32 numbers "
            "they stand for, which is exact and takes 0.37 bits a weight more"
        )


def _state(name: str, tensor: Tensor) -> dict[str, Any]:
    if tensor.dtype != torch.uint8 or tensor.numel() > _MAX_STATE_BYTES:
        raise UntrustedInput(f"{name}: its quant_state is no short text; use a sound copy")
    try:
        state = json.loads(bytes(tensor.flatten().tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UntrustedInput(f"{name}: its quant_state is no JSON; use a sound copy") from error
    if not isinstance(state, dict):
        raise UntrustedInput(f"{name}: its quant_state is no JSON object; use a sound copy")
    return state


def _nf4(
    name: str, parts: Mapping[str, Tensor | None], state: Mapping[str, Any], slot: Slot
) -> tuple[PackedWeight, bool]:
    held, absmax, table = parts[""], parts[".absmax"], parts[".quant_map"]
    if held is None or absmax is None or table is None:
        raise ValueError("its weight, absmax or quant_map is missing")
    block = state.get("blocksize")
    if type(block) is not int or block < 1 or slot.length % block:
        raise UsageError(
            f"{name}: blocks of {str(block)[:20]} weights do not end with rows of {slot.length}, and a group of ours "
            f"lies in one row; {_AS_FLOAT}"
        )
    if state.get("shape") != [slot.rows, slot.length]:
        raise ValueError(
            f"its quant_state has shape {str(state.get('shape'))[:60]}, the model {slot.rows, slot.length}"
        )
    if table.numel() != 16 or not torch.equal(table.float().flatten(), torch.tensor(nf4.LEVELS)):
        raise UsageError(f"{name}: its levels are not those of NF4; {_AS_FLOAT}")
    codes = held.contiguous().view(torch.uint8).flatten()
    blocks = slot.rows * slot.length // block
    if codes.numel() * 2 != slot.rows * slot.length or absmax.numel() != blocks:
        raise ValueError(f"{codes.numel()} bytes and {absmax.numel()} scales are not those of its shape")
    nested, second = parts[".nested_absmax"], parts[".nested_quant_map"]
    if nested is not None or absmax.dtype == torch.uint8:
        absmax = _nested(absmax, nested, second, state)
    q = torch.stack([codes >> 4, codes & 15], dim=1).reshape(slot.rows, slot.length)
    scale = absmax.float().reshape(slot.rows, -1)
    empty = scale == 0  # a block of zeros: index 7 stands for 0 at any scale
    q = torch.where(empty.repeat_interleave(block, 1), torch.full_like(q, 7), q)
    weight = PackedWeight(QuantSpec(NF4(), PerGroup(block), range="minmax"), slot.rows, slot.length)
    weight.words, weight.scale = pack(q, 4), torch.where(empty, 1.0, scale).contiguous()
    return weight, nested is not None


def _nested(codes: Tensor, nested: Tensor | None, table: Tensor | None, state: Mapping[str, Any]) -> Tensor:
    """absmax = table[code] * nested_absmax[block] + offset, in float32 in this order."""
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if nested is None or table is None or codes.dtype != torch.uint8 or table.numel() != 256:
        raise ValueError("its doubly quantized scales are not whole")
    if type(block) is not int or block < 1 or nested.numel() != -(-codes.numel() // block):
        raise ValueError(f"{nested.numel()} nested scales are not those of {codes.numel()} scales")
    if not isinstance(offset, int | float):
        raise ValueError("its nested_offset is no number")
    values = table.float().flatten()[codes.flatten().long()]
    return values * nested.float().flatten().repeat_interleave(block)[: codes.numel()] + offset
