"""Packed layers as blocks and back: the same integers for every grid that fits, a reason for every other."""

import pytest
import torch

from quantailor.errors import UsageError
from quantailor.formats.gguf_blocks import Blocks
from quantailor.formats.gguf_layers import kind_of, to_blocks, to_packed, why_not, with_half_scales
from quantailor.models.prepare import PACKED, pack_model, prepare
from quantailor.models.structure import modules_of
from quantailor.nn.packed import PackedWeight
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.numerics.grouping import per_element
from quantailor.observers.weights import weight_scale
from quantailor.recipe import Recipe
from quantailor.spec import Scheme

FITS = [
    *("w4a16-g32", "w4a16-g64", "w4a16-g128", "w4a16", "w3a16-g32", "w2a16-g32", "w8a16-g32", "w8a16", "w6a16-g64"),
    *("w4a16-g32-asym", "w3a16-g64-asym", "w4a16-asym", "w1.58a16-g32"),
]


def packed_weight(scheme, rows=6, length=128, seed=0):
    spec = Scheme.parse(scheme).weight
    weight = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed))
    quantizer = WeightQuantizer(spec, rows, length, weight.device)
    quantizer.set_scale(*weight_scale(weight, spec))
    packed = PackedWeight(spec, rows, length)
    packed.store(quantizer.integers(weight), quantizer)
    return packed


def halved(packed):
    packed.scale.copy_(packed.scale.half().float())
    return packed


@pytest.mark.parametrize("scheme", FITS)
@pytest.mark.parametrize("length", [128, 96, 172])
def test_blocks_hold_the_integers_and_the_scale_of_each(scheme, length):
    weight = packed_weight(scheme, length=length)
    blocks, rounding = to_blocks(weight)
    assert blocks.kind == kind_of(weight.spec)
    assert blocks.q.shape == (6, -(-length // 32) * 32)
    scale_ON = per_element(weight.scales(), length, weight.spec.group_size)
    zero = weight.zero_points()
    zero_ON = per_element(zero, length, weight.spec.group_size) if isinstance(zero, torch.Tensor) else None
    for row in range(6):
        for column in range(length):
            assert int(blocks.q[row, column]) == int(weight.integers()[row, column])
            assert blocks.scale[row, column // 32] == scale_ON[row, column].half()
            if zero_ON is not None:
                exact = -float(zero_ON[row, column]) * float(blocks.scale[row, column // 32])
                assert float(blocks.offset[row, column // 32]) == float(torch.tensor(exact, dtype=torch.float16))
    padding = blocks.dequantize()[:, length:]
    assert bool((padding.abs() <= rounding.offset * blocks.scale.float().abs().max()).all())
    assert 0 < rounding.scale <= 2**-11


@pytest.mark.parametrize("scheme", FITS)
@pytest.mark.parametrize("length", [128, 172])
def test_what_comes_back_is_the_same_weight(scheme, length):
    weight = halved(packed_weight(scheme, length=length))
    blocks, rounding = to_blocks(weight)
    assert rounding.scale == 0
    again, note = to_packed(blocks, length)
    assert note is None
    assert torch.equal(again.integers().int(), weight.integers().int())
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_padding_rows_are_zeros():
    blocks, _ = to_blocks(packed_weight("w4a16-g32", rows=6), rows=32)
    assert blocks.q.shape[0] == 32 and not blocks.dequantize()[6:].any() and blocks.q[:6].any()


@pytest.mark.parametrize(
    ("scheme", "length", "why"),
    [
        ("nf4", 128, "table"),
        ("nf4-dq", 128, "table"),
        ("w2a16-g32-balanced", 128, "w2a16-g32"),
        ("w1a16-g32", 128, "half steps"),
        ("w8a16-g32-asym", 128, "w8a16-g32 and w4a16-g32-asym"),
        ("w4a16-g16", 128, "w4a16-g32"),
        ("w4a16-g48", 128, "w4a16-g64"),
        ("w8a8-static", 128, "w8a16-g32"),
        ("w4a4-g32", 128, "w4a16-g32"),
        ("w8a8-outliers", 128, "w8a16-g32"),
    ],
)
def test_what_no_block_holds_is_refused_with_the_nearest(scheme, length, why):
    assert why in why_not(Scheme.parse(scheme), length)


@pytest.mark.parametrize("scheme", [*FITS, "w8a8", "w4a8-g32", "w8a8-ag64", "w1.58a8"])
def test_what_fits_is_not_refused(scheme):
    assert why_not(Scheme.parse(scheme), 128) is None


def test_a_group_wider_than_the_row_is_the_row():
    assert why_not(Scheme.parse("w4a16-g100"), 64) is None and why_not(Scheme.parse("w4a16-g100"), 128) is not None


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_a_scale_beyond_fp16_is_refused(factor):
    weight = packed_weight("w4a16-g32")
    weight.scale[2, 1] *= factor
    with pytest.raises(UsageError, match="does not fit fp16"):
        to_blocks(weight)


def test_a_scale_beyond_fp16_of_zeros_alone_is_none():
    weight = packed_weight("w8a16-g32")
    weight.q[2, 32:64] = 0
    weight.scale[2, 1] = 1e9
    blocks, rounding = to_blocks(weight)
    assert not blocks.dequantize()[2, 32:64].any() and rounding.scale <= 2**-11


def test_blocks_without_a_scale_become_zeros_with_a_note():
    blocks, _ = to_blocks(packed_weight("w4a16-g32"))
    blocks.scale[1, 2] = 0
    again, note = to_packed(blocks)
    assert note == "1 blocks with scale 0 are zeros with scale 1"
    assert torch.equal(again.dequantize(), blocks.dequantize())


def test_what_no_grid_of_ours_holds_is_said():
    q = torch.randint(0, 16, (2, 64), dtype=torch.int8)
    odd = Blocks("Q4_1", q, torch.full((2, 2), 0.25).half(), torch.full((2, 2), -0.3).half())
    assert to_packed(odd) == "its offsets are no whole number of steps"
    whole = Blocks("Q4_1", q, torch.full((2, 2), 0.25).half(), torch.full((2, 2), -0.75).half())
    again, _ = to_packed(whole)
    assert torch.equal(again.dequantize(), whole.dequantize()) and set(again.zero_points().flatten().tolist()) == {3}
    negative = Blocks("Q8_0", q, torch.full((2, 2), -0.25).half())
    assert "negative" in to_packed(negative)


def test_equal_neighbours_become_one_group():
    for scheme, size in (("w4a16-g32", 32), ("w4a16-g64", 64), ("w4a16-g128", 128), ("w4a16", None)):
        again, _ = to_packed(to_blocks(packed_weight(scheme, length=256))[0])
        assert again.spec.group_size == size


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16", "w4a16-g32-asym", "w8a8"])
def test_half_scales_change_scales_alone(scheme):
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Linear(48, 32))
    prepare(model, Recipe(Scheme.parse(scheme)))
    pack_model(model)
    half, change = with_half_scales(model)
    assert 0 < change <= 2**-11
    for (_, old), (_, new) in zip(modules_of(model, PACKED), modules_of(half, PACKED), strict=True):
        assert torch.equal(old.packed.integers(), new.packed.integers())
        assert torch.equal(old.packed.scales().half().float(), new.packed.scales())
        assert not torch.equal(old.packed.scales(), new.packed.scales())
