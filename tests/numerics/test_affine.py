import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantailor.numerics.affine import (
    checked_scale,
    dequantize,
    fake_quantize,
    fake_quantize_dynamic,
    outlier_columns,
    quantize,
    quantize_dynamic,
    scale_zero_point,
    straight_through,
)
from quantailor.spec import Int

GRIDS = [Int(b, symmetric=s) for b in range(2, 9) for s in (True, False)] + [Int(b, narrow=True) for b in (2, 4, 8)]


def reals(rng, scale, zero_point, grid, n):
    """Values inside the range, beyond it, on the levels and exactly half way between two."""
    low, high = (grid.qmin - zero_point - 3), (grid.qmax - zero_point + 3)
    x = torch.empty(n).uniform_(low, high)
    integers = torch.arange(n) % (high - low) + low
    x = torch.where(torch.arange(n) % 4 == 1, integers.float(), x)
    x = torch.where(torch.arange(n) % 4 == 2, integers + 0.5, x) * scale
    x[0], x[-1] = rng.choice([0.0, -0.0]), rng.uniform(-1e3, 1e3) * float(torch.as_tensor(scale).flatten()[-1])
    return x


def backward(function, x):
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    y.backward(torch.arange(1.0, y.numel() + 1).view_as(y))
    return y.detach(), leaf.grad


def test_bit_identical_to_torch_per_tensor():
    """5000 scales and zero points, forward and backward."""
    rng = random.Random(0)
    for case in range(5000):
        grid = GRIDS[case % len(GRIDS)]
        zero_point = rng.randint(grid.qmin, grid.qmax)
        scale = torch.tensor(rng.uniform(1, 10) * 10.0 ** rng.randint(-8, 6))
        x = reals(rng, scale, zero_point, grid, 32)
        ours = backward(lambda t: fake_quantize(t, scale, zero_point, grid.qmin, grid.qmax), x)  # noqa: B023
        s = float(scale)
        theirs = backward(lambda t: torch.fake_quantize_per_tensor_affine(t, s, zero_point, grid.qmin, grid.qmax), x)  # noqa: B023
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]), (grid, scale, zero_point)
        q = quantize(x, scale, zero_point, grid.qmin, grid.qmax)
        assert torch.equal(dequantize(q, scale, zero_point), theirs[0])


def test_bit_identical_to_torch_per_channel():
    """500 tensors of 10 channels, along the first or the last axis."""
    rng = random.Random(0)
    for case in range(500):
        grid, axis = GRIDS[case % len(GRIDS)], case % 2
        zero_point = torch.tensor([rng.randint(grid.qmin, grid.qmax) for _ in range(10)], dtype=torch.int32)
        scale = torch.tensor([rng.uniform(1, 10) * 10.0 ** rng.randint(-8, 6) for _ in range(10)])
        x = torch.stack([reals(rng, s, int(z), grid, 24) for s, z in zip(scale, zero_point)])
        s, z = scale[:, None], zero_point[:, None]
        if axis:
            x, s, z = x.T.contiguous(), s.T, z.T
        ours = backward(lambda t: fake_quantize(t, s, z, grid.qmin, grid.qmax), x)  # noqa: B023
        theirs = backward(
            lambda t: torch.fake_quantize_per_channel_affine(t, scale, zero_point, axis, grid.qmin, grid.qmax),  # noqa: B023
            x,
        )
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]), (grid, case)


def test_the_worked_example():
    """Integers are rounded once and saturate: neither truncated to -124 nor wrapped around at 212."""
    x, scale = torch.tensor([-0.523, 0.891, 0.0, 0.0021, -0.0063]), torch.tensor(0.0042)
    assert quantize(x, scale, 0, -128, 127).tolist() == [-125, 127, 0, 0, -2]  # half to even: 0.5 -> 0, -1.5 -> -2


def test_integers_have_the_smallest_type_that_holds_them():
    assert quantize(torch.ones(1), torch.ones(1), 0, 0, 255).dtype == torch.uint8
    assert quantize(torch.ones(1), torch.ones(1), 0, 0, 127).dtype == torch.int8


floats = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(GRIDS), floats, floats)
def test_zero_is_always_a_level_and_the_range_is_covered(grid, a, b):
    low, high = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    scale, zero_point = scale_zero_point(low, high, grid.qmin, grid.qmax, grid.symmetric)
    assert scale > 0 and torch.isfinite(scale.reciprocal()) and grid.qmin <= int(zero_point) <= grid.qmax
    assert zero_point.dtype == torch.int32 and scale.dtype == torch.float32
    if grid.symmetric:
        assert int(zero_point) == 0
    if max(abs(a), abs(b)) < 2**-100:
        return  # may count as zero: below
    x = torch.stack([torch.tensor(0.0), low, high])
    x_hat = dequantize(quantize(x, scale, zero_point, grid.qmin, grid.qmax), scale, zero_point)
    assert x_hat[0] == 0
    # Half a step of rounding, another half at an end: the zero point's rounding, or the symmetric grid's missing level.
    assert ((x_hat - x).abs() <= scale * 1.001).all()


def test_symmetric_scales_are_those_of_compressed_tensors():
    scale, _ = scale_zero_point(torch.tensor([-1.0, -3.0]), torch.tensor([2.0, 1.0]), -8, 7, symmetric=True)
    assert torch.equal(scale, torch.tensor([2 / 7.5, 3 / 7.5]))
    scale, zero_point = scale_zero_point(torch.tensor([-1.0, 2.0]), torch.tensor([2.0, 3.0]), 0, 15, symmetric=False)
    assert torch.equal(scale, torch.tensor([3 / 15, 3 / 15])) and zero_point.tolist() == [5, 0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_ranges_of_no_width_and_of_every_width(grid):
    tiny = torch.finfo(torch.float32).smallest_normal
    low = torch.tensor([0.0, 0.0, -1e-45, 5.0, -5.0, -tiny, -3e38, 0.0, -3e38])
    high = torch.tensor([0.0, 1e-45, 0.0, 5.0, -5.0, tiny, 3e38, 3e38, 0.0])
    scale, zero_point = scale_zero_point(low, high, grid.qmin, grid.qmax, grid.symmetric)
    checked_scale(scale)
    assert scale[:3].tolist() == [1.0, 1.0, 1.0]
    for x in (low, high, torch.zeros_like(low)):
        x_hat = dequantize(quantize(x, scale, zero_point, grid.qmin, grid.qmax), scale, zero_point)
        assert torch.isfinite(x_hat).all()
    constant = dequantize(quantize(high, scale, zero_point, grid.qmin, grid.qmax), scale, zero_point)[3:5]
    assert ((constant - high[3:5]).abs() <= scale[3:5] / 2 * 1.001).all()


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_is_finite_and_positive(bad):
    with pytest.raises(ValueError, match="scale must be finite and positive; its minimum is"):
        checked_scale(torch.tensor([1.0, bad]))
    good = torch.tensor([1e-38, 1e38])
    assert checked_scale(good) is good


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(GRIDS), st.integers(0, 2**31), st.floats(2**-20, 2**20, width=32))
def test_idempotent_monotone_symmetric_and_the_same_for_each_channel(grid, seed, scale):
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed)) * scale * 2 ** (grid.bits - 1)
    zero_point = 0 if grid.symmetric else seed % (grid.qmax + 1)
    step = torch.tensor(scale)
    q = quantize(x, step, zero_point, grid.qmin, grid.qmax)
    x_hat = dequantize(q, step, zero_point)
    assert torch.equal(quantize(x_hat, step, zero_point, grid.qmin, grid.qmax), q)
    assert (q.flatten()[x.flatten().argsort()].int().diff() >= 0).all()
    inside = (q > grid.qmin) & (q < grid.qmax)
    assert ((x_hat - x).abs()[inside] <= step / 2 * 1.0001).all()
    if grid.symmetric:
        same = inside | grid.narrow  # the lowest level has no mirror image
        assert torch.equal(quantize(-x, step, 0, grid.qmin, grid.qmax)[same], -q[same])
    order = torch.randperm(5)
    assert torch.equal(quantize(x[order], step, zero_point, grid.qmin, grid.qmax), q[order])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dynamic_scales_are_found_a_row_at_a_time(bits, dtype):
    grid = Int(bits)
    x = torch.randn(3, 5, 17).mul(torch.logspace(-3, 3, 15).view(3, 5, 1)).to(dtype)
    x[1, 2] = 0
    q, scale = quantize_dynamic(x, grid.qmin, grid.qmax)
    assert q.dtype == torch.int8 and scale.shape == (3, 5, 1) and scale.dtype == torch.float32
    for index in [(i, j) for i in range(3) for j in range(5)]:
        row = x[index].float()
        step = row.abs().max() / ((grid.qmax - grid.qmin) / 2) if row.any() else torch.tensor(1.0)
        assert scale[index].item() == step
        assert torch.equal(q[index], torch.round(row / step).clamp(grid.qmin, grid.qmax).to(torch.int8))
    y, gradient = backward(lambda t: fake_quantize_dynamic(t, grid.qmin, grid.qmax), x)
    assert torch.equal(y, (q * scale).to(dtype))
    assert torch.equal(gradient, torch.arange(1.0, y.numel() + 1).view_as(y).to(dtype))  # the identity
    assert ((q * scale - x.float()).abs() <= scale * 0.501).all()


@pytest.mark.parametrize("size", [1, 5, 17, 40])
def test_dynamic_groups_are_tokens_of_their_own(size):
    x = torch.randn(3, 5, 17).mul(torch.logspace(-3, 3, 17))
    x[1, 2, :5] = 0
    q, scale = quantize_dynamic(x, -8, 7, size)
    assert q.dtype == torch.int8 and scale.shape == (3, 5, -(-17 // size))
    for group, start in enumerate(range(0, 17, size)):
        run = slice(start, start + size)
        alone_q, alone_scale = quantize_dynamic(x[..., run], -8, 7)
        assert torch.equal(q[..., run], alone_q) and torch.equal(scale[..., group : group + 1], alone_scale)


def test_outlier_columns_by_loops():
    x = torch.randn(4, 3, 20) * 3
    expected = [n for n in range(20) if any(abs(float(v)) >= 6 for v in x[..., n].flatten())]
    assert 0 < len(expected) < 20 and outlier_columns(x, 6.0).tolist() == expected
    assert outlier_columns(torch.tensor([[6.0, 5.9999995, -6.0]]), 6.0).tolist() == [0, 2]
    assert outlier_columns(torch.zeros(0, 5), 6.0).tolist() == outlier_columns(x, 1e9).tolist() == []


def test_straight_through_has_one_s_value_and_the_other_s_gradient():
    x, x_hat = torch.randn(3, 4), torch.randn(3, 4)
    y, gradient = backward(lambda t: straight_through(t, x_hat), x)
    assert torch.equal(y, x_hat) and torch.equal(gradient, torch.arange(1.0, 13).view(3, 4))
