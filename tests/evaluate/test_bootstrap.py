import numpy as np
import pytest

from quantailor.errors import UsageError
from quantailor.evaluate import bootstrap
from quantailor.evaluate.bootstrap import interval, mean, paired_difference, perplexity


def resamples_by_definition(pairs, statistic, repeats, seed):
    """The statistic of each resample, summed unit by unit, for each pair of (sums, counts)."""
    num_units = len(pairs[0][0])
    drawn = np.random.default_rng(seed).integers(num_units, size=(repeats, num_units))
    return [
        [statistic(np.float64(sum(sums[i] for i in row)), np.float64(sum(counts[i] for i in row))) for row in drawn]
        for sums, counts in pairs
    ]


@pytest.mark.parametrize("at_once", [1, 37, 4_000_000])
@pytest.mark.parametrize("num_units", [2, 5, 40])
def test_the_interval_is_that_of_the_definition(num_units, at_once, monkeypatch):
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 20, size=num_units)
    sums = rng.gamma(2.0, size=num_units) * counts
    other = sums * rng.uniform(0.9, 1.2, size=num_units)
    (values, others) = resamples_by_definition([(sums, counts), (other, counts)], perplexity, 200, seed=3)
    monkeypatch.setattr(bootstrap, "DRAWS_AT_ONCE", at_once)  # the pieces change nothing
    got = interval(sums, counts, perplexity, repeats=200, seed=3, level=0.9)
    assert got == pytest.approx(tuple(np.quantile(values, [0.05, 0.95])))
    change, around = paired_difference((sums, counts), (other, counts), perplexity, repeats=200, seed=3, level=0.9)
    assert change == pytest.approx(np.exp(other.sum() / counts.sum()) - np.exp(sums.sum() / counts.sum()))
    assert around == pytest.approx(tuple(np.quantile(np.subtract(others, values), [0.05, 0.95])))


def test_the_interval_covers_what_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        low, high = interval(rng.normal(5.0, 2.0, size=50), np.ones(50), mean, repeats=400)
        hits += low <= 5.0 <= high
    assert 0.91 <= hits / 300 <= 0.98


def test_resampling_documents_is_wider_than_tokens_would_be():
    """20 documents whose tokens all say the same are 20 facts, not 2000."""
    means = np.random.default_rng(0).normal(size=20)
    low, high = interval(means * 100, np.full(20, 100), mean)
    token_low, token_high = interval(means.repeat(100), np.ones(2000), mean)
    assert (high - low) > 8 * (token_high - token_low)


def test_pairing_shows_small_changes():
    rng = np.random.default_rng(0)
    sums, counts = rng.gamma(2.0, size=100), np.ones(100)
    low, high = interval(sums, counts, mean)
    change, (change_low, change_high) = paired_difference((sums, counts), (sums + 0.01, counts), mean)
    assert [change, change_low, change_high] == pytest.approx([0.01] * 3)
    assert high - low > 0.1


def test_units_without_a_count_are_left_out():
    sums, counts = np.array([3.0, 0.0, 5.0, 9.0]), np.array([2, 0, 4, 3])
    assert interval(sums, counts, mean) == interval(sums[[0, 2, 3]], counts[[0, 2, 3]], mean)


def test_too_few_units_give_no_interval():
    assert np.isnan(interval([3.0], [2], mean)).all()
    assert np.isnan(interval([], [], mean)).all()
    change, around = paired_difference(([3.0], [2]), ([5.0], [2]), mean)
    assert change == 1.0 and np.isnan(around).all()


def test_infinite_sums_give_infinite_bounds_without_a_warning(recwarn):
    assert interval([1.0, np.inf], [1, 1], perplexity)[1] == np.inf
    assert interval([1e6, 2e6], [1, 1], perplexity) == (np.inf, np.inf)
    change, _ = paired_difference(([1.0, 2.0], [1, 1]), ([1.0, np.inf], [1, 1]), perplexity)
    assert change == np.inf
    assert np.isnan(paired_difference(([1.0, np.inf], [1, 1]), ([1.0, np.inf], [1, 1]), perplexity)[0])
    assert not recwarn.list


def test_settings_and_shapes_are_checked():
    for options in ({"repeats": 0}, {"level": 1.0}, {"level": 0.0}):
        with pytest.raises(UsageError, match="use at least 1 repeat"):
            interval([1.0, 2.0], [1, 1], mean, **options)
    with pytest.raises(UsageError, match="one sum and one count for each unit"):
        interval([1.0, 2.0], [1], mean)
    with pytest.raises(UsageError, match="for both of a pair"):
        paired_difference(([1.0, 2.0], [1, 1]), ([1.0], [1]), mean)
