"""What long work reports to: something that can show a bar with time left, or nothing at all.

The work calls `task` and advances it; the shell's bars (cli/console.py) and silence are two implementations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


class Progress:
    """Silent. Subclasses show something."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        """A stretch of work of `total` steps; call what it yields with the steps just done."""
        yield lambda _steps: None

    @contextmanager
    def counted(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """The same for work that reports (done, in all) and knows its total only once it runs."""
        yield lambda _done, _total: None

    def say(self, line: str) -> None:
        """One finished line for the person watching."""
