"""A result is there whole or not at all, whatever fails and whenever."""

import errno
import os
import random
import resource
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantailor.errors import QuantailorError, UntrustedInput, UsageError
from quantailor.store.publish import DiskFull, new_folder, recover, write_atomic
from tests.store.folders import fill, names_in, text_of

CALLS = ["mkdir", "rename", "fsync", "chmod", "unlink", "rmdir", "open"]


def publish_text(out: Path, text: str) -> None:
    with new_folder(out, overwrite=True) as tmp:
        fill(tmp, text, num_files=1)


def refused(out: Path, told: str, **options) -> None:
    """`new_folder` refuses before the block runs: status 2, one line that matches `told`."""
    with pytest.raises(UsageError, match=told) as error, new_folder(out, **options):
        pytest.fail("refused before any work")
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def in_child(work, *args) -> int:
    """Run `work` in a forked child; its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            work(*args)
            os._exit(0)
        except QuantailorError as error:
            os._exit(100 + error.exit_code)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def count_calls(monkeypatch, work) -> int:
    """How many calls of `CALLS` `work` makes."""
    seen = []
    with monkeypatch.context() as patch:
        for name in CALLS:
            real = getattr(os, name)
            patch.setattr(os, name, lambda *a, _real=real, **k: (seen.append(1), _real(*a, **k))[1])
        work()
    return len(seen)


def at_call(patch, index, do, *, after=False):
    """From now on the call number `index` of those in `CALLS` runs `do`, which may raise."""
    count = [0]

    def wrapped(real, *args, **kwargs):
        count[0] += 1
        now = count[0] - 1 == index
        if now and not after:
            do()
        try:
            return real(*args, **kwargs)
        finally:
            if now and after:
                do()

    for name in CALLS:
        patch.setattr(os, name, lambda *a, _real=getattr(os, name), **k: wrapped(_real, *a, **k))


def raiser(error):
    def do():
        raise error

    return do


# What it leaves when all goes well


def test_the_folder_appears_with_its_parents_and_nothing_else(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with new_folder(out) as tmp:
        assert tmp.parent == out.parent and tmp.name == f".out.tmp-{os.getpid()}"
        fill(tmp, "new")
        assert not out.exists()
    assert text_of(out) == "new"
    assert names_in(out.parent) == ["out"]


@pytest.mark.parametrize(
    "umask, file_mode, dir_mode", [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0, 0o666, 0o777)]
)
def test_modes_follow_the_umask_where_safetensors_leaves_0600(tmp_path, umask, file_mode, dir_mode):
    old = os.umask(umask)
    try:
        with new_folder(tmp_path / "out") as tmp:
            (tmp / "sub").mkdir(mode=0o700)
            save_file({"a": torch.ones(2)}, tmp / "sub" / "a.safetensors")
            os.chmod(tmp / "sub" / "a.safetensors", 0o600)
            (tmp / "run.sh").write_text("echo")
            os.chmod(tmp / "run.sh", 0o755)
    finally:
        os.umask(old)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    }
    assert modes == {"out": dir_mode, "sub": dir_mode, "a.safetensors": file_mode, "run.sh": file_mode}


def test_every_file_and_folder_is_fsynced_before_the_rename_and_the_parent_after(tmp_path, monkeypatch, real_fsync):
    events, true_fsync, true_rename = [], os.fsync, os.rename

    def fsync(fd):
        events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path))
        true_fsync(fd)

    def rename(source, target):
        events.append("rename")
        true_rename(source, target)

    with new_folder(tmp_path / "out") as tmp:
        fill(tmp, "new", num_files=1)
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "rename", rename)
    name = f".out.tmp-{os.getpid()}"
    synced = {f"{name}{rest}" for rest in ("", "/sub", "/sub/more.txt", "/part-0.txt", "/MANIFEST.json")}
    assert set(events[:5]) == synced
    assert events[5:] == ["rename", "."]


def test_overwrite_replaces_all_of_the_old_folder(tmp_path):
    publish_text(tmp_path / "out", "old")
    with new_folder(tmp_path / "out", overwrite=True) as tmp:
        fill(tmp, "new", num_files=1)
        assert text_of(tmp_path / "out") == "old"  # until the end
    assert text_of(tmp_path / "out") == "new"
    assert names_in(tmp_path) == ["out"]


def test_a_folder_below_a_link_is_like_any_other(tmp_path, real_fsync):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for text in ("old", "new"):
        publish_text(tmp_path / "link" / "out", text)
        assert text_of(tmp_path / "disk" / "out") == text and names_in(tmp_path / "disk") == ["out"]


def test_a_link_to_a_folder_stays_and_what_it_points_to_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    publish_text(tmp_path / "disk" / "real", "old")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    publish_text(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink() and text_of(tmp_path / "disk" / "real") == "new"
    assert names_in(tmp_path) == ["disk", "out"] and names_in(tmp_path / "disk") == ["real"]


# What it refuses


def test_an_existing_folder_is_left_alone(tmp_path):
    publish_text(tmp_path / "out", "old")
    refused(tmp_path / "out", r"out exists; choose another --out or pass --overwrite$")
    assert text_of(tmp_path / "out") == "old" and names_in(tmp_path) == ["out"]


def test_overwrite_deletes_only_what_quantailor_wrote(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    told = r"home holds no MANIFEST.json, .* choose another --out, or remove it yourself$"
    refused(tmp_path / "home", told, overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years"
    (tmp_path / "empty").mkdir()
    publish_text(tmp_path / "empty", "new")
    assert text_of(tmp_path / "empty") == "new"


def test_a_file_and_the_root_are_no_place(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out, overwrite, told in [
        (tmp_path / "file", True, "file is a file, not a folder; choose another --out"),
        (
            tmp_path / "file" / "out",
            False,
            "cannot write .*Not a directory.*earlier results are intact; choose another",
        ),
        (tmp_path / ("x" * 300), False, "cannot write .*File name too long.*choose another --out"),
        (Path("/"), True, "/ is the root of the file system; choose another --out"),
    ]:
        refused(out, told, overwrite=overwrite)
    assert names_in(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "out, relation",
    [
        ("in", "is the input"),
        ("in/../in/", "is the input"),
        ("link", "is the input"),
        ("in/sub/out", "lies inside the input"),
        ("link/out", "lies inside the input"),
        (".", "contains the input"),
    ],
)
def test_an_output_never_overlaps_an_input(tmp_path, out, relation, overwrite):
    publish_text(tmp_path / "in", "old")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    told = rf"{relation} .*/in, which is never written to; choose another --out$"
    refused(tmp_path / out, told, overwrite=overwrite, inputs=[Path("/somewhere/else"), tmp_path / "in"])
    assert text_of(tmp_path / "in") == "old" and names_in(tmp_path) == ["in", "link"]


def test_an_output_beside_an_input_of_a_similar_name_is_fine(tmp_path):
    publish_text(tmp_path / "model", "in")
    with new_folder(tmp_path / "model-w4", inputs=[tmp_path / "model"]) as tmp:
        fill(tmp, "new")
    assert text_of(tmp_path / "model-w4") == "new"


def test_a_link_in_the_result_is_a_bug(tmp_path):
    told = r"a is a link or a device; .*so copy it$"
    with pytest.raises(ValueError, match=told), new_folder(tmp_path / "out") as tmp:
        (tmp / "a").symlink_to("/etc/passwd")
    assert names_in(tmp_path) == []


# Failures in the block


@pytest.mark.parametrize(
    "error", [RuntimeError("bug"), KeyboardInterrupt(), SystemExit(3), FileNotFoundError(2, "bug")]
)
@pytest.mark.parametrize("old", [True, False])
def test_an_exception_passes_unchanged_and_leaves_nothing(tmp_path, error, old):
    out = tmp_path / "new-parent" / "out"
    if old:
        publish_text(out, "old")
    with pytest.raises(type(error)) as caught, new_folder(out, overwrite=True) as tmp:
        fill(tmp, "new")
        raise error
    assert caught.value is error
    assert (names_in(out.parent) == ["out"] and text_of(out) == "old") if old else names_in(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_full_disk_in_the_block_is_one_line(tmp_path, code):
    publish_text(tmp_path / "out", "old")
    told = r"no room to write .*/out \(.*\); earlier results are intact; free some"
    with pytest.raises(DiskFull, match=told) as error, new_folder(tmp_path / "out", overwrite=True):
        raise OSError(code, os.strerror(code))
    assert error.value.exit_code == 1 and "\n" not in str(error.value)
    assert text_of(tmp_path / "out") == "old" and names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("limit", [0, 3, 100, 400, 5_000, 200_000])
def test_a_file_size_limit_stops_it_as_a_full_disk_does(tmp_path, limit):
    """0: the lock; 3 and 100: a text; 400: the manifest; from 5000 on: safetensors."""
    publish_text(tmp_path / "out", "old")
    tensors = {"a": torch.zeros(100_000)}

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            with new_folder(tmp_path / "out", overwrite=True) as tmp:
                fill(tmp, "new", num_files=1)
                save_file(tensors, tmp / "a.safetensors")
        except DiskFull as error:
            told = str(error)
            assert told.endswith("earlier results are intact; free some space, or choose an --out on another disk")
            assert str(tmp_path / "out") in told and "\n" not in told
            os._exit(42)

    assert in_child(work) == 42
    assert text_of(tmp_path / "out") == "old" and names_in(tmp_path) == ["out"]


# Failures of the file system, at every call


def failures(monkeypatch, tmp_path):
    """For every i: a fresh place with or without an old folder, and how a publish went whose i-th call failed."""
    for old in (True, False):
        work = tmp_path / f"count-{old}"
        if old:
            publish_text(work / "out", "old")
        num_calls = count_calls(monkeypatch, lambda work=work: publish_text(work / "out", "new"))
        assert num_calls > 20
        for index in range(num_calls):
            place = tmp_path / f"{old}-{index}"
            if old:
                publish_text(place / "out", "old")
            yield old, index, place


def test_a_failure_at_any_call_is_one_line_and_leaves_the_old_folder(tmp_path, monkeypatch):
    told = set()
    for old, index, place in failures(monkeypatch, tmp_path):
        full = index % 2 == 0
        error = OSError(errno.ENOSPC, "No space left on device") if full else OSError(errno.EIO, "Input/output error")
        with monkeypatch.context() as patch:
            at_call(patch, index, raiser(error))
            try:
                publish_text(place / "out", "new")
                failed = False
            except UntrustedInput:  # the block's own, from reading back what it wrote
                failed = True
            except QuantailorError as caught:
                failed = True
                assert isinstance(caught, DiskFull) == full and caught.exit_code == 1
                assert "earlier results are intact" in str(caught) and "\n" not in str(caught)
                told.add(str(caught).partition(";")[2])
            except OSError as caught:  # the block's own, from `mkdir("sub")`
                failed = True
                assert caught is error
        # Not every call matters: to fail at removing an old folder, or the lock, does not undo the new one.
        expected = ("old" if old else None) if failed else "new"
        assert (text_of(place / "out") if (place / "out").exists() else None) == expected, index
        publish_text(place / "out", "again")
        assert text_of(place / "out") == "again" and names_in(place) == ["out"], index
    assert len(told) == 2


def test_ctrl_c_at_any_call_leaves_the_old_or_the_new_folder(tmp_path, monkeypatch):
    for old, index, place in failures(monkeypatch, tmp_path):
        with monkeypatch.context() as patch:
            at_call(patch, index, raiser(KeyboardInterrupt()), after=True)
            with pytest.raises(KeyboardInterrupt):
                publish_text(place / "out", "new")
        found = text_of(place / "out") if (place / "out").exists() else None
        assert found in ("old" if old else None, "new"), index
        publish_text(place / "out", "again")
        assert text_of(place / "out") == "again" and names_in(place) == ["out"], index


def test_when_even_the_way_back_fails_the_message_says_where_the_old_folder_is(tmp_path, monkeypatch):
    publish_text(tmp_path / "out", "old")
    real, renames = os.rename, []

    def only_the_first(source, target):
        if "MANIFEST" not in str(target):
            renames.append(source)
            if len(renames) > 1:
                raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", only_the_first)
        with pytest.raises(
            QuantailorError, match=r"the old one is complete at (\S+), and the next run .* puts it back$"
        ):
            publish_text(tmp_path / "out", "new")
    trash = tmp_path / f".out.trash-{os.getpid()}"
    assert text_of(trash) == "old" and names_in(tmp_path) == [trash.name]
    recover(tmp_path / "out")
    assert text_of(tmp_path / "out") == "old" and names_in(tmp_path) == ["out"]


# kill -9


def test_kill_9_at_any_call_leaves_the_old_or_the_new_folder(tmp_path, monkeypatch):
    found = []
    for old, index, place in failures(monkeypatch, tmp_path):

        def work(place=place, index=index):
            at_call(monkeypatch, index, lambda: os.kill(os.getpid(), signal.SIGKILL))
            publish_text(place / "out", "new")

        assert in_child(work) == -signal.SIGKILL
        if index % 2:  # readers can put things right, and so can the next writer
            recover(place / "out")
            found.append(text_of(place / "out") if (place / "out").exists() else None)
            assert found[-1] in ("old" if old else None, "new"), index
            assert names_in(place) in ([], ["out"]), index
        publish_text(place / "out", "again")
        assert text_of(place / "out") == "again" and names_in(place) == ["out"], index
    assert {"old", "new", None} == set(found)


def test_kill_9_at_random_moments_leaves_the_old_or_the_new_folder(tmp_path, real_fsync):
    rng = random.Random(0)
    out = tmp_path / "out"

    def save(text):
        with new_folder(out, overwrite=True) as tmp:
            fill(tmp, text, num_files=10)

    save("0")
    began = time.perf_counter()
    save("1")
    seconds, last, inside = time.perf_counter() - began, "1", 0
    for attempt in range(2, 18):
        started, start = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(start, b".")
                save(str(attempt))
            finally:
                os._exit(0)
        os.close(start)
        os.read(started, 1)  # on a busy machine the child may come to run long after it was made
        os.close(started)
        time.sleep(rng.uniform(0, 1.1) * seconds)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        inside += any("tmp" in name for name in names_in(tmp_path))
        recover(out)
        assert text_of(out) in (last, str(attempt))
        assert names_in(tmp_path) == ["out"]
        last = text_of(out)
    assert inside >= 4  # the moments did fall into saves
    save("end")
    assert text_of(out) == "end" and names_in(tmp_path) == ["out"]


def dead_pid() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_a_run_clears_what_the_dead_left_for_this_output_only(tmp_path):
    dead, living = dead_pid(), os.getppid()
    ours = [f".out.tmp-{dead}", f".out.tmp-{os.getpid()}", f".out.trash-{dead}"]
    others = [f".out.tmp-{living}", f".out2.tmp-{dead}", f".my.out.tmp-{dead}", ".out.tmp-notes", f"out.tmp-{dead}"]
    for name in ours + others:
        fill(tmp_path / name, "stale") if (tmp_path / name).mkdir() is None else None
    (tmp_path / ".out.lock").write_text(str(dead))
    publish_text(tmp_path / "out", "old")
    assert names_in(tmp_path) == sorted([*others, "out"])


def test_a_folder_moved_away_by_a_killed_writer_comes_back(tmp_path):
    publish_text(tmp_path / f".out.trash-{dead_pid()}", "old")
    refused(tmp_path / "out", "out exists; choose another --out or pass --overwrite")
    assert text_of(tmp_path / "out") == "old" and names_in(tmp_path) == ["out"]


def test_recover_of_what_never_was_does_nothing(tmp_path):
    recover(tmp_path / "nowhere" / "out")
    recover(tmp_path / "out")
    assert names_in(tmp_path) == []


# Single files


def test_write_atomic_replaces_the_file_with_ordinary_permissions(tmp_path):
    write_atomic(tmp_path / "a.json", b"old")
    write_atomic(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"new" and names_in(tmp_path) == ["a.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~umask


def test_write_atomic_survives_a_failure_at_any_call(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    num_calls = count_calls(monkeypatch, lambda: write_atomic(path, b"new"))
    path.write_bytes(b"old")
    for index in range(num_calls):
        with monkeypatch.context() as patch:
            at_call(patch, index, raiser(OSError(errno.ENOSPC, "No space left on device")))
            try:
                write_atomic(path, b"new")
            except DiskFull as error:
                assert str(path) in str(error) and "earlier results are intact" in str(error)
        assert path.read_bytes() in (b"old", b"new") and names_in(tmp_path) == ["a.json"]


def test_write_atomic_clears_what_the_dead_left_and_names_a_missing_folder(tmp_path):
    (tmp_path / f".a.json.tmp-{dead_pid()}-7").write_bytes(b"half")
    write_atomic(tmp_path / "a.json", b"new")
    assert names_in(tmp_path) == ["a.json"]
    with pytest.raises(UsageError, match=r"cannot write .*No such file or directory.*choose another --out"):
        write_atomic(tmp_path / "nowhere" / "a.json", b"new")


def test_a_file_of_weights_can_be_read_by_others_after_publishing(tmp_path):
    with new_folder(tmp_path / "out") as tmp:
        save_file({"a": torch.arange(4)}, tmp / "model.safetensors")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a"], torch.arange(4))
