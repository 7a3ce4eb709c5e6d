"""One writer at a time."""

import os
import signal
import threading
import time
from contextlib import suppress

import pytest

from quantailor.store.lock import Busy, is_alive, locked
from quantailor.store.publish import new_folder
from tests.store.folders import fill, names_in, text_of


def test_the_second_writer_is_told_who_the_first_is(tmp_path):
    out = tmp_path / "out"
    ready, go_on = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException), new_folder(out) as tmp:
            fill(tmp, "first")
            os.write(ready[1], b"x")
            os.read(go_on[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    told = rf"out is being written by process {pid}; wait for it to end, or choose another --out$"
    with pytest.raises(Busy, match=told) as error, new_folder(out):
        pytest.fail("refused before any work")
    assert error.value.exit_code == 3
    os.write(go_on[1], b"x")
    os.waitpid(pid, 0)
    assert text_of(out) == "first" and names_in(tmp_path) == ["out"]


def test_a_thread_of_the_same_process_counts_as_another_writer(tmp_path):
    with locked(tmp_path / "out"), pytest.raises(Busy, match=f"by process {os.getpid()}"), locked(tmp_path / "out"):
        pytest.fail("locked twice")
    with locked(tmp_path / "out"):
        pass
    assert names_in(tmp_path) == []


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        with locked(tmp_path / "out"):
            os.write(ready[1], b"x")
            time.sleep(60)
        os._exit(0)
    os.read(ready[0], 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert names_in(tmp_path) == [".out.lock"]
    with locked(tmp_path / "out"):
        assert (tmp_path / ".out.lock").read_text() == str(os.getpid())
    assert names_in(tmp_path) == []


def test_never_two_inside_at_once_though_each_unlinks_the_file(tmp_path):
    inside, most, entered = [], [], []

    def run():
        stop = time.monotonic() + 0.5
        while time.monotonic() < stop:
            with suppress(Busy), locked(tmp_path / "out"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0)
                inside.pop()
                entered.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert set(most) == {1} and len(entered) > 10


def test_of_ten_pairs_of_writers_exactly_one_proceeds(tmp_path):
    for i in range(10):
        out, gate, refused = tmp_path / f"out-{i}", os.pipe(), os.pipe()
        pids = []
        for name in ("a", "b"):
            pid = os.fork()
            if pid == 0:
                status = 99
                try:
                    os.close(gate[1])
                    os.read(gate[0], 1)  # both start when the gate closes
                    with new_folder(out) as tmp:
                        fill(tmp, name)
                        os.read(refused[0], 1)  # stays until the other has tried
                    status = 0
                except Busy as error:
                    status = error.exit_code
                    os.write(refused[1], b"x")
                finally:
                    os._exit(status)
            pids.append(pid)
        os.close(gate[1])
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        for fd in (gate[0], *refused):
            os.close(fd)
        assert sorted(statuses) == [0, 3]
        assert text_of(out) == "ab"[statuses.index(0)]
    assert names_in(tmp_path) == sorted(f"out-{i}" for i in range(10))


def test_is_alive():
    assert is_alive(os.getpid()) and is_alive(1)
    assert not is_alive(2**22 + 1) and not is_alive(10**30)
