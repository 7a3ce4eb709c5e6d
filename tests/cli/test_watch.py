"""`quantailor watch`, and `train` with a recording, as a shell sees them."""

import os

import pytest

from quantailor.pages.html import is_report
from quantailor.qat.recording import NAME, Recording, read
from quantailor.store.manifest import verify
from quantailor.store.work import work_folder
from quantailor.verbs.watching import recording_of
from tests.cli.shell import shell
from tests.formats.making import bytes_of, write_corpus
from tests.pages.recordings import recording


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_a_recorded_run_from_the_shell_to_the_page(tiny_lm, corpus, tmp_path):
    """Train, watch what is left, report: the file is the manifest's, and the page has its section."""
    out = tmp_path / "w2"
    args = ("train", tiny_lm, "--scheme", "w2a16-g32", "--data", corpus / "train.txt", "--out", out, "--steps", 12)
    more = ("--record-every", 3, "--stop", "patience=2", "--stop", "steps=9", "--on-alarm", "act", "--context", 32)
    ran = shell(*args, *more, "--samples", 8, "--method", "rtn", "--tensorboard", tmp_path / "tb", "--quiet", "--json")
    assert ran.status == 0, ran.err
    assert ran.document["steps"] <= 9 and ran.document["stopped"].startswith(("steps=9", "patience=2"))
    assert ran.document["alarms"] == [] and verify(out) and any((tmp_path / "tb").iterdir())
    assert not work_folder(out).exists()

    found = read(out / NAME)
    assert found.end.why == ran.document["stopped"] and found.measures[-1].step == ran.document["steps"]
    seen = shell("watch", out)
    assert (
        seen.status == 0
        and seen.out.startswith(f"step {ran.document['steps']} of 12\n")
        and "error of weights" in seen.out
    )
    assert shell("watch", out, "--json").document["running"] is False

    told = shell("report", out, "--receipts-only", "--json")
    text = (tmp_path / "w2.html").read_text(encoding="utf-8")
    assert told.status == 0 and is_report(text[:4096]) and "What the recorder saw" in text


def test_a_run_on_its_way_is_read_from_beside_its_place(tmp_path):
    out, found = tmp_path / "w2", recording()
    work_folder(out).mkdir()
    partly = Recording(found.head, found.lines[:9])
    (work_folder(out) / NAME).write_bytes(partly.to_bytes() + b'{"kind":"mea')
    before = bytes_of(tmp_path)
    assert recording_of(out) == (partly, True)
    ran = shell("watch", out, "--once")
    assert ran.status == 0 and f"step {partly.lines[-1].step} of 100, still running" in ran.out
    assert shell("watch", out, "--json").document["running"] is True
    assert recording_of(work_folder(out) / NAME) == (partly, True)
    assert bytes_of(tmp_path) == before, "looking changes nothing"


def test_nothing_recorded_and_a_damaged_file_are_one_line(tmp_path):
    ran = shell("watch", tmp_path / "nowhere")
    assert ran.status == 3 and "record one with `quantailor train --record`" in ran.error
    (tmp_path / NAME).write_bytes(recording().to_bytes()[:-5])
    ran = shell("watch", tmp_path)
    assert ran.status == 3 and "line 18: it does not end" in ran.error


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--stop", "patient=3"), "stop rule 'patient=3' is not known"),
        (("--until", "recovery<=0.5"), "is met by what gets worse"),
        (("--on-alarm", "cry"), "on_alarm='cry' is not known"),
        (("--stop", "minutes=1", "--stop", "minutes=2"), "gives a rule twice"),
    ],
)
def test_mistakes_are_told_before_the_work(tiny_lm, corpus, tmp_path, args, says):
    out = tmp_path / "out"
    ran = shell("train", tiny_lm, "--scheme", "w8a16", "--data", corpus / "train.txt", "--out", out, *args)
    assert ran.status == 2 and says in ran.error and list(tmp_path.iterdir()) == []
