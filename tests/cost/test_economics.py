import math

import pytest

from quantailor.cost.economics import (
    SHARES,
    Point,
    alternatives,
    best_within,
    marginal,
    return_on,
    saving,
    split,
    sweet_spot,
)
from quantailor.errors import UsageError

GUIDE = [Point(0, 79.5), Point(80, 80.8), Point(200, 81.4), Point(400, 81.7), Point(800, 81.6)]


def test_pay_back_by_hand():
    found = return_on(cost=304, monthly_saving=100)
    assert found.payback_days == pytest.approx(30.4 * 3.04) and found.first_year == pytest.approx((1200 - 304) / 304)
    assert math.isinf(return_on(1, 0).payback_days) and return_on(0, 0).payback_days == 0
    assert saving(1000, 2) == 500 and saving(1000, 1) == 0 and saving(100, 0.5) == -100


@pytest.mark.parametrize(
    "call", [lambda: saving(1, 0), lambda: saving(-1, 2), lambda: split(-1), lambda: split(1, without=["x"])]
)
def test_impossible_amounts(call):
    with pytest.raises(UsageError):
        call()


def test_shares_are_whole_and_what_is_left_out_goes_to_the_others():
    assert sum(SHARES.values()) == pytest.approx(1)
    assert sum(split(500).values()) == pytest.approx(500) == sum(split(500, without=["qat", "data"]).values())
    assert split(1, shares={"a": 1.0}, without=["a"]) == {}


def test_marginal_gain_and_sweet_spot():
    per_unit = [m.per_unit for m in marginal(GUIDE, higher_is_better=True)]
    assert per_unit == pytest.approx([1.3 / 80, 0.6 / 120, 0.3 / 200, -0.1 / 400])
    assert sweet_spot(GUIDE, True).cost == 400  # at 200, 0.3 of 2.2 are still to be had: more than a tenth
    assert sweet_spot(GUIDE, True, noise=0.35).cost == 200 and sweet_spot(GUIDE[:1], True).cost == 0
    down = [Point(p.cost, -p.value) for p in GUIDE]
    assert sweet_spot(down, False).cost == 400 and [m.gain for m in marginal(down, False)][-1] < 0
    for bad in ([], [Point(1, 1), Point(1, 2)]):
        with pytest.raises(UsageError):
            sweet_spot(bad, True)


@pytest.mark.parametrize(("budget", "cost"), [(0, 0), (79, 0), (200, 200), (500, 400), (10_000, 400)])
def test_the_best_that_a_budget_pays_for(budget, cost):
    assert best_within(GUIDE, budget, True).cost == cost


def test_nothing_within_no_budget():
    assert best_within(GUIDE, -1, True) is None


def test_other_methods_cost_the_same_in_the_end():
    for a in alternatives(1000, 4):
        assert a.steps * a.step * 3 == pytest.approx(4000)
    assert alternatives(1000, 4, with_teacher=False)[0].steps == 1000
