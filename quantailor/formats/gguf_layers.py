"""A packed layer as GGUF blocks, and blocks as a packed layer: the same integers, or a reason why not.

Any symmetric integer grid of up to 4 bits fits Q4_0, up to 8 bits Q8_0, an asymmetric one of up to 4 bits Q4_1, with
the layer's scale repeated for each block of 32 in a group, a row or the tensor. The blocks hold scales in fp16: that
rounding is measured, never hidden. Axes: O out, N in, B = N / 32 blocks a row, G groups a row.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantailor.errors import UsageError
from quantailor.formats.gguf_blocks import BLOCK, Blocks
from quantailor.models.prepare import PACKED
from quantailor.models.structure import modules_of
from quantailor.nn.packed import PackedWeight
from quantailor.numerics.grids import lowest
from quantailor.numerics.grouping import per_element
from quantailor.numerics.packing import pack
from quantailor.spec import NF4, Balanced, Binary, Int, PerChannel, PerGroup, QuantSpec, Scheme, Ternary

_TOO_FAR = 0.01  # a scale that fp16 cannot hold to 1 % is no scale any more: below 2^-18 or beyond 65504
Net = TypeVar("Net", bound=nn.Module)


def why_not(scheme: Scheme, length: int) -> str | None:
    """Why GGUF cannot hold a layer of `length` inputs with its integers, and the nearest that it can; None if it can.

    >>> why_not(Scheme.parse("w4a16-g64"), 128) is None
    True
    """
    weight, activations = scheme.weight, scheme.input
    if weight is None:
        return "its weight is float while its activations are quantized, which no block says; the nearest is float"
    grid, size = weight.grid, weight.group_size
    bits = grid.bits
    if isinstance(grid, NF4):
        return "NF4's levels are a table, and blocks hold even steps; the nearest that works is w4a16-g32"
    if isinstance(grid, Balanced):
        return "the balanced grid's levels are half steps, and blocks hold whole ones; the nearest is w2a16-g32"
    if isinstance(grid, Binary):
        return "binary levels are half steps, and blocks hold whole ones; the nearest is w2a16-g32"
    if isinstance(grid, Int) and not grid.symmetric and bits > 4:
        return f"only blocks of 4 bits have an offset, not of {bits}; the nearest are w8a16-g32 and w4a16-g32-asym"
    if weight.is_indexed:
        return (
            "its groups are in act-order, and a block's 32 weights lie side by side; the nearest that works is "
            f"w{bits}a16-g{max(1, round((size or BLOCK) / BLOCK)) * BLOCK}, from the float model"
        )
    if size is not None and size < length and size % BLOCK:
        return (
            f"groups of {size} weights do not fill blocks of {BLOCK}; the nearest that works is "
            f"w{max(2, bits)}a16-g{max(1, round(size / BLOCK)) * BLOCK}"
        )
    if scheme.output is not None:
        return "it quantizes its output, which GGUF cannot say; leave the output's spec out"
    if activations is not None and not (
        activations.dynamic and activations.outliers is None and activations.grid == Int(8)
    ):
        return (
            "GGUF cannot say how activations are quantized, and llama.cpp's own way, 8 bits found at run time, is not "
            f"{scheme}'s; the nearest that works is w{max(2, bits)}a16-g32, and ONNX holds activation scales"
        )
    return None


def kind_of(spec: QuantSpec) -> str:
    """The block type for a weight that `why_not` lets pass."""
    if isinstance(spec.grid, Int) and not spec.grid.symmetric:
        return "Q4_1"
    assert isinstance(spec.grid, Int | Ternary)
    return "Q4_0" if spec.grid.bits <= 4 else "Q8_0"


@dataclass(frozen=True)
class Rounding:
    """What fp16 did to a layer: largest relative change of a scale, and of a Q4_1 offset in steps of its scale."""

    scale: float
    offset: float = 0.0

    def __str__(self) -> str:
        parts = [f"scales by up to {self.scale:.2g} of themselves"] if self.scale else []
        parts += [f"offsets by up to {self.offset:.2g} of a step"] if self.offset else []
        return f"fp16 moves {' and '.join(parts)}" if parts else "exact"


def to_blocks(weight: PackedWeight, rows: int | None = None) -> tuple[Blocks, Rounding]:
    """`weight` in blocks, its rows padded by zeros to whole ones, and zero rows added up to `rows`.

    Raises: UsageError where fp16 cannot hold a scale to 1 % and the block's integers are not all 0.
    """
    q_ON, spec = weight.integers(), weight.spec
    kind, n = kind_of(spec), weight.in_features
    length, rows = -(-n // BLOCK) * BLOCK, rows or weight.out_features
    zero = weight.zero_points()
    starts = torch.arange(0, n, BLOCK)

    def of_blocks(value_OG: Tensor) -> Tensor:
        spread = per_element(value_OG.expand(weight.out_features, -1), n, spec.group_size)
        return F.pad(spread[:, starts], (0, 0, 0, rows - weight.out_features))

    scale_OB = of_blocks(weight.scales().cpu().float())
    half_OB = scale_OB.to(torch.float16)
    zero_OB = of_blocks(zero.cpu()) if isinstance(zero, Tensor) else None
    q_ON = F.pad(q_ON.cpu(), (0, length - n, 0, 0)).to(torch.int8)
    if zero_OB is not None and length > n:  # padding stands for 0, which is at the zero point
        q_ON[:, n:] = zero_OB.repeat_interleave(BLOCK, 1)[: weight.out_features, n:].to(torch.int8)
    q_ON = F.pad(q_ON, (0, 0, 0, rows - weight.out_features))
    level_OB = 0 if zero_OB is None else zero_OB.unsqueeze(-1)
    used_OB = (q_ON.unflatten(1, (-1, BLOCK)) != level_OB).any(-1)
    change_OB = torch.where(used_OB, (half_OB.double() / scale_OB.double() - 1).abs(), 0.0)
    if bool((change_OB > _TOO_FAR).any()) or not bool(torch.isfinite(change_OB).all()):
        worst = float(scale_OB.flatten()[change_OB.nan_to_num(torch.inf).argmax()])
        raise UsageError(
            f"a scale of {worst:.3g} does not fit fp16 (6e-6 to 65504 to one percent), which is all that {kind} has; "
            "keep this layer in float by a rule, or export to a format with float32 scales"
        )
    half_OB = torch.where(used_OB, half_OB, half_OB.nan_to_num(0.0, 0.0, 0.0))
    if zero_OB is None:
        return Blocks(kind, q_ON, half_OB), Rounding(float(change_OB.max()))
    exact_OB = -zero_OB.double() * half_OB.double()
    offset_OB = exact_OB.to(torch.float16)
    moved_OB = torch.where(used_OB, (offset_OB.double() - exact_OB).abs() / half_OB.double().abs(), 0.0)
    if not bool(torch.isfinite(offset_OB).all()):
        raise UsageError(f"an offset of {float(exact_OB.abs().max()):.3g} does not fit fp16; keep this layer by a rule")
    return Blocks(kind, q_ON, half_OB, offset_OB), Rounding(float(change_OB.max()), float(moved_OB.max()))


@torch.no_grad()
def with_half_scales(model: Net) -> tuple[Net, float]:
    """A copy of a packed model whose scales are fp16 numbers, and the largest relative change of one.

    What it computes, and what is saved of it, is then what its GGUF holds, to the last bit; the integers stay. Doubly
    quantized scales (nf4-dq), which GGUF has no place for, are left alone. Raises: UsageError as `to_blocks`.
    """
    model = copy.deepcopy(model)
    largest = 0.0
    for name, module in modules_of(model, PACKED):
        if module.packed.is_double:
            continue
        scale = module.packed.scale
        half = scale.to(torch.float16).float()
        change = float((half.double() / scale.double() - 1).abs().max())
        if not change <= _TOO_FAR:
            raise UsageError(
                f"{name}: its scales of {float(scale.abs().min()):.3g} to {float(scale.abs().max()):.3g} do not fit "
                "fp16; keep this layer in float by a rule"
            )
        largest = max(largest, change)
        scale.copy_(half)
    return model, largest


def to_packed(blocks: Blocks, length: int | None = None) -> tuple[PackedWeight, str | None] | str:
    """(packed weight with exactly these integers and values, a note or None); or why no grid of ours has them.

    `length`: inputs that count, where the rest is padding. A block with scale 0 stands for zeros: it gets scale 1.
    Equal scales of neighbouring blocks become one group.
    """
    q_ON, scale_OB = blocks.q.clone(), blocks.scale.float()
    rows, n = q_ON.shape
    length = length or n
    empty_OB = scale_OB == 0
    zero_OB: Tensor | None = None
    if blocks.offset is not None:
        offset_OB = blocks.offset.float()
        steps_OB = torch.where(empty_OB, 0.0, -offset_OB / torch.where(empty_OB, 1.0, scale_OB))
        zero_OB = steps_OB.round()
        exact = (-zero_OB * scale_OB).to(torch.float16) == blocks.offset
        if not bool((exact & (zero_OB >= 0) & (zero_OB <= 15) & (scale_OB >= 0)).all()):
            return "its offsets are no whole number of steps"
    if blocks.kind == "Q8_0" and bool((scale_OB < 0).any()):
        return "it has negative scales, which an 8-bit grid has not"
    note = None
    if bool(empty_OB.any()):
        scale_OB = torch.where(empty_OB, 1.0, scale_OB)
        q_ON[empty_OB.repeat_interleave(BLOCK, 1)] = 0
        note = f"{int(empty_OB.sum())} blocks with scale 0 are zeros with scale 1"
    grid = Int(8) if blocks.kind == "Q8_0" else Int(4, symmetric=zero_OB is None)
    group = _group_size(scale_OB, zero_OB)
    spec = QuantSpec(grid, PerChannel() if group is None else PerGroup(group))
    weight = PackedWeight(spec, rows, length)
    every = slice(0, 1) if group is None else slice(None, None, group // BLOCK)
    groups = -(-length // group) if group else 1
    buffers = dict(weight.named_buffers())
    buffers["scale"].copy_(scale_OB[:, every][:, :groups])
    if zero_OB is not None:
        buffers["zero_point"].copy_(zero_OB[:, every][:, :groups])
    if "q" in buffers:
        buffers["q"].copy_(q_ON[:, :length])
    else:
        buffers["words"].copy_(pack(q_ON[:, :length].to(torch.int16) - lowest(grid), grid.bits))
    return weight, note


def _group_size(scale_OB: Tensor, zero_OB: Tensor | None) -> int | None:
    """The widest run of 32 to 256 weights, or the row (None), over which scale and zero point do not change."""
    blocks = scale_OB.shape[1]
    for run in (blocks, 8, 4, 2):
        if run > 1 and blocks % run:
            continue
        parts = [t.unflatten(1, (-1, run)) for t in (scale_OB, zero_OB) if t is not None]
        if all(bool((part == part[..., :1]).all()) for part in parts):
            return None if run == blocks else run * BLOCK
    return BLOCK
