"""What long work reports to: something that can show a bar with time left, or nothing at all.

The work calls `task` and advances it; the shell's bars (cli/console.py) and silence are two implementations. Advancing
is also where a signal gets its second chance: the exception that its handler raises may land in a library's bare
`except` and be lost, so the handler leaves it here as well, and the next step of the work raises it again. Work that
can be continued later asks for the rest of its current step first (`finishing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

Advance = Callable[[int], None]

_asked_to_stop: list[BaseException] = []
_to_finish: list[str] = []  # what is being finished, innermost last


def stop_with(error: BaseException) -> bool:
    """From now on every step of any work raises `error`. For signal handlers, which raise it at once where this is
    True; it is not where a step is to be finished first and this is the first time of asking."""
    again = bool(_asked_to_stop)
    _asked_to_stop[:] = [error]
    if again:
        _to_finish.clear()
    return not _to_finish


def go_on() -> None:
    """Forget what `stop_with` asked."""
    _asked_to_stop.clear()
    _to_finish.clear()


def raise_if_stopped() -> None:
    """Raises: what `stop_with` was given, if it was, and nothing is to be finished first."""
    if _asked_to_stop and not _to_finish:
        raise _asked_to_stop[0]


@contextmanager
def finishing(what: str) -> Iterator[None]:
    """A step that the first signal waits for; the second does not. Raises at its end: what `stop_with` was given."""
    _to_finish.append(what)
    try:
        yield
    finally:
        if _to_finish:  # empty where a second signal came
            _to_finish.pop()
    raise_if_stopped()


def being_finished() -> str | None:
    """What the first signal waits for; None where nothing is."""
    return _to_finish[0] if _to_finish else None


@dataclass(frozen=True)
class Row:
    """A line of what somebody watches: `values` so far, drawn small, and how it stands. `state`: good, bad or ""."""

    name: str
    values: tuple[float, ...]
    text: str
    state: str = ""


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

    def rows(self, rows: Sequence[Row]) -> None:
        """What stands under the bars from now on, while a task runs."""

    def say(self, line: str) -> None:
        """One finished line for the person watching."""
