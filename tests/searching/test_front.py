"""The pure rules of a search, against their definitions written the slow way."""

import math
import random

import pytest

from quantailor.searching.front import Limits, Look, best, pareto, stops


def dominated(a, b):
    return all(y <= x for x, y in zip(a, b)) and b != a


@pytest.mark.parametrize("count", [0, 1, 2, 7, 60])
@pytest.mark.parametrize("levels", [3, 1000])  # many ties, and none
def test_the_front_is_what_nothing_dominates(count, levels):
    draw = random.Random(count + levels)
    for _ in range(30):
        found = [(draw.randrange(levels), draw.randrange(levels)) for _ in range(count)]
        slow = [
            i for i, p in enumerate(found) if not any(dominated(p, other) for other in found) and found.index(p) == i
        ]
        assert pareto(found) == slow


def test_the_best_is_within_the_limits_or_nearest_to_them():
    limits = Limits(loss=0.10, cost=5.0)
    assert best([(0.01, 6.0), (0.05, 5.0), (0.05, 4.0), (0.02, 5.0001)], limits) == 2, "equal losses: the cheaper"
    # over by 10 % of the cost; by (1.2 / 1.1 - 1) = 9.09 % of the loss; by both
    assert best([(0.0, 5.5), (0.2, 5.0), (0.2, 9.0)], limits) == 1
    assert limits.excess(0.2, 5.0) == pytest.approx(1.2 / 1.1 - 1)
    assert limits.excess(0.0, 5.5) == pytest.approx(0.1)
    assert limits.excess(math.nan, 1.0) == math.inf
    assert Limits(0.1).excess(0.1, 1e12) <= 0, "without a limit any cost will do"
    with pytest.raises(ValueError, match="no candidates"):
        best([], limits)


def stops_by_definition(look, others, reduction):
    """Algorithm 2: in the top 1/eta of the rung, counted with itself; no rung of fewer than eta stops anybody."""
    rung = sorted([o.loss for o in others if o.share == look.share and o.cost <= look.cost and o.steps <= look.steps])
    everyone = sorted([*rung, look.loss])
    if len(everyone) < reduction:
        return False
    return look.loss > everyone[max(1, len(everyone) // reduction) - 1]


@pytest.mark.parametrize("reduction", [2, 3, 4])
def test_stopping_is_successive_halving_among_those_that_cost_no_more(reduction):
    draw = random.Random(reduction)
    decided = set()
    for _ in range(2000):

        def one():
            return Look(draw.choice((0.25, 0.5)), draw.random(), draw.choice((1.0, 2.0)), draw.choice((10, 20)))

        look, others = one(), [one() for _ in range(draw.randrange(20))]
        expected = stops_by_definition(look, others, reduction)
        decided.add(expected)
        assert stops(look, others, reduction) == expected
    assert decided == {True, False}


def test_a_cheap_candidate_is_never_stopped_by_dear_ones():
    dear = [Look(0.5, 0.0, 2.0, 10)] * 50
    assert not stops(Look(0.5, 9.0, 1.0, 10), dear)
    assert stops(Look(0.5, 9.0, 2.0, 10), dear)
    assert not stops(Look(0.5, 9.0, 2.0, 5), dear), "nor a short run by long ones"
