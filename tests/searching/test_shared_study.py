"""One study for many processes: each trial once, nothing lost but the trial of whoever was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantailor.errors import UntrustedInput, UsageError
from quantailor.searching.front import Limits, Look
from quantailor.searching.shared_study import SharedStudy
from quantailor.searching.space import Space

SPACE = Space(bits=(4, 3), group=(32,), learning_rate=(0.5, 1.0, 2.0), steps=(5,), frozen=(0.0,))
WORKER = """
import sys, time
from pathlib import Path
from quantailor.searching.front import Limits
from quantailor.searching.shared_study import SharedStudy
from tests.searching.test_shared_study import SPACE, loss_of
with SharedStudy(Path(sys.argv[1]), {"model": "m"}, SPACE, Limits(1.0)) as study:
    while (asked := study.ask()) is not None:
        print(asked[0], flush=True)
        time.sleep(float(sys.argv[2]))
        study.finish(asked[0], loss_of(asked[1]), asked[1].bits, seconds=0.1)
"""


def loss_of(point):
    return abs(point.learning_rate - 1.0) + (4 - point.bits) + 0.1 * (point.scales == "fixed")


def opened(folder, question=None, **options):
    return SharedStudy(folder, question or {"model": "m"}, SPACE, Limits(1.0, 3.5), **options)


def drained(study):
    count = 0
    while (asked := study.ask()) is not None:
        count += 1
        study.finish(asked[0], loss_of(asked[1]), asked[1].bits, seconds=0.1)
    return count


def own(study):
    return [t for t in study.tried if t.same_as is None]


def test_every_point_is_tried_once_and_read_back(tmp_path):
    with opened(tmp_path / "s") as study:
        assert drained(study) == SPACE.size == 12
        found = own(study)
    assert {t.point for t in found} == set(SPACE.points())
    assert all(t.loss == loss_of(t.point) and t.facts["seconds"] == 0.1 for t in found)
    with opened(tmp_path / "s") as again:
        assert again.ask() is None and len(own(again)) == 12
    assert list((tmp_path / "s" / "beats").iterdir()) == []
    lines = (tmp_path / "s" / "journal.log").read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines), "a journal is JSON and nothing that is run"


def test_looks_are_shared(tmp_path):
    with opened(tmp_path / "s") as study:
        (one, _), (two, _) = study.ask(), study.ask()
        study.look(one, Look(0.5, 0.25, 3.0, 5))
        study.look(one, Look(1.0, float("inf"), 3.0, 5))
        assert study.looks(without=two) == [Look(0.5, 0.25, 3.0, 5), Look(1.0, 1e9, 3.0, 5)]
        assert study.looks(without=one) == []


def test_two_workers_share_the_work_and_a_killed_one_loses_its_trial_only(tmp_path):
    folder = tmp_path / "s"
    root = Path(__file__).parents[2]

    def worker(pause):
        code = [sys.executable, "-c", WORKER, str(folder), str(pause)]
        return subprocess.Popen(code, cwd=root, stdout=subprocess.PIPE, text=True)

    slow = worker(600)
    first = int(slow.stdout.readline())  # it has begun a trial, and will never end it
    quick = worker(0.01)
    begun = [int(quick.stdout.readline()) for _ in range(2)]
    assert first not in begun
    os.kill(slow.pid, signal.SIGKILL)
    slow.wait()
    quick.communicate(timeout=60)
    assert quick.returncode == 0
    with opened(folder) as study:
        found = own(study)
        assert {t.point for t in found} == set(SPACE.points()), "the lost point was tried by the other one"
        assert len(found) == 12 and first not in {t.number for t in found}
        assert study.counts["fail"] >= 1 and "running" not in study.counts
        again = [t for t in found if t.facts.get("again") == first]
        assert len(again) == 1
    slow.stdout.close()


def test_a_silent_worker_of_another_machine_counts_as_dead_after_its_lease(tmp_path):
    with opened(tmp_path / "s") as study:
        study.ask()
        other = tmp_path / "s" / "beats" / "another-1-abc"
        other.touch()
        assert study.beats.is_alive(other.name)
        os.utime(other, (time.time() - 61, time.time() - 61))
        assert not study.beats.is_alive(other.name)
        assert not study.beats.is_alive("never-2-here") and study.beats.is_alive(study.beats.name)


def test_an_unfinished_last_line_is_cut_off(tmp_path):
    with opened(tmp_path / "s") as study:
        number, point = study.ask()
        study.finish(number, 0.5, 4.0)
    journal = tmp_path / "s" / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":5,"worker_')
    with opened(tmp_path / "s") as study:
        assert [t.point for t in own(study)] == [point]
        assert drained(study) == 11


def test_another_question_or_a_strange_folder_is_refused(tmp_path):
    with opened(tmp_path / "s"):
        pass
    with pytest.raises(UsageError, match=r"another question \(model differ\)"):
        opened(tmp_path / "s", {"model": "other"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no study"):
        opened(tmp_path / "full")


def test_a_journal_of_other_points_is_not_trusted(tmp_path):
    with opened(tmp_path / "s") as study:
        number, _ = study.ask()
        study.finish(number, 0.5, 4.0)
    journal = tmp_path / "s" / "journal.log"
    journal.write_text(journal.read_text().replace('\\"choices\\": [4, 3]', '\\"choices\\": [7, 6]'))
    with opened(tmp_path / "s") as study, pytest.raises(UntrustedInput, match="outside the space"):
        print(study.tried)
