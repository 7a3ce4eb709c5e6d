"""What a model weighs on disk under a recipe, scales and zero points included, from names and shapes alone.

    bytes = sum over quantized weights of (numel * bits / 8 + scales * 2 + zero points) + float parts in their own type

Scales are stored in 16 bits (bfloat16 or float16, as the saved layouts do), zero points in the weight's own bits, NF4's
doubly quantized scales in 8 bits and a float32 for each 256 of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from quantailor.recipe import Inventory, in_features
from quantailor.spec import NF4, Int, PerTensor, QuantSpec

SCALE_BYTES = 2


@dataclass(frozen=True)
class Storage:
    """Bytes on disk: of integers, of scales and zero points, and of what stays float."""

    integers: int
    scales: int
    floats: int
    num_weights: int
    float_bytes: int  # of the whole model before

    @property
    def total(self) -> int:
        return self.integers + self.scales + self.floats

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total / max(1, self.num_weights)

    def to_json(self) -> dict[str, Any]:
        return {
            "integers": self.integers,
            "scales": self.scales,
            "floats": self.floats,
            "total": self.total,
            "float_model": self.float_bytes,
            "bits_per_weight": self.bits_per_weight,
            "basis": "counted",
        }


def weight_bytes(spec: QuantSpec, rows: int, length: int) -> tuple[int, int]:
    """(integers, scales and zero points) of one weight [rows, length], in bytes.

    >>> from quantailor.spec import Scheme
    >>> weight_bytes(Scheme.parse("w4a16-g128").weight, 4096, 4096)
    (8388608, 262144)
    """
    size = spec.group_size or length
    groups = 1 if isinstance(spec.granularity, PerTensor) else rows * math.ceil(length / size)
    scales = groups * SCALE_BYTES
    if isinstance(spec.grid, NF4) and spec.grid.double_quant:
        scales = groups + 4 * math.ceil(groups / 256) + 4
    if isinstance(spec.grid, Int) and not spec.grid.symmetric:
        scales += math.ceil(groups * spec.grid.bits / 8)
    return math.ceil(rows * length * spec.grid.bits / 8), scales


def storage(inventory: Inventory, bytes_per_float: int) -> Storage:
    """Of a model whose float parts take `bytes_per_float` each. Tied weights count once."""
    integers = scales = floats = weights = 0
    for entry in inventory:
        if entry.tied_to is not None:
            continue
        weights += entry.num_weights
        spec = entry.scheme.weight if entry.scheme else None
        if spec is None:
            floats += entry.num_weights * bytes_per_float
            continue
        length = entry.shape[1] if entry.kind == "Embedding" else in_features(entry.kind, entry.shape)
        numel = math.prod(entry.shape)
        whole, extra = weight_bytes(spec, numel // length, length)
        integers, scales = integers + whole, scales + extra
        floats += (entry.num_weights - numel) * bytes_per_float  # its bias
    return Storage(integers, scales, floats, weights, weights * bytes_per_float)


def of_parameters(parameters: float, bits: float, group_size: int | None = None) -> tuple[float, float]:
    """(bytes, overhead in bytes) of that many parameters, all quantized: the arithmetic of a back of an envelope.

    >>> of_parameters(100e9, 32), of_parameters(100e9, 8), of_parameters(100e9, 4, 128)
    ((400000000000.0, 0.0), (100000000000.0, 0.0), (50000000000.0, 1562500000.0))
    """
    overhead = parameters / group_size * SCALE_BYTES if group_size else 0.0
    return parameters * bits / 8, overhead
