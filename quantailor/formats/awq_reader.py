"""AWQ folders (AutoAWQ, llm-awq through it, transformers): `quant_method: awq`, `version: gemm`.

    LAYER.qweight int32 [N, O / 8]    eight 4-bit integers a word, along the outputs, in the order 0 2 4 6 1 3 5 7
    LAYER.qzeros  int32 [G, O / 8]    zero points, packed alike
    LAYER.scales  float16 [G, O]      x = (u - zero) * scale,  groups of inputs in turn

Source: arXiv:2306.00978 and the documentation and packing code of AutoAWQ (WQLinear_GEMM).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantailor.errors import QuantailorError, UntrustedInput, UsageError
from quantailor.formats.foreign_layer import FLOATS, Layer, Slot, Taken, check_type, from_unsigned, taken_whole
from quantailor.numerics.packing import unpack
from quantailor.spec import Scheme

PARTS = ("qweight", "qzeros", "scales", "bias")
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # field i of a word is output 8 * word + _ORDER[i]
_BITS = 4


def read_layers(config: Mapping[str, Any], stored: dict[str, Tensor], slots: Mapping[str, Slot]) -> Taken:
    """`config`: the folder's `quantization_config`; `stored`: every tensor by the model's own names.

    Raises: UsageError for a layout that is not read, UntrustedInput where a layer contradicts itself.
    """
    layout = str(config.get("version") or config.get("format") or "gemm").lower()
    if layout != "gemm":
        raise UsageError(
            f"its AWQ layout {layout[:40]!r} is not read, only gemm; save it again as gemm with the tool that made it"
        )
    bits = config.get("bits", config.get("w_bit"))
    if bits != _BITS:
        raise UsageError(f"AWQ with bits={str(bits)[:20]} is not read: the gemm layout is defined for 4")
    size = config.get("group_size", config.get("q_group_size"))
    result = Taken(rest=dict(stored))
    for name in sorted(key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")):
        slot = slots.get(name)
        if slot is None or slot.kind not in ("Linear", "Conv1D"):
            raise UntrustedInput(f"it quantizes {name}, which is no linear layer of this model; use a sound copy")
        taken_whole(stored, name, PARTS, ("bias",))
        parts = {part: result.rest.pop(f"{name}.{part}", None) for part in PARTS}
        try:
            weight, note = _weight(name, parts, slot, size)
        except QuantailorError:
            raise
        except ValueError as error:
            raise UntrustedInput(f"{name}: {error}; use a sound copy") from error
        result.notes += [f"{name}: {note}"] if note else []
        result.layers[name] = Layer(Scheme(weight=weight.spec), weight, parts["bias"])
    return result


def _weight(name: str, parts: Mapping[str, Any], slot: Slot, size: Any) -> tuple[Any, str | None]:
    if slot.rows % 8:
        raise ValueError(f"its {slot.rows} outputs are no whole words of 8")
    check_type(f"{name}.qweight", parts["qweight"], torch.int32, shape=(slot.length, slot.rows // 8))
    check_type(f"{name}.scales", parts["scales"], *FLOATS)
    if parts["scales"].dim() != 2:
        raise ValueError("its scales are no matrix")
    groups = parts["scales"].shape[0]
    check_type(f"{name}.qzeros", parts["qzeros"], torch.int32, shape=(groups, slot.rows // 8))
    if groups > 1 and (type(size) is not int or size <= 0 or -(-slot.length // size) != groups):
        raise ValueError(f"it has {groups} groups of {slot.length} inputs, and the config says group_size {size!r}")
    u_ON = _in_turn(parts["qweight"]).t()
    return from_unsigned(u_ON, parts["scales"].t(), _in_turn(parts["qzeros"]).t(), _BITS, size if groups > 1 else None)


def _in_turn(words: Tensor) -> Tensor:
    """[R, O / 8] words -> [R, O] integers, outputs in their own order."""
    fields = unpack(words, _BITS, words.shape[1] * 8).unflatten(1, (-1, 8))
    result = torch.empty_like(fields)
    result[..., list(_ORDER)] = fields
    return result.flatten(1)
