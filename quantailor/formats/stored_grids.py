"""What the tensors of a quantized folder must hold for its grids, once they are known to be finite."""

from __future__ import annotations

import torch
from torch import Tensor

from quantailor.errors import UntrustedInput
from quantailor.formats import plugin
from quantailor.numerics.grids import can_be_negative
from quantailor.spec import from_json

_DTYPES = {
    "packed.q": torch.int8,
    "packed.words": torch.int32,
    "packed.zero_point": torch.uint8,
    "packed.scale_codes": torch.uint8,
    "packed.group_index": torch.int32,
    "packed.scale": torch.float32,
    "packed.scale_second": torch.float32,
    "packed.scale_mean": torch.float32,
    "input_scale": torch.float32,
    "output_scale": torch.float32,
}
_SCALES = ("packed.scale", "packed.scale_second", "input_scale", "output_scale")


def check_grids(quantization: plugin.QuantailorConfig, tensors: dict[str, Tensor]) -> None:
    """Types are those that are written, scales as their grid has them, zero points on it. All are finite already."""
    for layer, settings in quantization.layers.items():
        spec = from_json(quantization.schemes[settings["scheme"]]).weight
        bits = spec.grid.bits
        for part, dtype in _DTYPES.items():
            name = f"{layer}.{part}"
            tensor = tensors.get(name)
            if tensor is None:
                continue
            if tensor.dtype != dtype:
                raise UntrustedInput(f"{name} is of type {tensor.dtype}, and {dtype} is meant; use a sound copy")
            signed = part == "packed.scale" and can_be_negative(spec.grid)
            if part in _SCALES and tensor.numel() and not bool((tensor != 0).all() if signed else tensor.amin() > 0):
                bad = tensor[tensor == 0 if signed else tensor <= 0]
                rule = "not 0 on this grid" if signed else "positive"
                raise UntrustedInput(f"scale {name} holds {float(bad[0]):.3g}; a scale is {rule}: use a sound copy")
            if part == "packed.zero_point" and int(tensor.max()) >= 2**bits:
                raise UntrustedInput(
                    f"{name} holds {int(tensor.max())}, outside its grid of {bits} bits; use a sound copy"
                )
            if part == "packed.group_index" and not _names_groups(tensor, tensors.get(f"{layer}.packed.scale")):
                raise UntrustedInput(f"{name} lists groups that the layer has not; use a sound copy")
            if part == "packed.scale_codes" and not bool(tensor.view(torch.float8_e4m3fn).float().isfinite().all()):
                raise UntrustedInput(f"{name} holds a code that is no number; use a sound copy")

    for point in quantization.points:
        scale = tensors.get(f"{point['name']}.scale")
        if scale is not None and (scale.dtype != torch.float32 or not bool((scale > 0).all())):
            raise UntrustedInput(f"{point['name']}.scale is no positive float32; use a sound copy")


def _names_groups(index: Tensor, scale: Tensor | None) -> bool:
    """Whether a list of groups [N] names only columns of `scale` [O, G]."""
    if scale is None or scale.dim() != 2 or index.numel() == 0:
        return False
    return int(index.min()) >= 0 and int(index.max()) < scale.shape[1]
