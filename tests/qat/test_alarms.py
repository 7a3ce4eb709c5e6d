"""From measures to alarms: each rule at its boundary, causes before symptoms, one alarm at a time."""

import dataclasses
import math

import pytest

from quantailor.qat.alarms import ADVICE, CAUSES, GOES_BACK, SYMPTOMS, holding, newest, sentence
from quantailor.qat.recording import KINDS, Alarm, Head, Measure

HEAD = Head(1000, 10, ("a", "b", "c"), ("n", "m"))
WELL = Measure(
    1,
    1.0,
    1.0,
    1e-3,
    0,
    {"error": [0.1, 0.1, 0.1], "clip": [0.0, 0.1, 0.0], "update": [0.01, 0.01, 0.01], "drift": [0.0, 0.0, None],
     "input_drift": [None, None, 0.0], "range": [5.0, 60.0, None]},
    {"gain": [1.0, 0.5], "output": [3.0, 3.0]},
)  # fmt: skip


def at(step, *, loss=1.0, gradient=1.0, norms=None, **layers):
    """A measure like WELL but for what is given."""
    return dataclasses.replace(
        WELL, step=step, loss=loss, gradient=gradient, layers=WELL.layers | layers, norms=WELL.norms | (norms or {})
    )


def run(*changes):
    """The first measure, and one every ten steps with these changes."""
    return [WELL, *(at(10 * i, **change) for i, change in enumerate(changes, start=1))]


@pytest.mark.parametrize(
    ("kind", "change", "where"),
    [
        ("gradient", {"gradient": None}, ""),
        ("gradient", {"loss": None}, ""),
        ("rate", {"error": [0.151, 0.151, 0.1]}, ""),
        ("rate", {"update": [0.1, 0.2, 0.0]}, ""),
        ("scale", {"drift": [-1.5, 0.0, None]}, "a"),
        ("scale", {"drift": [0.0, 1.5, None]}, "b"),
        ("scale", {"input_drift": [None, None, -1.5]}, "c"),
        ("norm", {"norms": {"gain": [0.05, 0.5]}}, "n"),
        ("norm", {"norms": {"output": [3.0, 0.0]}}, "m"),
        ("range", {"range": [101.0, 60.0, None]}, "a"),
        ("range", {"range": [5.0, 241.0, None]}, "b"),
    ],
)
def test_causes_hold_from_their_limit_on(kind, change, where):
    assert [f.where for f in holding(kind, HEAD, run(change))] == [where]
    told = newest(HEAD, run({}, change), [])
    assert told is not None and (told.alarm, told.where, told.step) == (kind, where, 20)
    assert newest(HEAD, run(change, {}), []) is None, "it is the last measure that counts"


@pytest.mark.parametrize(
    "change",
    [
        {"error": [0.149, 0.149, 0.199]},
        {"update": [0.09, 0.2, 0.0]},
        {"drift": [1.3, -1.3, None]},
        {"norms": {"gain": [0.06, 0.5], "output": [0.2, 3.0]}},
        {"range": [99.0, 60.0, None]},
        {"range": [5.0, 239.0, None]},  # beyond 100, but large from the first step on
        {"range": [None, None, None]},
    ],
)
def test_below_it_all_is_well(change):
    assert newest(HEAD, run(change, change, change, change), []) is None


@pytest.mark.parametrize(
    ("kind", "change", "where"),
    [
        ("clip", {"clip": [0.0, 0.4, 0.0]}, "b"),
        ("error", {"error": [0.1, 0.2, 0.1]}, "b"),
        ("loss", {"loss": 1.5}, ""),
    ],
)
def test_symptoms_hold_three_measures_in_a_row(kind, change, where):
    assert newest(HEAD, run(change, change), []) is None
    assert newest(HEAD, run(change, {}, change, change), []) is None
    told = newest(HEAD, run(change, change, change), [])
    assert told is not None and (told.alarm, told.where) == (kind, where)


def test_a_cause_is_told_instead_of_its_symptoms():
    broken = {"drift": [-20.0, 0.0, None], "error": [1.0, 0.1, 0.1], "clip": [1.0, 0.1, 0.0], "loss": 9.0}
    measures = run(*[broken] * 4)
    told = newest(HEAD, measures, [])
    assert told is not None and told.alarm == "scale"
    # ... nor are they told afterwards, as long as it lasts
    for count in range(5, 40):
        assert newest(HEAD, run(*[broken] * count), [told]) is None


def test_after_an_alarm_there_is_quiet_and_then_another_one_may_come():
    dead, far = {"norms": {"gain": [0.0, 0.5]}}, {"range": [1000.0, 60.0, None]}
    first = newest(HEAD, run(far), [])
    assert first is not None and first.alarm == "range"
    for count in range(1, 11):
        assert newest(HEAD, run(far, *[dead] * count), [first]) is None
    later = newest(HEAD, run(far, *[dead] * 11), [first])
    assert later is not None and later.alarm == "norm"


def test_what_has_gone_and_comes_again_is_told_again():
    far = {"range": [1000.0, 60.0, None]}
    first = Alarm(10, "range", "a", 0, 1000.0, 100.0)
    assert newest(HEAD, run(far, *[{}] * 12, far), [first]) is not None
    assert newest(HEAD, run(far, *[far] * 12), [first]) is None


def test_where_something_was_done_three_measures_are_waited_for():
    fast = {"update": [0.5, 0.5, 0.5]}
    did = Alarm(10, "rate", "", 0, 0.5, 0.1, "went back")
    for count, expected in ((2, None), (3, None), (4, "rate")):
        told = newest(HEAD, run(fast, *[fast] * count), [did])
        assert (told and told.alarm) == expected


def test_what_a_lower_rate_does_not_undo_is_not_told_again():
    clipped = {"clip": [0.5, 0.1, 0.0]}
    did = Alarm(30, "clip", "a", 0, 0.5, 0.3, "lowered")
    assert all(newest(HEAD, run(*[clipped] * count), [did]) is None for count in range(4, 20))


def test_the_worst_layer_is_named_and_the_others_counted():
    told = newest(HEAD, run({"range": [500.0, 6000.0, None]}), [])
    assert told is not None and (told.where, told.others, told.value, told.limit) == ("b", 1, 6000.0, 240.0)
    scales = newest(HEAD, run({"drift": [-2.0, -3.0, None]}), [])
    assert scales is not None and scales.where == "b" and scales.value == pytest.approx(math.exp(-3))


def test_every_kind_has_its_words():
    assert set(CAUSES) | set(SYMPTOMS) == set(KINDS) == set(ADVICE) and set(GOES_BACK) < set(CAUSES)
    for kind in KINDS:
        for action in ("told", "lowered", "went back", "stopped"):
            text = sentence(Alarm(7, kind, "a.b", 2, None if kind == "gradient" else 0.5, 0.25, action))
            assert text.startswith("step 7: ") and "{" not in text and "(and 2 more); " in text
