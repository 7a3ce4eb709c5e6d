"""What a person sees while work runs: bars with time left, on stderr, so that stdout stays clean for results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from quantailor.progress import Advance, Progress, Row, raise_if_stopped

_STEPS = "▁▂▃▄▅▆▇█"
_COLOURS = {"good": "green", "bad": "bold red"}


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Values as blocks of eight heights, from their lowest to their highest; of many the mean of each stretch.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7]), sparkline([1, 1]), sparkline([])
    ('▁▂▃▄▅▆▇█', '▁▁', '')
    """
    count = min(width, len(values))
    parts = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(_STEPS) - 1) / (high - low) if high > low else 0.0
    return "".join(_STEPS[round((mean - low) * scale)] for mean in means)


def table(rows: Sequence[Row]) -> Table:
    """Rows as a panel shows them; a narrow terminal cuts the text, not the picture."""
    shown = Table.grid(padding=(0, 2))
    shown.add_column(style="dim", no_wrap=True, min_width=20)
    shown.add_column(style="cyan", no_wrap=True, min_width=24)
    shown.add_column(no_wrap=True, overflow="ellipsis")
    for row in rows:
        shown.add_row(
            row.name,
            sparkline(row.values),
            Text(row.text, style=_COLOURS.get(row.state, "")),
        )
    return shown


class _Bars(Bars):
    """Bars with rows under them."""

    shown: Sequence[Row] = ()

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.shown:
            yield table(self.shown)


class ConsoleProgress(Progress):
    """Bars that vanish when done; lines that stay. On a pipe only the lines are printed."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bars: _Bars | None = None

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

    def rows(self, rows: Sequence[Row]) -> None:
        if self.bars is not None:
            self.bars.shown = tuple(rows)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)

    @contextmanager
    def _shown(self) -> Iterator[_Bars]:
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
        with _Bars(*columns, console=self.console, transient=True, disable=quiet) as bars:
            self.bars = bars
            try:
                yield bars
            finally:
                self.bars = None


def progress(quiet: bool) -> Progress:
    """Bars, or silence."""
    return Progress() if quiet else ConsoleProgress()
