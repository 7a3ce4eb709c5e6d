"""The file of a recording: what is written is read, nothing else is, and a kill costs the torn line only."""

import json
import os

import pytest

from quantailor.errors import UntrustedInput
from quantailor.qat.recording import Alarm, End, Head, Look, Measure, Recording, Tape, read, rounded
from quantailor.store.publish import DiskFull

HEAD = Head(20, 5, ("a", "b"), ("n",))
LINES = [
    Look(0, (2.5,), None, ((0.25, 0.75), None)),
    Measure(1, 0.5, None, 1e-3, 64, {"error": [0.1, None]}, {"gain": [1.0]}),
    Alarm(5, "range", "b", 1, 1e4, 100.0, "went back"),
    Look(10, (None, 0.3), 0.4, ((0.5, 0.5), None)),
    End(20, ""),
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "recording.jsonl"


@pytest.fixture
def tape(path):
    tape = Tape(HEAD, path)
    for line in LINES:
        tape.add(line)
    return tape


def test_what_is_written_is_read(tape, path):
    found = read(path)
    assert found.head == HEAD and found.lines == LINES and found.to_bytes() == path.read_bytes()
    assert (len(found.measures), len(found.looks), len(found.alarms), found.end) == (1, 2, 1, LINES[-1])


def test_listeners_hear_each_line():
    seen = []
    tape = Tape(HEAD, None, [lambda recording: seen.append(recording.lines[-1])])
    for line in LINES:
        tape.add(line)
    assert seen == LINES


def test_numbers_have_five_digits_and_are_finite():
    assert rounded(0.123456789) == 0.12346 and rounded(-12345678.0) == -12346000.0
    assert rounded(float("nan")) is rounded(float("inf")) is None


def test_a_torn_line_counts_as_not_written(tape, path):
    whole = path.read_bytes()
    for length in range(len(whole) - 1, len(whole) - 30, -7):
        path.write_bytes(whole[:length])
        assert read(path, finished=False).lines == LINES[:-1]
        with pytest.raises(UntrustedInput, match="line 6: it does not end"):
            read(path)


def test_a_run_that_goes_on_has_no_end_yet(path):
    Tape(HEAD, path).add(LINES[0])
    assert read(path, finished=False).end is None
    with pytest.raises(UntrustedInput, match="has no end"):
        read(path)


def change(number, **values):
    def edit(lines):
        value = json.loads(lines[number])
        lines[number] = json.dumps({k: v for k, v in (value | values).items() if v != "gone"})

    return edit


DAMAGE = {
    "not JSON": lambda lines: lines.__setitem__(2, "{"),
    "no object": lambda lines: lines.__setitem__(2, "[]"),
    "NaN": lambda lines: lines.__setitem__(2, lines[2].replace("0.5", "NaN")),
    "deep": lambda lines: lines.__setitem__(2, "[" * 100 + "]" * 100),
    "an empty line": lambda lines: lines.insert(2, ""),
    "no head": lambda lines: lines.pop(0),
    "two heads": lambda lines: lines.insert(1, lines[0]),
    "another format": change(0, format="x"),
    "a later version": change(0, version=2),
    "no version": change(0, version="1"),
    "layers twice": change(0, layers=["a", "a"]),
    "a step too far": change(5, step=21),
    "a step back": change(4, step=2),
    "an unknown key": change(2, more=1),
    "a missing key": change(2, loss="gone"),
    "text for a number": change(2, loss="0.5"),
    "true for a number": change(2, loss=True),
    "too many layers": change(2, layers={"error": [1, 2, 3]}),
    "an unknown measure": change(2, layers={"speed": [1, 2]}),
    "an unknown kind": change(2, kind="note"),
    "an unknown alarm": change(3, alarm="fire"),
    "an unknown action": change(3, action="hid"),
    "an alarm elsewhere": change(3, where="c"),
    "no limit": change(3, limit=None),
    "shares beyond 1": change(1, levels=[[0.5, 1.5], None]),
    "a line after the end": lambda lines: lines.append(lines[1]),
    "a reason that is none": change(5, why=3),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("finished", [True, False])
def test_damage_is_refused_by_line(tape, path, how, finished):
    lines = path.read_text().splitlines()
    DAMAGE[how](lines)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UntrustedInput, match=r"recording\.jsonl, line \d: "):
        read(path, finished=finished)


def test_a_later_version_says_upgrade(tape, path):
    path.write_text(path.read_text().replace('"version":1', '"version":2'))
    with pytest.raises(UntrustedInput, match="upgrade"):
        read(path)


def test_no_file_and_an_empty_one(path):
    with pytest.raises(UntrustedInput):
        read(path)
    path.touch()
    with pytest.raises(UntrustedInput, match="empty"):
        read(path, finished=False)


# ------------------------------------------------------------------------------------------------ going on


def test_a_run_goes_on_behind_its_mark(path):
    """What came after the mark, a torn line included, is written again."""
    first = Tape(HEAD, path)
    for line in LINES[:2]:
        first.add(line)
    mark = json.loads(json.dumps(first.mark()))
    first.add(LINES[3])
    with open(path, "ab") as file:
        file.write(b'{"kind": "lo')
    found = read(path, finished=False)
    again = Tape(HEAD, path)
    assert again.go_on(found, mark) and again.mark() == mark
    for line in LINES[2:]:
        again.add(line)
    assert read(path).lines == LINES
    straight = Recording(HEAD, LINES)
    assert path.read_bytes() == straight.to_bytes()


def test_what_was_not_marked_is_not_taken_up(path, tape):
    mark = {"lines": 2, "sha256": "0" * 64}
    again = Tape(HEAD, path)
    assert not again.go_on(Recording(HEAD, LINES), mark) and not again.go_on(None, tape.mark())
    assert not again.go_on(Recording(Head(21, 5, ("a", "b"), ("n",)), LINES), tape.mark())
    assert read(path, finished=False).lines == [], "the new run's own file stands"


def test_a_full_disk_is_told(path, monkeypatch):
    tape = Tape(HEAD, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskFull, match="no room to write"):
        tape.add(LINES[0])
