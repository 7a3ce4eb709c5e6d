"""What a model weighs on disk: bytes of its weight files, and bits a weight with everything counted."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from quantailor.models.prepare import PACKED
from quantailor.nn.packed import PackedWeight


def num_weights(model: nn.Module) -> int:
    """Weights of the model as it was in float; tied ones once, integers as the weights they stand for."""
    inside: set[int] = set()
    total = 0
    for module in model.modules():
        if isinstance(module, PackedWeight):
            total += module.out_features * module.in_features
        if isinstance(module, PACKED) and module.bias is not None:
            total += module.bias.numel()
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside and not name.endswith("log_scale"):
            inside.add(id(parameter))
            total += parameter.numel()
    return total


def weight_file_bytes(folder: Path) -> int:
    """Bytes of the weight files in a model folder; probe and receipt do not count."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors") if not path.name.startswith("parity"))


def bits_per_weight(folder: Path, weights: int) -> float:
    """8 * bytes / weights: the whole file, scales, float parts and header included."""
    return 8 * weight_file_bytes(folder) / max(weights, 1)
