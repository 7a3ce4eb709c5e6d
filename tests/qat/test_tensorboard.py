"""Scalars for TensorBoard, read back by its own reader."""

import importlib.util
import math

import pytest

from quantailor.errors import UsageError
from quantailor.qat.recording import Recording
from quantailor.qat.tensorboard import Scalars, scalars
from tests.pages.recordings import LAYERS, recording

installed = importlib.util.find_spec("tensorboard") is not None


def told(folder, found):
    with Scalars(folder) as writer:
        partly = Recording(found.head)
        for line in found.lines:
            partly.lines.append(line)
            writer(partly)


@pytest.mark.skipif(not installed, reason="tensorboard, an extra, is not installed")
def test_what_is_written_is_read_by_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = recording()
    told(tmp_path, found)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    expected = [(m.step, m.layers["error"][13]) for m in found.measures]
    assert read[f"error/{LAYERS[13]}"] == [(step, pytest.approx(value)) for step, value in expected]
    assert read["held_out/score"] == [(0, 2.5), (50, 2.0), (100, 1.5)]
    assert read["training/loss"][-1] == (100, 0.5) and read["alarms/error"] == [(20, 1.0)]
    assert read["input_clip/all"][0] == (1, pytest.approx(0.01)), "of the one layer that has it"


@pytest.mark.skipif(not installed, reason="tensorboard, an extra, is not installed")
def test_a_run_that_goes_on_hides_what_the_dead_one_wrote_behind_its_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = recording(alarms=0)
    told(tmp_path, found)
    with Scalars(tmp_path) as writer:
        partly = Recording(found.head, [line for line in found.lines if line.step <= 50])
        for line in [line for line in found.lines if line.step > 50]:
            partly.lines.append(line)
            writer(partly)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.step for e in events.Scalars("training/loss")] == [m.step for m in found.measures]


def test_tags_are_those_of_the_last_line_and_only_of_known_numbers():
    found = recording()
    for count in range(1, len(found.lines) + 1):
        for tag, value in scalars(Recording(found.head, found.lines[:count])):
            assert math.isfinite(value) and tag.count("/") == 1


def test_without_the_extra_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'quantailor\[tensorboard\]'"):
        Scalars(tmp_path)
