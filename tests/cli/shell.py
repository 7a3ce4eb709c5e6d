"""Commands as a shell sees them: an exit status and two streams. In this process, or in one of their own."""

import contextlib
import io
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quantailor.cli.main import run
from tests.formats.making import bytes_of


@dataclass(frozen=True)
class Ran:
    """What came of a command."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout; what JSON does not know, such as NaN, fails."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    @property
    def error(self) -> str:
        """The one line of an error."""
        lines = [line for line in self.err.splitlines() if line]
        assert len(lines) == 1 and lines[0].startswith("quantailor: "), self.err
        return lines[0]


def shell(*args: object) -> Ran:
    """Run a command in this process. Anything but a clean exit comes through as the exception that it is."""
    out, err = io.StringIO(), io.StringIO()
    argv, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["quantailor", *map(str, args)]
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                run()
            except SystemExit as stop:
                status = int(stop.code or 0)
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    return Ran(status, out.getvalue(), err.getvalue())


class Process:
    """A command in a forked process of its own, which may be sent signals; its streams are files."""

    def __init__(self, folder: Path, *args: object, max_file_bytes: int | None = None) -> None:
        self.streams = [folder / f"{name}.{time.monotonic_ns()}" for name in ("out", "err")]
        self.pid = os.fork()
        if self.pid == 0:
            self._child(args, max_file_bytes)

    def _child(self, args: tuple[object, ...], max_file_bytes: int | None) -> None:
        status = 97
        try:
            for number, path in enumerate(self.streams, start=1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if max_file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
            sys.argv = ["/usr/bin/quantailor", *map(str, args)]
            try:
                run()
                status = 0
            except SystemExit as stop:
                status = int(stop.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
                status = 98
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    @property
    def err(self) -> str:
        return self.streams[1].read_text() if self.streams[1].exists() else ""

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Until `text` stands on stderr."""
        end = time.monotonic() + seconds
        while text not in self.err:
            assert time.monotonic() < end, f"no {text!r} after {seconds} s in: {self.err}"
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), f"it ended: {self.err}"
            time.sleep(0.02)

    def stop(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self) -> Ran:
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return Ran(status, self.streams[0].read_text(), self.err)


@contextlib.contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Nothing in `folder`, and nothing beside it, is changed by the block."""
    before, beside = bytes_of(folder), sorted(os.listdir(folder.parent))
    yield
    assert bytes_of(folder) == before, "the earlier result is intact"
    assert sorted(os.listdir(folder.parent)) == beside, "nothing half-written is left"
