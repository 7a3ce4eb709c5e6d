"""Stop rules and goals, at their boundaries."""

import math

import pytest

from quantailor.errors import UsageError
from quantailor.qat.stopping import (
    Evaluated,
    Goal,
    Rule,
    Spent,
    check_goal,
    over_budget,
    parse,
    parse_goal,
    reached,
    to_stop,
    value_of,
)


def looks(scores, losses=None, errors=None):
    """Evaluations at steps 0, 10, 20 ...; losses and errors where given."""
    count = len(scores)
    losses, errors = losses or [None] * count, errors or [None] * count
    return [Evaluated(10 * i, (s,), a, e) for i, (s, a, e) in enumerate(zip(scores, losses, errors))]


def stops(text, *args, **more):
    return bool(to_stop([parse(text)], looks(*args), **more))


# ------------------------------------------------------------------------------------------------ as text


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("patience=3", Rule("patience", 3)),
        ("patience", Rule("patience", 3)),
        ("error-stable=0.1%", Rule("error-stable", 0.001)),
        ("error-stable=0.02", Rule("error-stable", 0.02)),
        ("overfit", Rule("overfit", 2)),
        ("minutes=0.5", Rule("minutes", 0.5)),
        ("tokens=1e6", Rule("tokens", 1e6)),
        ("steps=500", Rule("steps", 500)),
    ],
)
def test_rules_are_read_and_written(text, rule):
    assert parse(text) == rule and parse(str(rule)) == rule


@pytest.mark.parametrize(
    "text",
    ["", "patient=3", "patience=", "patience=0", "patience=1.5", "minutes", "minutes=-1", "steps=nan", "tokens=inf",
     "error-stable=0", "error-stable=100%", "minutes=0", "overfit=two"],
)  # fmt: skip
def test_other_rules_are_refused(text):
    with pytest.raises(UsageError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("recovery>=0.5", Goal("recovery", True, 0.5)),
        ("recovery >= 50%", Goal("recovery", True, 0.5)),
        ("perplexity<=9", Goal("perplexity", False, 9)),
        ("accuracy>=90%", Goal("accuracy", True, 0.9)),
    ],
)
def test_goals_are_read_and_written(text, goal):
    assert parse_goal(text) == goal and parse_goal(str(goal)) == goal


@pytest.mark.parametrize("text", ["", "recovery", "recovery=1", "speed>=3", "loss>=1", "recovery<=0.5", "loss<=x"])
def test_other_goals_are_refused(text):
    with pytest.raises(UsageError):
        parse_goal(text)


# ------------------------------------------------------------------------------------------------ evaluations


@pytest.mark.parametrize(
    ("scores", "ends"),
    [
        ([5, 6, 6, 6], True),  # three after the start, none better
        ([5, 6, 6], False),
        ([5, 4, 5, 5], False),
        ([5, 4, 5, 5, 5], True),
        ([5, 5, 5, 5], True),  # as good is no gain
        ([5, 6, 6, 4], False),  # the third is a gain
        ([5, math.nan, math.inf, math.nan], True),
        ([math.nan, math.nan, math.nan, 5], False),
    ],
)
def test_patience(scores, ends):
    assert stops("patience=3", scores) is ends


@pytest.mark.parametrize(
    ("scores", "losses", "ends"),
    [
        ([5, 4, 5, 6], [None, 3, 2, 1], True),
        ([5, 4, 5, 5], [None, 3, 2, 1], False),  # no worse than before
        ([5, 4, 5, 6], [None, 3, 2, 2], False),  # the training loss stands
        ([5, 6, 7], [None, 2, 1], False),  # of the start no training loss is known
        ([5, 4, 3, 2], [None, 3, 2, 1], False),
        ([5, 4, 5, 4, 5], [None, 4, 3, 2, 1], False),  # not in a row
    ],
)
def test_overfitting(scores, losses, ends):
    assert stops("overfit=2", scores, losses) is ends


@pytest.mark.parametrize(
    ("errors", "warm", "ends"),
    [
        ([1.0, 0.5, 0.5, 0.5], 0, True),
        ([0.5, 0.5, 0.5], 0, False),  # the start does not count: it stands before the warm-up's end
        ([1.0, 0.5, 0.5, 0.5], 10, False),  # nor do those in the warm-up
        ([1.0, 0.4998, 0.5, 0.5002], 0, True),  # 0.0004 of 0.5: 0.08 %
        ([1.0, 0.4997, 0.5, 0.5003], 0, False),  # 0.12 %
        ([1.0, 0.5, None, 0.5], 0, False),
    ],
)
def test_a_stable_error(errors, warm, ends):
    assert stops("error-stable=0.1%", [5] * len(errors), None, errors, warm=warm) is ends


@pytest.mark.parametrize(
    ("text", "spent", "over"),
    [
        ("steps=10", Spent(9, 0, 0), False),
        ("steps=10", Spent(10, 0, 0), True),
        ("tokens=1e3", Spent(1, 999, 0), False),
        ("tokens=1e3", Spent(1, 1000, 0), True),
        ("minutes=0.5", Spent(1, 0, 29.9), False),
        ("minutes=0.5", Spent(1, 0, 30.0), True),
        ("patience=1", Spent(10**6, 10**9, 1e9), False),
    ],
)
def test_budgets(text, spent, over):
    assert bool(over_budget([parse(text)], spent)) is over
    assert not to_stop([rule for rule in [parse(text)] if rule.name != "patience"], looks([1, 1, 1, 1, 1]))


# ------------------------------------------------------------------------------------------------ goals


def test_recovery_is_the_share_of_what_was_lost():
    goal = parse_goal("recovery>=0.5")
    assert value_of("recovery", (1.5,), (2.0,), (1.0,)) == 0.5
    assert reached(goal, (1.5,), (2.0,), (1.0,)) and not reached(goal, (1.6,), (2.0,), (1.0,))
    assert reached(goal, (2.0,), (2.0,), (2.0,)), "where nothing was lost, nothing is left to win"


def test_the_other_metrics_are_those_of_the_score():
    assert value_of("perplexity", (0.0,), (), None) == 1.0 and value_of("loss", (0.7,), (), None) == 0.7
    assert value_of("perplexity", (math.inf,), (), None) > 1e300
    assert value_of("accuracy", (-0.9, 0.3), (), None) == 0.9 and value_of("loss", (-0.9, 0.3), (), None) == 0.3
    assert reached(parse_goal("accuracy>=0.9"), (-0.9, 0.3), (), None)
    for text, score in (("accuracy>=0.9", (1.0,)), ("perplexity<=3", (-0.9, 0.3))):
        with pytest.raises(UsageError, match="has no"):
            check_goal(parse_goal(text), score)
