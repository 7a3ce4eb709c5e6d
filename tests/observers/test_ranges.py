import math
from typing import get_args

import pytest
import torch

from quantailor.errors import UntrustedInput, UsageError
from quantailor.numerics import affine
from quantailor.observers.ranges import (
    EMA,
    KL,
    MSE,
    Histogram,
    MinMax,
    Percentile,
    divergences,
    make_observer,
    rows_that_count,
)
from quantailor.spec import Int, RangeMethod

ALL = [MinMax, EMA, Percentile, lambda: Percentile(symmetric=True), MSE, KL, Histogram]


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


@pytest.mark.parametrize("percentile", [60.0, 99.0, 99.99, 100.0])
@pytest.mark.parametrize("one_sided", [False, True])
def test_on_a_symmetric_grid_the_percentile_is_of_magnitudes(percentile, one_sided):
    """Wu et al. 2020, section 4: 99 % clips the 1 % of the largest magnitudes, on whichever side they are."""
    data = [x.relu() if one_sided else x - 0.5 for x in batches(growth=1.5)]
    observer = fed(Percentile(percentile, symmetric=True), data)
    values = torch.cat([x.flatten() for x in data]).double()
    low, high = observer.range()
    found, one_bin = max(-low, high), 2 * observer.width / observer.num_bins
    sides = [torch.quantile(values.abs(), percentile / 100, interpolation=kind).item() for kind in ("lower", "higher")]
    assert sides[0] - 1e-6 <= found <= sides[1] + 1.001 * one_bin
    assert (values.abs() > found).double().mean() <= 1 - percentile / 100 + 1e-12
    assert values.min() <= low + 1e-6 and high <= values.max() + 1e-6


def test_a_migacz_example_by_hand():
    """Slide "Candidate distribution Q": 8 bins [1, 0, 2, 3 | 5, 3, 1, 7] in 2 levels are [2, 0, 2, 2 | 4, 4, 4, 4]."""
    counts = torch.tensor([1.0, 0, 2, 3, 5, 3, 1, 7])
    p, q = counts / 22, torch.tensor([2.0, 0, 2, 2, 4, 4, 4, 4]) / 22
    filled = p > 0
    expected = (p[filled] * (p[filled] / q[filled]).log()).sum()
    torch.testing.assert_close(divergences(counts, torch.tensor([8]), 2)[0], expected.double(), rtol=1e-5, atol=0)


def migacz(counts, levels):
    """The pseudocode of "8-bit Inference with TensorRT", slide "Entropy Calibration", line by line in plain Python."""
    result = {}
    for i in range(levels, len(counts) + 1):
        reference = list(counts[:i])
        reference[i - 1] += sum(counts[i:])
        level_of = [j * levels // i for j in range(i)]
        expanded = [0.0] * i
        for level in range(levels):
            inside = [j for j in range(i) if level_of[j] == level]
            filled = [j for j in inside if counts[j] > 0]
            for j in filled:
                expanded[j] = sum(counts[k] for k in inside) / len(filled)
        total_p, total_q, divergence = sum(reference), sum(expanded), 0.0
        for p, q in zip(reference, expanded):
            if p > 0:
                divergence += p / total_p * math.log(p / total_p / (q / total_q)) if q > 0 else math.inf
        result[i] = divergence
    return result


@pytest.mark.parametrize("levels", [2, 7, 8, 16])
@pytest.mark.parametrize("gaps", [False, True])
def test_kl_is_the_published_pseudocode(levels, gaps):
    counts = (1000 * torch.exp(-torch.arange(61) / 9.0)).round()
    counts += torch.randint(0, 4, (61,))
    if gaps:
        counts[torch.rand(61) < 0.3] = 0
        counts[[0, 40]] = torch.tensor([0.0, 9.0])
    slow = migacz(counts.tolist(), levels)
    fast = divergences(counts, torch.arange(levels, 62), levels)
    torch.testing.assert_close(fast, torch.tensor(list(slow.values()), dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert any(math.isinf(d) for d in slow.values()) == gaps


@pytest.mark.parametrize("grid", [Int(8), Int(4), Int(4, narrow=True)], ids=str)
def test_kl_chooses_the_threshold_of_least_divergence(grid):
    """(m + 0.5) bins for the best m, the whole range if that is all of it; on both signs together."""
    levels, heavy = {8: 128, 4: 8 if not grid.narrow else 7}[grid.bits], torch.randn(9, 4000) ** 3
    observer = fed(KL(grid, num_bins=512), list(heavy))
    width = 2 * observer.width / 512
    counts = torch.histc(heavy.abs(), 256, 0, observer.width)
    slow = migacz(counts.tolist(), levels)
    best = min((d, i) for i, d in slow.items() if i <= int(counts.nonzero().max()) + 1)[1]
    low, high = observer.range()
    assert max(-low, high) == pytest.approx(min((best + 0.5) * width, float(heavy.abs().max())), rel=1e-6)
    assert float(heavy.abs().max()) > 1.1 * max(-low, high)  # it did clip


def test_kl_leaves_exact_zeros_out_and_keeps_what_has_no_tail():
    x = torch.randn(9, 4000).abs()
    alone, with_zeros = fed(KL(), list(x)), fed(KL(), [torch.cat([row, torch.zeros(50_000)]) for row in x])
    assert alone.range() == with_zeros.range()
    uniform = torch.rand(9, 4000)
    assert fed(KL(), list(uniform)).range()[1] > 0.98 * uniform.max()
    zeros = fed(KL(), [torch.zeros(5)])
    assert zeros.range() == (0, 0) and zeros.scale_zero_point(Int(8))[0] == 1
    with pytest.raises(UsageError, match="num_bins=256 are too few for 128 levels; use 4096"):
        KL(Int(8), num_bins=256)


def test_range_methods_differ_where_there_is_a_tail():
    """The order that their definitions give on a heavy tail: all of it, then less and less."""
    x = torch.randn(20, 5000).double().exp().pow(1.5).float() * torch.randn(20, 5000).sign()
    high = {m: float(fed(make_observer(m, Int(8)), list(x)).range()[1]) for m in ("minmax", "mse", "percentile", "kl")}
    assert high["minmax"] > high["percentile"] > high["kl"] and high["minmax"] > high["mse"]


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
    kinds = {method: make_observer(method, grid) for method in get_args(RangeMethod)}
    assert [type(o) for o in kinds.values()] == [MinMax, EMA, MSE, Percentile, KL, KL]
    assert kinds["mse"].grid is grid and (kinds["mse"].num_bins, kinds["mse"].num_ratios) == (4096, 100)
    assert kinds["kl"].levels == 8 and kinds["kl"].num_bins == 4096
    assert kinds["percentile"].percentile == 99.99 and kinds["percentile"].symmetric
    assert make_observer("percentile", Int(4, symmetric=False), 99.0).percentile == 99.0
    assert not make_observer("percentile", Int(4, symmetric=False)).symmetric


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="num_bins=6 must be a multiple of 4"):
        Histogram(6)
    for bad in (50.0, 100.1):
        with pytest.raises(UsageError, match=r"must lie in \(50, 100\]; 99.99 is usual"):
            Percentile(bad)
