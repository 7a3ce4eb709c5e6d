"""What the flight recorder kept, drawn: the training curve with its alarms, each measure by step, errors by layer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from quantailor.pages import numbers
from quantailor.pages.alarms import alarm_table, marks
from quantailor.pages.document import (
    Bins,
    Block,
    Heat,
    Histogram,
    Lines,
    Remarks,
    Section,
    Series,
    say,
    section,
)
from quantailor.pages.layers import merged_rows
from quantailor.qat.recording import Measure, Recording

# measure of layers -> the kinds of alarms that are about it
_DRAWN = {
    "error": ("rate", "error"),
    "clip": ("clip",),
    "flips": (),
    "reversals": (),
    "drift_peak": ("scale",),
    "range": ("range",),
    "input_clip": (),
}
_NAMED = 3  # layers drawn by name in each chart
_HEAT_COLUMNS, _HEAT_ROWS = 10, 64


def recorded(recording: Recording) -> Section | None:
    """The section of a recording; None with fewer than two measures."""
    measures = recording.measures
    if len(measures) < 2:
        return None
    blocks: list[Block | None] = [
        alarm_table(recording.alarms),
        _ended(recording),
        _losses(recording),
        *(_curves(recording, measures, name, kinds) for name, kinds in _DRAWN.items()),
        _gains(recording, measures),
        _heat(recording, measures),
        _levels(recording),
    ]
    return section("recording", *blocks, lead=say("recording.lead", every=str(recording.head.every)))


def _ended(recording: Recording) -> Remarks | None:
    end = recording.end
    if end is None or not end.why:
        return None
    rule = end.why.partition(":")[0]  # `patience=3` is the same in every language
    return Remarks((say("recording.stopped", step=numbers.whole(end.step), why=rule if "=" in rule else end.why),))


def _losses(recording: Recording) -> Lines | None:
    """The training loss between measures, and every alarm on it."""
    points = tuple((float(m.step), m.loss) for m in recording.measures if m.loss is not None)
    if len(points) < 2:
        return None
    values = [y for _, y in points]
    return Lines(
        say("chart.recorded_loss"),
        say("axis.step"),
        say("axis.loss_nats"),
        (Series(say("series.losses"), points),),
        log_y=_wide(values),
        alarms=marks(recording.alarms),
        calm="" if recording.alarms else say("alarmed.none"),
        note=say("losses.note"),
    )


def _curves(recording: Recording, measures: Sequence[Measure], name: str, kinds: Sequence[str]) -> Lines | None:
    """The median of the layers with all of them as a band, and those that went furthest from where they began."""
    columns = [(float(m.step), m.layers.get(name, [])) for m in measures]
    middle, band = [], []
    for step, column in columns:
        if known := [v for v in column if v is not None]:
            middle.append((step, statistics.median(known)))
            band.append((min(known), max(known)))
    if len(middle) < 2 or all(high == 0 for _, high in band):
        return None
    named = []
    for layer in _furthest(columns, len(recording.head.layers)):
        points = tuple((step, v) for step, column in columns if column and (v := column[layer]) is not None)
        named.append(Series(recording.head.layers[layer], points))
    values = [v for pair in band for v in pair] + [v for _, v in middle]
    series = (
        Series(say("series.layers", count=numbers.whole(len(columns[-1][1]))), tuple(middle), tuple(band)),
        *named,
    )
    return Lines(
        say(f"recorded.{name}"),
        say("axis.step"),
        say(f"recorded_axis.{name}"),
        series,
        log_y=_wide(values),
        alarms=marks([a for a in recording.alarms if a.alarm in kinds]),
    )


def _furthest(columns: Sequence[tuple[float, list[float | None]]], count: int) -> list[int]:
    """Layers by how far they went from their first value, on a scale of ratios where there is one."""
    moved = []
    for layer in range(count):
        values = [v for _, column in columns if column and (v := column[layer]) is not None]
        if len(values) < 2:
            continue
        first, far = values[0], max(values, key=lambda v: abs(v - values[0]))
        ratio = abs(math.log(far / first)) if first > 0 and far > 0 else abs(far - first)
        moved.append((ratio, layer))
    return [layer for _, layer in sorted(moved, key=lambda pair: (-pair[0], pair[1]))[:_NAMED]]


def _gains(recording: Recording, measures: Sequence[Measure]) -> Lines | None:
    rows = [(float(m.step), m.norms.get("gain", [])) for m in measures]
    series = []
    for norm in _furthest(rows, len(recording.head.norms)):
        points = tuple((step, v) for step, column in rows if column and (v := column[norm]) is not None)
        series.append(Series(recording.head.norms[norm], points))
    if not series:
        return None
    alarms = marks([a for a in recording.alarms if a.alarm == "norm"])
    return Lines(
        say("recorded.gain"), say("axis.step"), say("recorded_axis.gain"), tuple(series), alarms=alarms,
        log_y=_wide([v for s in series for _, v in s.points]),
    )  # fmt: skip


def _heat(recording: Recording, measures: Sequence[Measure]) -> Heat | None:
    """The quantization error: a row a layer, a column a step."""
    shown = [m for m in measures if any(v is not None for v in m.layers.get("error", []))]
    if not shown:
        return None
    count = min(_HEAT_COLUMNS, len(shown))
    picked = [shown[i * (len(shown) - 1) // max(1, count - 1)] for i in range(count)]
    values = [[m.layers["error"][layer] for m in picked] for layer in range(len(recording.head.layers))]
    rows, cells, merged = merged_rows(list(recording.head.layers), values, _HEAT_ROWS)
    return Heat(
        say("recorded.error_heat"),
        tuple(rows),
        tuple(numbers.whole(m.step) or "" for m in picked),
        tuple(map(tuple, cells)),
        say("recorded_axis.error"),
        corner=say("column.layer"),
        note=say("heat.merged") if merged else say("heat.errors_note"),
    )


def _levels(recording: Recording) -> Histogram | None:
    """The layer whose weights moved most between the levels of its grid: at the start, and at the end."""
    looks = [look for look in recording.looks if look.levels]
    if len(looks) < 2:
        return None
    moved = []
    for layer, (before, after) in enumerate(zip(looks[0].levels, looks[-1].levels)):
        if before is not None and after is not None and len(before) == len(after):
            moved.append((sum(abs(a - b) for a, b in zip(before, after)), layer, before, after))
    if not moved:
        return None
    _, layer, before, after = max(moved, key=lambda found: (found[0], -found[1]))
    edges = tuple(i + 0.5 for i in range(len(after) + 1))
    name = recording.head.layers[layer]
    return Histogram(
        say("recorded.levels", layer=name),
        say("recorded_axis.levels"),
        Bins(say("series.step", step=numbers.whole(looks[-1].step)), edges, after),
        Bins(say("series.step", step=numbers.whole(looks[0].step)), edges, before),
        note=say("recorded.levels_note"),
    )


def _wide(values: Sequence[float]) -> bool:
    """Whether an axis is better by ratios."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > 20
