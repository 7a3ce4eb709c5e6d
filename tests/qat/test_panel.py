"""The few lines that somebody watches."""

from quantailor.qat.panel import rows
from quantailor.qat.recording import End, Head, Recording
from tests.pages.recordings import LAYERS, recording


def test_each_measure_is_a_row_with_its_way_and_its_worst_layer():
    found = {row.name: row for row in rows(recording(alarms=0, why=""))}
    assert found["training loss"].values[-1] == 0.5 and found["training loss"].text == "0.5"
    assert found["held-out score"].text == "1.5, best 1.5 at step 100"
    error = found["error of weights"]
    assert error.text == f"0.165, at most 0.53 in {LAYERS[13]}" and len(error.values) == 11
    assert found["rounding flips a step"].text.startswith("0.50%")
    assert found["smallest norm gain"].values[-1] == 1 - 100 / 120
    assert found["alarm"].text == "none" and found["alarm"].state == "good"
    assert found["end"].text == "step 100: all steps were made"


def test_alarms_are_the_last_three_in_words():
    last = [row for row in rows(recording(alarms=5)) if row.name == "alarm"]
    assert len(last) == 3 and all(row.state == "bad" for row in last) and "the gradient is not finite" in last[-1].text


def test_a_run_that_has_just_begun_shows_what_there_is():
    assert rows(Recording(Head(10, 1, (), ()))) == []
    assert [row.name for row in rows(Recording(Head(10, 1, (), ()), [End(0, "recovery>=0.1: reached")]))] == ["end"]
