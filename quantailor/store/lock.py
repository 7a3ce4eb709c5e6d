"""One writer at a time for an output path: an flock on `.NAME.lock` beside it.

The kernel drops the lock when its holder dies, however it dies, so there is no stale lock to clear. POSIX only.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quantailor.errors import QuantailorError


class Busy(QuantailorError):
    """Another process is writing the same output (status 3)."""

    exit_code = 3


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock of `out` for the block; the lock file is gone afterwards.

    Raises: Busy naming the process that holds it; OSError if the lock file cannot be made.
    """
    path = out.parent / f".{out.name}.lock"
    fd = _acquire(path, out)
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        try:
            with suppress(OSError):  # a lock file left behind stops nobody
                os.unlink(path)  # while locked: whoever opened it before sees that it is no longer the one at `path`
        finally:
            os.close(fd)


def is_alive(pid: int) -> bool:
    """Whether a process of this number runs; another user's counts."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _acquire(path: Path, out: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(fd, path):
                return fd
        except BlockingIOError:
            holder = _holder(fd)
            os.close(fd)
            raise Busy(f"{out} is being written by {holder}; wait for it to end, or choose another --out") from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its last holder unlinked it between our open and our lock


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(fd: int) -> str:
    for _ in range(20):  # it may hold the lock and not have written its number yet
        text = os.pread(fd, 32, 0)
        if text.isdigit() and is_alive(int(text)):
            return f"process {int(text)}"
        time.sleep(0.01)
    return "another process"
