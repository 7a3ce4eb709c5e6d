"""What long work reports to: something that can show a bar with time left, or nothing at all.

The work calls `task` and advances it; the shell's bars (cli/console.py) and silence are two implementations. Advancing
is also where a signal gets its second chance: the exception that its handler raises may land in a library's bare
`except` and be lost, so the handler leaves it here as well, and the next step of the work raises it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]

_asked_to_stop: list[BaseException] = []


def stop_with(error: BaseException) -> None:
    """From now on every step of any work raises `error`. For signal handlers."""
    _asked_to_stop[:] = [error]


def go_on() -> None:
    """Forget what `stop_with` asked."""
    _asked_to_stop.clear()


def raise_if_stopped() -> None:
    """Raises: what `stop_with` was given, if it was."""
    if _asked_to_stop:
        raise _asked_to_stop[0]


class Progress:
    """Silent. Subclasses show something."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        """A stretch of work of `total` steps; call what it yields with the steps just done."""
        yield lambda _steps: raise_if_stopped()

    @contextmanager
    def counted(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """The same for work that reports (done, in all) and knows its total only once it runs."""
        yield lambda _done, _total: raise_if_stopped()

    def say(self, line: str) -> None:
        """One finished line for the person watching."""
