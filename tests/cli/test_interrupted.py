"""Real processes that are stopped, or run out of disk, in the middle of their work."""

import signal
import time

import pytest

from quantailor import api
from tests.cli.shell import Process, untouched
from tests.formats.making import bytes_of

LONG = (
    "--scheme",
    "w1.58a8",
    "--tolerance",
    "0",
    "--steps",
    1_000_000,
    "--minutes",
    100_000,
    "--context",
    32,
    "--samples",
    8,
)


def long_fit(tmp_path, trained_lm, corpus, out, *more) -> Process:
    data = ("--data", corpus / "train.txt", "--eval-data", corpus / "valid.txt")
    return Process(tmp_path, "fit", trained_lm, *data, "--out", out, *LONG, *more)


@pytest.mark.parametrize(
    ("number", "status", "told"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("moment", ["float ", "qronos ", "training"])
def test_a_signal_in_the_middle_of_fit_leaves_nothing_half_written(
    tmp_path, trained_lm, corpus, earlier, number, status, told, moment
):
    with untouched(earlier):
        process = long_fit(tmp_path, trained_lm, corpus, earlier, "--overwrite", "--json")
        process.wait_for("qronos " if moment == "training" else moment)
        time.sleep(0.7 if moment == "training" else 0)
        assert any(path.name.startswith(".earlier.tmp-") for path in earlier.parent.iterdir()), "it is at work"
        process.stop(number)
        ran = process.ended()

    assert ran.status == status and "Traceback" not in ran.err
    line = f"{told}; nothing half-written was left behind"
    assert ran.err.splitlines()[-1] == f"quantailor: {line}"
    assert ran.document == {"error": line, "exit_code": status}


def test_a_signal_leaves_no_folder_where_there_was_none(tmp_path, trained_lm, corpus):
    (tmp_path / "results").mkdir()
    process = long_fit(tmp_path, trained_lm, corpus, tmp_path / "results" / "deep" / "out")
    process.wait_for("rtn ")
    process.stop(signal.SIGINT)

    assert process.ended().status == 130 and list((tmp_path / "results").iterdir()) == []


@pytest.mark.parametrize("limit", [1_000, 30_000, 200_000])
@pytest.mark.parametrize("command", ["fit", "quantize"])
def test_a_full_disk_leaves_the_earlier_result(tmp_path, trained_lm, corpus, earlier, command, limit):
    args = (command, trained_lm, "--scheme", "w8a8", "--data", corpus / "train.txt", "--samples", 4, "--context", 32)
    with untouched(earlier):
        process = Process(tmp_path, *args, "--out", earlier, "--overwrite", "--quiet", max_file_bytes=limit)
        ran = process.ended()

    assert ran.status == 1 and ran.out == ""
    assert "no room to write" in ran.error and "earlier results are intact" in ran.error


def test_two_writers_of_one_place(tmp_path, trained_lm, corpus, earlier):
    """The second gives way at once, naming the first."""
    with untouched(earlier):
        first = long_fit(tmp_path, trained_lm, corpus, earlier, "--overwrite")
        first.wait_for("float ")
        second = long_fit(tmp_path, trained_lm, corpus, earlier, "--overwrite", "--quiet").ended()
        first.stop(signal.SIGTERM)
        assert first.ended().status == 143

    assert second.status == 3 and f"is being written by process {first.pid}" in second.error


def test_kill_9_then_again_gives_the_same_as_without(tmp_path, trained_lm, corpus):
    """No half-finished state is picked up: a second run starts clean, and clears what the first one left."""
    (tmp_path / "results").mkdir()
    out = tmp_path / "results" / "out"
    process = long_fit(tmp_path, trained_lm, corpus, out)
    process.wait_for("qronos ")
    process.stop(signal.SIGKILL)
    assert process.ended().status == -signal.SIGKILL
    assert not out.exists() and len(list(out.parent.iterdir())) > 0

    args = ("quantize", trained_lm, "--scheme", "w8a8", "--data", corpus / "train.txt", "--context", 32, "--quiet")
    assert Process(tmp_path, *args, "--out", out).ended().status == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"] and api.check(out).equal
    assert Process(tmp_path, *args, "--out", tmp_path / "other").ended().status == 0
    assert bytes_of(out) == bytes_of(tmp_path / "other")
