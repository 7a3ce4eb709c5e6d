"""What a report can show, as frozen data: builders fill it from receipts, `html.py` writes it in either language.

A text is either `Said`, words of ours that have a translation, or a plain `str` that came with the data and is shown as
it is. A section without blocks is left out of the page, so nothing is ever shown empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["good", "fair", "bad", "neutral"]


@dataclass(frozen=True)
class Said:
    """Words of ours: a key of words.py, and what stands in its {places}. Values may themselves be `Said`."""

    key: str
    values: Mapping[str, Any] = field(default_factory=dict)


Text = Said | str


def say(key: str, **values: Any) -> Said:
    return Said(key, values)


@dataclass(frozen=True)
class Verdict:
    """The first thing on the page: `word` in the badge, `sentence` as its headline."""

    state: State
    word: Text
    sentence: Text


@dataclass(frozen=True)
class Figure:
    """A number to remember, under the verdict."""

    label: Text
    value: Text
    detail: Text = ""


@dataclass(frozen=True)
class Cell:
    """`sort`: what a column is sorted by, where that is not the text. `detail` stands below, smaller: an interval."""

    text: Text
    sort: float | None = None
    state: State = "neutral"
    detail: Text = ""


@dataclass(frozen=True)
class Column:
    name: Text
    numeric: bool = False
    name_like: bool = False  # names and hashes: in the monospaced face
    wide: bool = False  # prose: may wrap, and has room to


@dataclass(frozen=True)
class Table:
    """Rows of cells under `columns`. `sortable`: by a click on a column's head. `note` stands below."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    sortable: bool = True
    note: Text = ""
    title: Text = ""
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Series:
    """`points`: (x, y) in running order; `band`: (low, high) of each, where an interval is known."""

    name: Text
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Mark:
    """A line across a chart: at `value` on the axis that the chart gives it, with its name. None: only in the list."""

    value: float | None
    name: Text
    state: State = "neutral"


@dataclass(frozen=True)
class Lines:
    """One or more curves. `levels`: horizontal lines; `alarms`: vertical ones; `calm`: what is said if none is bad."""

    title: Text
    x: Text
    y: Text
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    levels: tuple[Mark, ...] = ()
    alarms: tuple[Mark, ...] = ()
    calm: Text = ""
    note: Text = ""
    kind: str = field(default="lines", init=False)


@dataclass(frozen=True)
class Step:
    """A row of `Intervals`: `value` with its (low, high)."""

    name: Text
    value: float
    low: float | None = None
    high: float | None = None
    state: State = "neutral"


@dataclass(frozen=True)
class Intervals:
    """Values with their intervals, one below the other on one axis; `limit` is what they are allowed to reach."""

    title: Text
    x: Text
    rows: tuple[Step, ...]
    limit: Mark | None = None
    log_x: bool = False
    note: Text = ""
    kind: str = field(default="intervals", init=False)


@dataclass(frozen=True)
class Point:
    """`chosen`: the one that was saved. `on_front` is found by `charts.front`."""

    name: Text
    x: float
    y: float
    chosen: bool = False


@dataclass(frozen=True)
class Pareto:
    """Costs to the right, losses upwards: both better when lower."""

    title: Text
    x: Text
    y: Text
    points: tuple[Point, ...]
    log_x: bool = False
    limit: Mark | None = None
    note: Text = ""
    kind: str = field(default="pareto", init=False)


@dataclass(frozen=True)
class Heat:
    """`values` [rows][columns]; None where nothing was measured. `chosen` marks cells: (row, column)."""

    title: Text
    rows: tuple[Text, ...]
    columns: tuple[Text, ...]
    values: tuple[tuple[float | None, ...], ...]
    unit: Text
    corner: Text = ""
    chosen: frozenset[tuple[int, int]] = frozenset()
    note: Text = ""
    kind: str = field(default="heat", init=False)

    def __post_init__(self) -> None:
        if len(self.values) != len(self.rows) or any(len(row) != len(self.columns) for row in self.values):
            raise ValueError(f"{len(self.rows)} x {len(self.columns)} names for a heat map of another shape")


@dataclass(frozen=True)
class Bins:
    """`share` [n]: of all values between `edges` [n + 1]; shares of one series sum to what lies inside the edges."""

    name: Text
    edges: tuple[float, ...]
    share: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.share) + 1:
            raise ValueError(f"{len(self.share)} bins have {len(self.share) + 1} edges, not {len(self.edges)}")


@dataclass(frozen=True)
class Histogram:
    """`bars` filled, `outline` drawn over them as a line, on one axis."""

    title: Text
    x: Text
    bars: Bins
    outline: Bins | None = None
    log_y: bool = False
    marks: tuple[Mark, ...] = ()
    note: Text = ""
    kind: str = field(default="histogram", init=False)


@dataclass(frozen=True)
class Sample:
    """One prompt and what followed it."""

    prompt: str
    after: str
    before: str | None = None


@dataclass(frozen=True)
class Samples:
    rows: tuple[Sample, ...]
    note: Text = ""
    kind: str = field(default="samples", init=False)


@dataclass(frozen=True)
class Remarks:
    """Lines of text; `ordered` where they are steps of an argument."""

    lines: tuple[Text, ...]
    ordered: bool = False
    title: Text = ""
    kind: str = field(default="remarks", init=False)


@dataclass(frozen=True)
class Pairs:
    """Names and their values."""

    rows: tuple[tuple[Text, Text], ...]
    title: Text = ""
    kind: str = field(default="pairs", init=False)


@dataclass(frozen=True)
class Command:
    text: str
    kind: str = field(default="command", init=False)


Block = Table | Lines | Intervals | Pareto | Heat | Histogram | Samples | Remarks | Pairs | Command


@dataclass(frozen=True)
class Section:
    """`id` is the anchor: letters only."""

    id: str
    title: Text
    blocks: tuple[Block, ...]
    lead: Text = ""


@dataclass(frozen=True)
class Document:
    """A page. `verb`: what was run; `subject`: the folder's or model's name."""

    verb: str
    subject: str
    verdict: Verdict
    figures: tuple[Figure, ...] = ()
    sections: tuple[Section, ...] = ()
    version: str = ""

    def with_sections(self, *extra: Section | None) -> Document:
        """A copy with more sections, those without blocks left out."""
        kept = (*self.sections, *(s for s in extra if s is not None and s.blocks))
        return Document(self.verb, self.subject, self.verdict, self.figures, kept, self.version)


def section(id: str, *blocks: Block | None, lead: Text = "") -> Section:
    """A section named by the word `section.ID`, without what is missing."""
    return Section(id, say(f"section.{id}"), tuple(b for b in blocks if b is not None), lead)


def finite(value: Any) -> float | None:
    """A number that can be drawn, else None: JSON has null, and hostile JSON has anything."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def pair(value: Any) -> tuple[float, float] | None:
    """(low, high) where `value` is two finite numbers."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return None
    low, high = finite(value[0]), finite(value[1])
    return None if low is None or high is None else (min(low, high), max(low, high))
