"""Which of several workers on one folder still live, on one machine or on many.

Each worker holds an flock on a file of its own and touches it every few seconds. On the machine of the looker a lock
that can be had is a worker that has died, however it died; of another machine's workers the file's age tells, by the
clock of the file system, which both see.
"""

from __future__ import annotations

import fcntl
import os
import platform
import secrets
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

EVERY, LEASE = 5.0, 60.0  # seconds between touches, and after which a silent worker counts as gone


class Beats:
    """A worker, while the block runs. `name` is its own; `is_alive` is asked about others."""

    def __init__(self, folder: Path, lease: float = LEASE) -> None:
        self.folder, self.lease = folder, lease
        self.name = f"{_machine()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Beats:
        self.folder.mkdir(exist_ok=True)
        self._fd = os.open(self.folder / self.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            os.unlink(self.folder / self.name)
        os.close(self._fd)

    def is_alive(self, name: str) -> bool:
        """Whether the worker of this name is at work."""
        if name == self.name:
            return True
        try:
            fd = os.open(self.folder / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # it has left in order, or never was here
            return False
        try:
            if name.split("-")[0] == _machine() and _can_lock(fd):
                return False
            os.utime(self._fd)
            return os.fstat(self._fd).st_mtime - os.fstat(fd).st_mtime < self.lease
        finally:
            os.close(fd)

    def _beat(self) -> None:
        while not self._stop.wait(EVERY):
            with suppress(OSError):
                os.utime(self._fd)


def _can_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _machine() -> str:
    """One boot of one machine, whatever its containers call it."""
    path = Path("/proc/sys/kernel/random/boot_id")
    text = path.read_text() if path.exists() else platform.node()
    return "".join(c for c in text if c.isalnum())[:12]
