"""GPTQ folders (AutoGPTQ, GPTQModel, Optimum): `quant_method: gptq`.

    LAYER.qweight int32 [N * b / 32, O]   unsigned integers, packed along the inputs, a little-endian stream of bits
    LAYER.qzeros  int32 [G, O * b / 32]   zero points, packed along the outputs
    LAYER.scales  float16 [G, O]          x = (u - zero) * scale
    LAYER.g_idx   int32 [N]               the group of each input; under act-order (desc_act) not in turn

Format `gptq` (version 1) stores zero - 1: the packed words are the packed zero points minus 1 in every field, so that
a zero point of 0 borrows from the field above it; `gptq_v2` stores them as they are. The layouts called marlin, bitblas
and the like reorder tiles for one GPU's kernel and are refused.

Source: the documentation and the pack/unpack code of AutoGPTQ and GPTQModel, and transformers' GPTQConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantailor.errors import QuantailorError, UntrustedInput, UsageError
from quantailor.formats.foreign_layer import FLOATS, Layer, Slot, Taken, check_type, from_unsigned, taken_whole
from quantailor.numerics.packing import pack, unpack, words_per_row
from quantailor.spec import Scheme

PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")
_OPTIONAL = ("g_idx", "bias")
_BITS = (2, 3, 4, 8)


def read_layers(config: Mapping[str, Any], stored: dict[str, Tensor], slots: Mapping[str, Slot]) -> Taken:
    """`config`: the folder's `quantization_config`; `stored`: every tensor by the model's own names.

    Raises: UsageError for a layout that is not read, UntrustedInput where a layer contradicts itself.
    """
    version = _version(config)
    result = Taken(rest=dict(stored))
    borrowed = all_zero = 0
    for name in sorted(key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")):
        slot = slots.get(name)
        if slot is None or slot.kind not in ("Linear", "Conv1D"):
            raise UntrustedInput(f"it quantizes {name}, which is no linear layer of this model; use a sound copy")
        taken_whole(stored, name, PARTS, _OPTIONAL)
        parts = {part: result.rest.pop(f"{name}.{part}", None) for part in PARTS}
        try:
            weight, note, odd = _weight(name, config, parts, slot, version)
        except QuantailorError:
            raise
        except ValueError as error:
            raise UntrustedInput(f"{name}: {error}; use a sound copy") from error
        borrowed, all_zero = borrowed + odd[0], all_zero + odd[1]
        result.notes += [f"{name}: {note}"] if note else []
        result.layers[name] = Layer(Scheme(weight=weight.spec), weight, parts["bias"])
    if borrowed:
        result.notes.append(
            f"{borrowed} zero points are stored as -1 (format gptq, version 1) and borrow from their neighbours: read "
            "as GPTQModel reads them; kernels that unpack field by field differ there"
        )
    if all_zero:
        result.notes.append(f"{all_zero} layers list group 0 for every input, which stands for no act-order")
    return result


def _version(config: Mapping[str, Any]) -> int:
    layout = config.get("checkpoint_format") or "gptq"
    if layout in ("gptq", "gptq_v2"):
        return 2 if layout == "gptq_v2" else 1
    raise UsageError(
        f"its GPTQ layout {str(layout)[:40]!r} is ordered for one kernel's tiles and is not read; save it again as "
        "gptq or gptq_v2 with the tool that made it"
    )


def _weight(
    name: str, config: Mapping[str, Any], parts: Mapping[str, Any], slot: Slot, version: int
) -> tuple[Any, str | None, tuple[int, int]]:
    """(packed weight, a note or None, (zero points stored as -1, 1 if the list of groups says nothing))."""
    qweight, qzeros, scales, g_idx = (parts[part] for part in ("qweight", "qzeros", "scales", "g_idx"))
    for part, tensor in (("qweight", qweight), ("qzeros", qzeros)):
        check_type(f"{name}.{part}", tensor, torch.int32)
    check_type(f"{name}.scales", scales, *FLOATS)
    if qweight.dim() != 2 or qzeros.dim() != 2 or scales.dim() != 2:
        raise ValueError("its tensors are no matrices")
    bits, left = divmod(qweight.shape[0] * 32, slot.length)
    if left or bits not in _BITS or qweight.shape[1] != slot.rows:
        raise ValueError(f"qweight {list(qweight.shape)} holds no {slot.rows} x {slot.length} integers of 2 to 8 bits")
    if bits != config.get("bits") and not config.get("dynamic"):
        raise ValueError(f"it holds {bits} bits, and the config says {config.get('bits')!r}")
    groups = scales.shape[0]
    size = _group_size(config, slot.length, groups)
    if qzeros.shape != (groups, words_per_row(slot.rows, bits)):
        raise ValueError(f"qzeros {list(qzeros.shape)} holds no {groups} x {slot.rows} zero points of {bits} bits")
    u_ON = unpack(qweight.t().contiguous(), bits, slot.length)
    whole, odd = _one_more(qzeros, bits) if version == 1 else (qzeros, 0)
    zero_GO = unpack(whole, bits, slot.rows)
    silent = 0
    if g_idx is not None and groups > 1 and not bool(g_idx.any()):
        g_idx, silent = None, 1
    weight, note = from_unsigned(u_ON, scales.t(), zero_GO.t(), bits, size, g_idx)
    return weight, note, (odd, silent)


def _group_size(config: Mapping[str, Any], length: int, groups: int) -> int | None:
    """None for one group a row. What the scales say counts where the config has rules a layer (`dynamic`)."""
    if groups == 1:
        return None
    said = config.get("group_size")
    if type(said) is int and said > 0 and -(-length // said) == groups:
        return said
    if config.get("dynamic") and length % groups == 0:
        return length // groups
    raise ValueError(f"it has {groups} groups of {length} inputs, and the config says group_size {said!r}")


def _one_more(words: Tensor, bits: int) -> tuple[Tensor, int]:
    """Packed fields plus 1 each, and how many were -1: those carry on within their word, as they had borrowed there.

    Raises: UsageError for -1 in fields that straddle words, where it cannot be told what borrowed from what.
    """
    length = words.shape[1] * 32 // bits
    fields = unpack(words, bits, length)
    odd = int((fields == 2**bits - 1).sum())
    if not odd:
        return pack(fields + 1, bits), 0
    if 32 % bits:
        raise UsageError(
            f"{odd} of its zero points of {bits} bits are stored as -1 (format gptq, version 1), which tools read in "
            "two ways; save it again as gptq_v2 with the tool that made it"
        )
    ones = pack(torch.ones(1, length, dtype=torch.uint8), bits)
    return words + ones, odd  # int32 wraps
