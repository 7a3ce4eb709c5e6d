"""One layer as another tool stored it, made ours: the same integers, scales and zero points, or a reason why not.

Axes: O out, N in, G groups a row. What every reader of other tools' folders needs; a file each knows a format's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantailor.errors import UntrustedInput
from quantailor.nn.packed import PackedWeight
from quantailor.numerics.grouping import num_groups
from quantailor.numerics.packing import pack
from quantailor.recipe import in_features
from quantailor.spec import Int, PerChannel, PerGroup, QuantSpec, Scheme


@dataclass(frozen=True)
class Slot:
    """A layer of the model without weights: its type, `rows` O and `length` N."""

    kind: str
    rows: int
    length: int

    @staticmethod
    def of(kind: str, shape: tuple[int, ...]) -> Slot:
        """`shape` as the module has it."""
        length = in_features(kind, shape)
        return Slot(kind, shape[1] if kind == "Conv1D" else shape[0], length)


@dataclass(frozen=True)
class Layer:
    """What a file holds of one layer. `input_scale`: of static activations, float32 [1]."""

    scheme: Scheme
    weight: PackedWeight
    bias: Tensor | None = None
    input_scale: Tensor | None = None


@dataclass
class Taken:
    """Layers by name, the tensors that belong to none of them, and what a user should know."""

    layers: dict[str, Layer] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def spec_of(grid: Any, groups: int, group_size: int | None, indexed: bool = False) -> QuantSpec:
    """A weight's spec with `groups` scales a row."""
    if groups == 1 and not indexed:
        return QuantSpec(grid, PerChannel())
    assert group_size is not None
    return QuantSpec(grid, PerGroup(group_size, indexed=indexed))


def from_unsigned(
    u_ON: Tensor, scale_OG: Tensor, zero_OG: Tensor, bits: int, group_size: int | None, index_N: Tensor | None = None
) -> tuple[PackedWeight, str | None]:
    """A packed weight from unsigned integers 0 .. 2^bits - 1 and their zero points, x = (u - zero) * scale.

    Zero points that are all 2^(bits - 1) make the grid symmetric. `index_N`: the group of each input, where that is
    not its place. A group of scale 0 stands for zeros: it gets scale 1, and the second value says so.
    Raises: ValueError where shapes or values contradict each other.
    """
    rows, length = u_ON.shape
    groups = scale_OG.shape[1]
    if not 2 <= bits <= 8:
        raise ValueError(f"{bits} bits are none of 2 to 8")
    if scale_OG.shape != zero_OG.shape or scale_OG.shape[0] != rows or groups != num_groups(length, group_size):
        raise ValueError(
            f"scales {list(scale_OG.shape)} and zero points {list(zero_OG.shape)} are not those of {rows} rows of "
            f"{length} in groups of {group_size}"
        )
    if zero_OG.numel() and not 0 <= int(zero_OG.min()) <= int(zero_OG.max()) < 2**bits:
        raise ValueError(f"zero points {int(zero_OG.min())} .. {int(zero_OG.max())} are outside {bits} bits")
    index_N = _index(index_N, length, groups, group_size)
    scale_OG, zero_OG = scale_OG.float(), zero_OG.to(torch.int16)
    note = None
    if bool((empty_OG := scale_OG == 0).any()):
        note = f"{int(empty_OG.sum())} groups with scale 0 are zeros with scale 1"
        spread = _spread(empty_OG, length, group_size, index_N)
        u_ON = torch.where(spread, _spread(zero_OG, length, group_size, index_N), u_ON.to(torch.int16))
        scale_OG = torch.where(empty_OG, 1.0, scale_OG)
    middle = 2 ** (bits - 1)
    symmetric = bool((zero_OG == middle).all())
    spec = spec_of(Int(bits, symmetric=symmetric), groups, group_size, index_N is not None)
    weight = PackedWeight(spec, rows, length)
    if weight.is_int8:
        weight.q = (u_ON.to(torch.int16) - middle).to(torch.int8)
    else:
        weight.words = pack(u_ON, bits)
    weight.scale = scale_OG.contiguous()
    if not symmetric:
        weight.zero_point = zero_OG.to(torch.uint8).contiguous()
    if index_N is not None:
        weight.group_index = index_N.to(torch.int32)
    return weight, note


def _index(index_N: Tensor | None, length: int, groups: int, group_size: int | None) -> Tensor | None:
    """The list of groups, None where it says what the places say. Raises: ValueError where it names none."""
    if index_N is None:
        return None
    if index_N.shape != (length,) or index_N.is_floating_point():
        raise ValueError(f"its list of groups has shape {list(index_N.shape)} for {length} inputs")
    if not 0 <= int(index_N.min()) <= int(index_N.max()) < groups:
        raise ValueError(
            f"its list of groups names {int(index_N.min())} .. {int(index_N.max())}, and there are {groups} of them"
        )
    plain = torch.arange(length) // (group_size or length)
    return None if torch.equal(index_N.long(), plain) else index_N.long()


def _spread(value_OG: Tensor, length: int, group_size: int | None, index_N: Tensor | None) -> Tensor:
    return value_OG[:, torch.arange(length) // (group_size or length) if index_N is None else index_N]


def taken_whole(stored: Mapping[str, Tensor], name: str, parts: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Raises: UntrustedInput naming what of a layer is missing."""
    missing = [part for part in parts if part not in optional and f"{name}.{part}" not in stored]
    if missing:
        raise UntrustedInput(f"{name} has no {missing[0]}; download or copy the folder again")


def check_type(name: str, tensor: Tensor, *dtypes: torch.dtype, shape: tuple[int, ...] | None = None) -> None:
    """Raises: UntrustedInput unless a stored tensor is of one of these types, and of this shape."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise UntrustedInput(f"{name} is of type {tensor.dtype}, and {wanted} is meant; use a sound copy")
    if shape is not None and tuple(tensor.shape) != shape:
        raise UntrustedInput(f"{name} has shape {list(tensor.shape)}, and {list(shape)} is meant; use a sound copy")


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
