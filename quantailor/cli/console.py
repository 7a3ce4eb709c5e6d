"""What a person sees while work runs: bars with time left, on stderr, so that stdout stays clean for results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from quantailor.progress import Advance, Progress, raise_if_stopped


class ConsoleProgress(Progress):
    """Bars that vanish when done; lines that stay. On a pipe only the lines are printed."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bars: Bars | None = None

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        with self._shown() as bars:
            task = bars.add_task(title, total=total)

            def advance(steps: int) -> None:
                raise_if_stopped()
                bars.advance(task, steps)

            yield advance
            bars.remove_task(task)

    @contextmanager
    def counted(self, title: str) -> Iterator[Callable[[int, int], None]]:
        with self._shown() as bars:
            task = bars.add_task(title, total=None)

            def update(done: int, total: int) -> None:
                raise_if_stopped()
                bars.update(task, completed=done, total=total)

            yield update
            bars.remove_task(task)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)

    @contextmanager
    def _shown(self) -> Iterator[Bars]:
        if self.bars is not None:  # a bar within a bar: one more line of the same display
            yield self.bars
            return
        columns = (
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        quiet = not self.console.is_terminal  # its end would leave an empty line in a pipe
        with Bars(*columns, console=self.console, transient=True, disable=quiet) as bars:
            self.bars = bars
            try:
                yield bars
            finally:
                self.bars = None


def progress(quiet: bool) -> Progress:
    """Bars, or silence."""
    return Progress() if quiet else ConsoleProgress()
