"""Charts as plain shapes with coordinates: the template only writes them down, tests only compare numbers.

A drawing is `WIDTH` wide in its own units, which the page scales; text is 12 units high, so that a phone shows it at
about 10 pixels. Colours and strokes are classes of the style sheet, told apart by dash or shape as well as by colour.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from quantailor.pages.axes import Axis, axis
from quantailor.pages.document import Bins, Histogram, Intervals, Lines, Mark, Pareto, Point, Series, Text

WIDTH = 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 42
_MOST_POINTS = 240
Words = Callable[[Text], str]


@dataclass(frozen=True)
class Shape:
    """`tag` line, path, rect or circle with its attributes; `title` is shown where the pointer rests."""

    tag: str
    attributes: dict[str, str | float]
    title: str = ""


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    anchor: str = "start"
    style: str = "tick"


@dataclass
class Drawing:
    """Shapes and labels from back to front. `legend`: (class, name). `numbers`: the same as a table, head first."""

    height: float
    shapes: list[Shape] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)
    numbers: list[list[str]] = field(default_factory=list)
    width: float = WIDTH

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str, title: str = "") -> None:
        self.shapes.append(Shape("line", _px(x1=x1, y1=y1, x2=x2, y2=y2) | {"class": style}, title))

    def path(self, d: str, style: str, title: str = "") -> None:
        self.shapes.append(Shape("path", {"d": d, "class": style}, title))

    def rect(self, x: float, y: float, width: float, height: float, style: str, title: str = "") -> None:
        self.shapes.append(Shape("rect", _px(x=x, y=y, width=width, height=height) | {"class": style}, title))

    def circle(self, x: float, y: float, r: float, style: str, title: str = "") -> None:
        self.shapes.append(Shape("circle", _px(cx=x, cy=y, r=r) | {"class": style}, title))

    def label(self, x: float, y: float, text: str, anchor: str = "start", style: str = "tick") -> None:
        self.labels.append(Label(_r(x), _r(y), text, anchor, style))


def lines(chart: Lines, words: Words) -> Drawing:
    """Curves with their bands, horizontal levels and vertical alarms."""
    drawing = Drawing(264)
    series = [thinned(s) for s in chart.series]
    xs = [x for s in series for x, _ in s.points] + [m.value for m in chart.alarms if m.value is not None]
    ys = [y for s in series for _, y in s.points] + [v for s in series for b in s.band for v in b]
    ys += [m.value for m in chart.levels if m.value is not None]
    x, y = _frame(drawing, xs, ys, chart.log_x, chart.log_y, words(chart.x), words(chart.y))
    for mark in chart.alarms:
        if mark.value is None:
            continue
        drawing.line(x.at(mark.value), y.start, x.at(mark.value), y.end, f"alarm {mark.state}", words(mark.name))
    _levels(drawing, chart.levels, x, y, words, [x.at(m.value) for m in chart.alarms if m.value is not None])
    for number, one in enumerate(series):
        style = f"s{number % 4}"
        if one.band:
            upper = [(x.at(a), y.at(high)) for (a, _), (_, high) in zip(one.points, one.band, strict=True)]
            lower = [(x.at(a), y.at(low)) for (a, _), (low, _) in zip(one.points, one.band, strict=True)]
            drawing.path(_polyline(upper + lower[::-1]) + "Z", f"band {style}")
        spots = [(x.at(a), y.at(b)) for a, b in one.points]
        drawing.path(_polyline(spots), f"curve {style}")
        if len(spots) <= 40:
            for (cx, cy), (a, b) in zip(spots, one.points, strict=True):
                drawing.circle(cx, cy, 3, f"dot {style}", f"{words(one.name)}: {a:,.10g}, {b:.4g}")
        drawing.legend.append((style, words(one.name)))
        drawing.numbers += [[words(one.name), f"{a:,.10g}", f"{b:.6g}"] for a, b in one.points]
    drawing.numbers.insert(0, ["", words(chart.x), words(chart.y)])
    return drawing


def intervals(chart: Intervals, words: Words) -> Drawing:
    """A dot with its interval a row, names to the left, values to the right."""
    names = [clipped(words(row.name), 20) for row in chart.rows]
    left = min(154.0, 20 + max((text_width(n) for n in names), default=0))
    row_height, top = 30, 24 if chart.limit is not None else 8
    drawing = Drawing(top + row_height * len(chart.rows) + _BOTTOM)
    found = [v for row in chart.rows for v in (row.value, row.low, row.high) if v is not None]
    limit = chart.limit.value if chart.limit is not None else None
    found += [limit] if limit is not None else []
    bottom = drawing.height - _BOTTOM
    x = axis(found, left, WIDTH - 62, log=chart.log_x)
    for at, text in x.ticks(4):
        drawing.line(at, top, at, bottom, "grid")
        drawing.label(at, bottom + 16, text, "middle")
    drawing.label((x.start + x.end) / 2, drawing.height - 6, words(chart.x), "middle", "name")
    if chart.limit is not None and limit is not None:
        at, text = x.at(limit), words(chart.limit.name)
        drawing.line(at, top - 6, at, bottom, f"level {chart.limit.state}", text)
        half = text_width(text) / 2
        drawing.label(min(max(at, half + 2), WIDTH - half - 2), top - 10, text, "middle", "note")
    for number, row in enumerate(chart.rows):
        middle = top + row_height * (number + 0.5)
        drawing.label(left - 12, middle + 4, names[number], "end", "row")
        if row.low is not None and row.high is not None:
            drawing.line(x.at(row.low), middle, x.at(row.high), middle, f"whisker {row.state}")
        value = f"{row.value:,.4g}" if abs(row.value) < 1e5 else f"{row.value:.3g}"
        between = "" if row.low is None or row.high is None else f" ({row.low:.4g} – {row.high:.4g})"
        drawing.circle(x.at(row.value), middle, 5, f"dot {row.state}", f"{words(row.name)}: {value}{between}")
        drawing.label(WIDTH - 4, middle + 4, value, "end", "value")
        drawing.numbers.append([words(row.name), f"{row.value:.6g}", between.strip(" ()")])
    drawing.numbers.insert(0, ["", words(chart.x), "95 %"])
    return drawing


def pareto(chart: Pareto, words: Words) -> Drawing:
    """Points, the front through those that nothing beats on both axes, names where there is room."""
    drawing = Drawing(284)
    xs, ys = [p.x for p in chart.points], [p.y for p in chart.points]
    ys += [chart.limit.value] if chart.limit is not None and chart.limit.value is not None else []
    x, y = _frame(drawing, xs, ys, chart.log_x, False, words(chart.x), words(chart.y), margin=0.1)
    if chart.limit is not None:
        _levels(drawing, (chart.limit,), x, y, words)
    best = front(chart.points)
    if len(best) > 1:
        spots = [(x.at(p.x), y.at(p.y)) for p in best]
        corner = "".join(f"H{_n(b[0])}V{_n(b[1])}" for b in spots[1:])
        drawing.path(f"M{_n(spots[0][0])} {_n(spots[0][1])}{corner}", "front")
    order = sorted(chart.points, key=lambda p: (p.chosen, p in best))
    placed: list[tuple[float, float, float, float]] = [
        (x.at(p.x) - 5, y.at(p.y) - 5, x.at(p.x) + 5, y.at(p.y) + 5) for p in order
    ]
    for point in order:
        kind = "chosen" if point.chosen else "best" if point in best else "beaten"
        drawing.circle(
            x.at(point.x), y.at(point.y), 6 if point.chosen else 4, f"point {kind}",
            f"{words(point.name)}: {point.x:,.6g}, {point.y:.4g}",
        )  # fmt: skip
        drawing.numbers.append([words(point.name), f"{point.x:,.10g}", f"{point.y:.6g}"])
    for point in reversed(order):
        if point in best or point.chosen or len(chart.points) <= 8:
            _place(drawing, placed, x.at(point.x), y.at(point.y), clipped(words(point.name), 22))
    drawing.numbers.append(["", words(chart.x), words(chart.y)])
    drawing.numbers.reverse()
    return drawing


def histogram(chart: Histogram, words: Words) -> Drawing:
    """Filled bars, and an outline over them; with `log_y` the axis ends a decade below the smallest share but 0."""
    drawing = Drawing(244)
    both = [chart.bars, *([chart.outline] if chart.outline else [])]
    shares = [share for bins in both for share in bins.share if share > 0] or [1.0]
    low, high = min(shares), max(shares)
    xs = [edge for bins in both for edge in (bins.edges[0], bins.edges[-1])] + [
        m.value for m in chart.marks if m.value is not None
    ]
    ys = [low / 2 if chart.log_y else 0, high]
    x, y = _frame(drawing, xs, ys, False, chart.log_y, words(chart.x), "", zero=True, margin=0.02, percent=True)
    for left, right, share in zip(chart.bars.edges, chart.bars.edges[1:], chart.bars.share, strict=False):
        if share > 0:
            gap = 1.0 if x.at(right) - x.at(left) > 5 else 0.0
            width = max(0.6, x.at(right) - x.at(left) - gap)
            title = f"{left:.4g} … {right:.4g}: {share:.3%}"
            drawing.rect(x.at(left) + gap / 2, y.at(share), width, y.start - y.at(share), "bar", title)
    drawing.legend.append(("bar", words(chart.bars.name)))
    if chart.outline is not None:
        parts = [f"M{_n(x.at(chart.outline.edges[0]))} {_n(y.start)}"]
        for right, share in zip(chart.outline.edges[1:], chart.outline.share, strict=True):
            parts.append(f"V{_n(y.at(share) if share > 0 else y.start)}H{_n(x.at(right))}")
        drawing.path("".join(parts) + f"V{_n(y.start)}", "outline")
        drawing.legend.append(("outline", words(chart.outline.name)))
    for mark in chart.marks:
        if mark.value is None:
            continue
        drawing.line(x.at(mark.value), y.start, x.at(mark.value), y.end, f"level {mark.state}", words(mark.name))
    if chart.marks:
        drawing.legend.append(("level", words(chart.marks[0].name)))
    drawing.numbers = [[words(chart.x), words(chart.bars.name)]]
    return drawing


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats, cost and loss both lower or equal and one lower; by rising cost."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not best or point.y < best[-1].y:
            best.append(point)
    return best


def thinned(series: Series, most: int = _MOST_POINTS) -> Series:
    """At most `most` points: the ends, and of each run of points the lowest and the highest, so no spike is lost."""
    if len(series.points) <= most:
        return series
    runs, count = max(1, (most - 2) // 2), len(series.points)
    kept = {0, count - 1}
    for run in range(runs):
        indices = range(run * count // runs, (run + 1) * count // runs)
        if indices:
            kept.add(min(indices, key=lambda i: series.points[i][1]))
            kept.add(max(indices, key=lambda i: series.points[i][1]))
    chosen = sorted(kept)
    band = tuple(series.band[i] for i in chosen) if series.band else ()
    return Series(series.name, tuple(series.points[i] for i in chosen), band)


def text_width(text: str) -> float:
    """An estimate, in units, at 12 units high: Chinese takes a square, Latin a good half of one."""
    return sum(12.0 if unicodedata.east_asian_width(c) in "WF" else 6.7 for c in text)


def clipped(text: str, most: int) -> str:
    """The end of a name tells more than its middle.

    >>> clipped("model.layers.10.mlp.down_proj", 20)
    'model.…mlp.down_proj'
    """
    return text if len(text) <= most else f"{text[: most // 3]}…{text[-(most - most // 3 - 1) :]}"


def _frame(
    drawing: Drawing,
    xs: Sequence[float],
    ys: Sequence[float],
    log_x: bool,
    log_y: bool,
    x_name: str,
    y_name: str,
    *,
    zero: bool = False,
    margin: float = 0.06,
    percent: bool = False,
) -> tuple[Axis, Axis]:
    """Axes, grid, ticks and names. The y name stands above the axis, where it can be read without turning the head."""
    top = _TOP + (14 if y_name else 0)
    bottom = drawing.height - _BOTTOM
    y = axis(ys, bottom, top, log=log_y, zero=zero, margin=margin)
    ticks = [(at, _as_percent(text, y.log)) for at, text in y.ticks(4)] if percent else y.ticks(4)
    left = max(30.0, min(72.0, 12 + max((text_width(text) for _, text in ticks), default=0)))
    x = axis(xs, left, WIDTH - _RIGHT, log=log_x, margin=min(margin, 0.04))
    for at, text in ticks:
        drawing.line(left, at, WIDTH - _RIGHT, at, "grid")
        drawing.label(left - 6, at + 4, text, "end")
    drawing.line(left, bottom, WIDTH - _RIGHT, bottom, "axis")
    for at, text in x.ticks(5):
        drawing.line(at, bottom, at, bottom + 4, "axis")
        drawing.label(at, bottom + 17, text, "middle")
    drawing.label((left + WIDTH - _RIGHT) / 2, drawing.height - 6, x_name, "middle", "name")
    if y_name:
        drawing.label(4, 13, y_name, "start", "name")
    return x, y


def _as_percent(text: str, log: bool) -> str:
    number = 100 * float(text.replace("−", "-").rstrip("kMG"))
    return f"{number:.3g} %" if not log or number >= 1e-3 else f"{number:.0e} %".replace("e-0", "e-")


def _levels(
    drawing: Drawing, marks: Sequence[Mark], x: Axis, y: Axis, words: Words, crossing: Sequence[float] = ()
) -> None:
    """Horizontal lines; a name stands above its line, or below where another one's name is, and to the left of a
    vertical line (`crossing`, pixels) that would cross it."""
    taken: list[float] = []
    for mark in marks:
        if mark.value is None:
            continue
        at = y.at(mark.value)
        drawing.line(x.start, at, x.end, at, f"level {mark.state}", words(mark.name))
        above, below = at - 5, at + 14
        place = above if all(abs(above - t) >= 13 for t in taken) and above > y.end + 8 else below
        taken.append(place)
        right, width = x.end, text_width(words(mark.name))
        for line in sorted(crossing, reverse=True):
            if right - width - 4 < line <= right + 4:
                right = line - 6
        drawing.label(right, place, words(mark.name), "end", "note")


def _place(drawing: Drawing, placed: list[tuple[float, float, float, float]], x: float, y: float, text: str) -> None:
    """A name beside its point, where it covers no other; nowhere if there is no room: the table below has it."""
    width = text_width(text) * 0.95
    for dx, dy, anchor in ((8, -7, "start"), (-9, 4, "end"), (8, 17, "start"), (-8, -8, "end"), (9, 4, "start")):
        left = x + dx - {"start": 0, "end": width, "middle": width / 2}[anchor]
        box = (left, y + dy - 10, left + width, y + dy + 3)
        if box[0] < 2 or box[2] > WIDTH - 2 or box[1] < 16 or box[3] > drawing.height - _BOTTOM:
            continue
        if all(box[2] < p[0] or p[2] < box[0] or box[3] < p[1] or p[3] < box[1] for p in placed):
            placed.append(box)
            drawing.label(x + dx, y + dy, text, anchor, "note")
            return


def _polyline(spots: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_n(a)} {_n(b)}" for a, b in spots)


def _px(**values: float) -> dict[str, str | float]:
    return {name: _r(value) for name, value in values.items()}


def _r(value: float) -> float:
    return round(value + 0.0, 1)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def bins_of(counts: Sequence[float], edges: Sequence[float], name: Text) -> Bins:
    """Counts as shares of their sum."""
    total = sum(counts) or 1.0
    return Bins(name, tuple(float(e) for e in edges), tuple(c / total for c in counts))
