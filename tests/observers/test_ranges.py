import math

import pytest
import torch

from quantailor.errors import UntrustedInput, UsageError
from quantailor.numerics import affine
from quantailor.observers.ranges import EMA, MSE, Histogram, MinMax, Percentile, make_observer, rows_that_count
from quantailor.spec import Int

ALL = [MinMax, EMA, Percentile, MSE, Histogram]


def batches(num=7, shape=(4, 9, 16), growth=3.0):
    """Each batch wider than the last, but for one."""
    return [torch.randn(shape).mul(growth ** ((i * 3) % num - 2)).add(0.3 * i) for i in range(num)]


def fed(observer, data, mask=None):
    for x in data:
        observer.observe(x, mask)
    return observer


def test_min_max_is_of_all_that_was_seen():
    data = batches()
    low, high = fed(MinMax(), data).range()
    assert low == min(float(x.min()) for x in data) and high == max(float(x.max()) for x in data)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_ema_is_a_weighted_mean_of_each_batch_s_ends(decay):
    data = batches()
    low, high = data[0].min(), data[0].max()
    for x in data[1:]:
        low, high = decay * low + (1 - decay) * x.min(), decay * high + (1 - decay) * x.max()
    found = fed(EMA(decay), data).range()
    torch.testing.assert_close(found, (low, high))


def test_a_histogram_widens_without_losing_a_count():
    """Values that are never near an edge, however often bins merge."""
    data = [(torch.randint(-(2**i), 2**i, (3, 50)) + 0.5) for i in (3, 1, 0, 6, 9, 2)]
    observer = fed(Histogram(num_bins=64), data)
    values = torch.cat([x.flatten() for x in data]).double()
    assert observer.counts.sum() == values.numel()
    width = 2 * observer.width / 64
    index = ((values + observer.width) / width).floor().long().clamp(max=63)
    assert torch.equal(observer.counts, torch.bincount(index, minlength=64).double())
    torch.testing.assert_close(observer.centers, -observer.width + width * (torch.arange(64).double() + 0.5))
    assert observer.range() == (values.min(), values.max())


def test_zeros_before_the_first_value_count_as_zeros():
    observer = fed(Histogram(num_bins=8), [torch.zeros(5), torch.ones(2), torch.full((1,), -3.0)])
    assert observer.counts.tolist() == [0, 1, 0, 0, 5, 0, 2, 0] or observer.counts.sum() == 8
    assert observer.counts[4:].sum() == 7 and observer.width == 4.0


@pytest.mark.parametrize("percentile", [60.0, 90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_percentile_is_torch_quantile_within_a_bin(percentile, asymmetric):
    data = [x.exp() if asymmetric else x for x in batches(growth=1.5)]
    observer = fed(Percentile(percentile), data)
    values = torch.cat([x.flatten() for x in data]).double()
    tail = (1 - percentile / 100) / 2
    low, high = observer.range()
    one_bin = 2 * observer.width / observer.num_bins
    # Between two values quantile interpolates; the values on both sides bound it.
    for found, q in ((low, tail), (high, 1 - tail)):
        sides = [torch.quantile(values, q, interpolation=kind).item() for kind in ("lower", "higher")]
        assert sides[0] - 1.001 * one_bin <= found <= sides[1] + 1.001 * one_bin
    outside = ((values < low) | (values > high)).double().mean()
    assert outside <= 2 * tail + 1e-12
    assert values.min() <= low + 1e-6 and high <= values.max() + 1e-6


def squared_error(x, weights, low, high, grid):
    scale, zero_point = affine.scale_zero_point(low, high, grid.qmin, grid.qmax, grid.symmetric)
    q = affine.quantize(x, scale, zero_point, grid.qmin, grid.qmax)
    return float(((affine.dequantize(q, scale, zero_point) - x).double().square() * weights).sum())


@pytest.mark.parametrize("grid", [Int(8), Int(4), Int(2), Int(8, symmetric=False), Int(3, symmetric=False)], ids=str)
@pytest.mark.parametrize("bins, ratios", [(4096, 100), (16384, 400), (64, 7)])
def test_mse_is_the_best_of_its_candidates(grid, bins, ratios):
    data = [x.abs() + x / 2 for x in batches(num=4, growth=1.2)]  # lopsided, with a tail
    observer = fed(MSE(grid, bins, ratios), data)
    low, high = observer.range()
    ends = min(float(x.min()) for x in data), max(float(x.max()) for x in data)
    candidates = torch.linspace(1.0, 0.2, ratios)
    centers = observer.centers.float()
    errors = [squared_error(centers, observer.counts, ends[0] * r, ends[1] * r, grid) for r in candidates]
    assert squared_error(centers, observer.counts, low, high, grid) <= min(errors) * (1 + 1e-5)
    assert any(low == ends[0] * r and high == ends[1] * r for r in candidates)
    if bins > 64:  # on the values themselves, not their bins
        values = torch.cat([x.flatten() for x in data])
        best = min(squared_error(values, torch.ones(()), ends[0] * r, ends[1] * r, grid) for r in candidates)
        assert squared_error(values, torch.ones(()), low, high, grid) <= best * 1.05


@pytest.mark.parametrize("make", ALL)
def test_padding_never_counts(make):
    data = batches(growth=1.0)
    mask = torch.rand(4, 9) > 0.4
    poisoned = []
    for i, x in enumerate(data):
        x = x.clone()
        x[~mask] = math.nan if i % 2 else 1e9
        poisoned.append(x)
    alone = fed(make(), [x[mask] for x in data])
    for numbers in (mask, mask.long()):
        padded = fed(make(), poisoned, numbers)
        assert padded.range() == alone.range() and padded.rejected == 0
    flattened = fed(make(), [x.flatten(0, 1) for x in poisoned], mask)
    assert flattened.range() == alone.range()


def test_rows_that_count():
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    kept = torch.stack([x[0, 0], x[0, 1], x[1, 0]])
    assert torch.equal(rows_that_count(x, mask), kept)
    assert torch.equal(rows_that_count(x.flatten(0, 1), mask), kept)
    assert torch.equal(rows_that_count(x, None), x.flatten(0, 1))
    heads = torch.randn(2, 3, 5, 4)
    assert torch.equal(rows_that_count(heads, mask), heads[mask.bool()].flatten(0, 1))
    pooled = torch.randn(2, 3)  # [B, N] with as many features as tokens: the mask is not of these rows
    assert torch.equal(rows_that_count(pooled, mask), pooled)
    assert rows_that_count(torch.randn(7, 4), mask).shape == (7, 4)
    assert rows_that_count(torch.randn(4), None).shape == (1, 4)
    assert rows_that_count(x, torch.zeros(2, 3)).shape == (0, 4)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_not_finite_is_left_out_and_counted(make, bad):
    good = torch.randn(3, 8)
    broken = good.clone() * 100
    broken[1, 2] = bad
    observer = fed(make(), [good] * 99 + [broken])
    assert (observer.batches, observer.rejected) == (100, 1)
    assert observer.range() == fed(make(), [good] * 99).range()
    observer.observe(broken)
    with pytest.raises(UntrustedInput) as error:
        observer.range()
    assert str(error.value).startswith(
        "2 of 101 calibration batches held NaN or Inf activations (limit 1 %); check the"
    )
    with pytest.raises(UntrustedInput, match="1 of 1 calibration batches"):
        fed(make(), [broken]).range()


@pytest.mark.parametrize("make", ALL)
def test_seeing_nothing_is_an_error(make):
    observer = fed(make(), [torch.zeros(0, 4)])
    observer.observe(torch.randn(2, 3, 4), torch.zeros(2, 3))  # all padding
    assert observer.batches == 0
    with pytest.raises(UntrustedInput, match="an observer saw no data; calibrate with at least one sample"):
        observer.scale_zero_point(Int(8))


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("value", [0.0, 1e-45, 2.5, -1e30])
def test_constants_of_any_size_have_a_usable_scale(make, value):
    observer = fed(make(), [torch.full((2, 5), value)] * 3)
    for grid in (Int(8), Int(2), Int(4, symmetric=False)):
        scale, zero_point = observer.scale_zero_point(grid)
        affine.checked_scale(scale)
        x = torch.tensor([value, 0.0])
        q = affine.quantize(x, scale, zero_point, grid.qmin, grid.qmax)
        error = (affine.dequantize(q, scale, zero_point) - x).abs()
        assert error[1] == 0 and error[0] <= max(float(scale) / 2 * 1.001, 1e-44)


def test_each_range_method_has_its_observer():
    grid = Int(4)
    kinds = {method: make_observer(method, grid) for method in ("minmax", "ema", "percentile", "mse", "histogram")}
    assert [type(o) for o in kinds.values()] == [MinMax, EMA, Percentile, MSE, MSE]
    assert kinds["mse"].grid is grid and (kinds["mse"].num_bins, kinds["mse"].num_ratios) == (4096, 100)
    assert (kinds["histogram"].num_bins, kinds["histogram"].num_ratios) == (16384, 400)
    assert kinds["percentile"].percentile == 99.99


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="num_bins=6 must be a multiple of 4"):
        Histogram(6)
    for bad in (50.0, 100.1):
        with pytest.raises(UsageError, match=r"must lie in \(50, 100\]; 99.99 is usual"):
            Percentile(bad)
