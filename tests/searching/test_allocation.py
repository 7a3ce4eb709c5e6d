"""The knapsack against every assignment there is."""

import itertools
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quantailor.errors import UsageError
from quantailor.searching.allocation import Option, allocate


def best_of_all(units, budget):
    """Every assignment, one after the other."""
    feasible = [
        sum(o.score for o in picked)
        for picked in itertools.product(*units)
        if sum(o.cost for o in picked) <= budget and all(o.score < float("inf") for o in picked)
    ]
    return min(feasible, default=None)


def checked(units, budget):
    found = allocate(units, budget)
    picked = [options[i] for options, i in zip(units, found.chosen)]
    assert sum(o.cost for o in picked) == found.cost <= budget
    assert found.score == pytest.approx(sum(o.score for o in picked))
    return found


option = st.builds(
    Option, st.just("w"), st.integers(0, 40), st.one_of(st.floats(0, 10, allow_subnormal=False), st.integers(-3, 3))
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5), st.integers(0, 160))
@example([[Option("w", 0, 2.2250738585072014e-308), Option("w", 1, 0.0)]], 0)
def test_it_is_the_best_of_all_assignments(units, budget):
    wanted = best_of_all(units, budget)
    if wanted is None:
        least = sum(min(o.cost for o in options) for options in units)
        with pytest.raises(UsageError, match=f"{least:,}"):
            allocate(units, budget)
    else:
        assert checked(units, budget).score == pytest.approx(wanted, rel=1e-9, abs=1e-7)


@pytest.mark.parametrize("seed", range(8))
def test_as_layers_are_bytes_in_the_millions_and_kl_from_tiny_to_large(seed):
    draw = random.Random(seed)
    units = []
    for _ in range(7):
        weights = draw.choice([768 * 768, 768 * 3072, 11008 * 4096])
        harm = 10 ** draw.uniform(-6, 0)
        units.append([Option(f"w{b}", weights * b // 8 + weights // 16, harm * 4.0**-b) for b in (2, 3, 4, 8)])
    budget = int(draw.uniform(0.35, 0.6) * sum(u[-1].cost for u in units))
    assert checked(units, budget).score == pytest.approx(best_of_all(units, budget), rel=1e-9)


def test_equal_costs_take_the_lower_score():
    units = [[Option("a", 5, 2.0), Option("b", 5, 1.0)], [Option("a", 5, 0.5), Option("b", 5, 0.5)]]
    found = checked(units, 10)
    assert found.chosen[0] == 1 and found.score == 1.5


def test_a_budget_that_is_just_met_is_met_to_the_byte():
    units = [[Option("low", 333_333_333, 1.0), Option("high", 1_000_000_007, 0.0)] for _ in range(3)]
    exact = 333_333_333 + 2 * 1_000_000_007
    assert checked(units, exact).score == 1.0
    assert checked(units, exact - 1).score == 2.0


def test_what_is_infinite_is_never_taken():
    units = [[Option("broken", 1, float("inf")), Option("sound", 9, 3.0)]]
    assert checked(units, 9).chosen == (1,)
    with pytest.raises(UsageError, match="least that these choices can cost, 9"):
        allocate(units, 8)
    with pytest.raises(UsageError, match="every score is infinite"):
        allocate([[Option("broken", 1, float("nan"))]], 8)


@pytest.mark.parametrize("cost", [-1, 1.5])
def test_costs_are_whole_and_not_negative(cost):
    with pytest.raises(UsageError, match="whole numbers"):
        allocate([[Option("w", cost, 0.0)]], 8)


def test_no_units_cost_nothing():
    assert allocate([], 0).chosen == ()


def test_a_model_of_many_layers_takes_seconds():
    draw = random.Random(0)
    units = [
        [Option(f"w{b}", 1000 * b + draw.randrange(50), draw.random() * 4.0**-b) for b in (2, 3, 4, 5, 6, 8)]
        for _ in range(300)
    ]
    budget = 4 * 1000 * 300
    found = checked(units, budget)
    # The relaxed problem's bound: no assignment of whole choices is better than its best split.
    assert found.score <= sum(o[2].score for o in units) + 1e-9 and found.cost > budget - 1000
