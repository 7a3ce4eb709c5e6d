"""Training curves out of what a run wrote down, and what in them is an alarm."""

from __future__ import annotations

import math
import re
import statistics
from typing import Any

from quantailor.pages import numbers
from quantailor.pages.alarms import reported
from quantailor.pages.document import Lines, Mark, Pairs, Remarks, Said, Series, Text, finite, say
from quantailor.pages.reading import Found

_ALARMING = re.compile(r"diverged|not finite|NaN|skipped")  # in a run's own notes


def training_chart(training: Found, metric: str = "", name: Text = "") -> Lines | None:
    """The score by step, the best step, and alarms: values that are not finite, values worse than the start, and what
    the run itself reported as `alarms`, objects with a `step` and a `what`. None with fewer than two values."""
    rows = [row for row in _rows(training.value.get("curve")) if len(row) >= 2]
    classes = metric == "accuracy" or (not metric and any(len(row) > 2 for row in rows))
    sign = -1.0 if classes else 1.0  # scores are lower-is-better: of an accuracy the negative is kept
    steps = [(finite(row[0]), finite(row[1])) for row in rows]
    points = tuple((x, sign * y) for x, y in steps if x is not None and y is not None)
    if len(points) < 2:
        return None
    start = points[0][1]
    alarms = [
        Mark(x, say("alarm.not_finite", step=numbers.whole(x)), "bad") for x, y in steps if x is not None and y is None
    ]
    worst = [(x, y) for x, y in points[1:] if sign * y > sign * start]
    if worst:
        x, y = max(worst, key=lambda p: sign * p[1])
        alarms.append(
            Mark(
                x, say("alarm.worse", step=numbers.whole(x), value=numbers.plain(y), start=numbers.plain(start)), "fair"
            )
        )
    for alarm in training.objects("alarms"):
        step = alarm.number("step")
        if step is not None:
            alarms.append(Mark(step, say("alarm.reported", step=numbers.whole(step), what=reported(alarm)), "bad"))
    best = training.number("best_step")
    held = dict(points).get(best) if best is not None else None
    alarms += [Mark(None, note, "bad") for note in training.texts("notes") if _ALARMING.search(note)]
    levels = (Mark(start, say("level.start")),)
    if best and held is not None:
        alarms.insert(0, Mark(best, say("mark.best", step=numbers.whole(best), value=numbers.plain(held)), "good"))
    values = [y for _, y in points]
    return Lines(
        say("chart.training", name=name) if name else say("chart.training_plain"),
        say("axis.step"),
        say("metric.accuracy") if classes else say("metric.nats_per_token"),
        (Series(say("series.held_out"), points),),
        log_y=min(values) > 0 and max(values) / min(values) > 8,
        levels=levels,
        alarms=tuple(alarms[:12]),
        calm=say("alarm.none") if all(mark.state == "good" for mark in alarms) else "",
        note=say("curve.note"),
    )


def loss_chart(training: Found, name: Text = "") -> Lines | None:
    """The training loss by step; an alarm is a value above twice the median of the five before it. None if not kept."""
    points = []
    for row in _rows(training.value.get("losses")):
        x, y = (finite(row[0]), finite(row[1])) if len(row) >= 2 else (None, None)
        if x is not None and y is not None:
            points.append((x, y))
    if len(points) < 3:
        return None
    values = [y for _, y in points]
    spikes = [
        Mark(x, say("alarm.spike", step=numbers.whole(x), value=numbers.plain(y)), "bad")
        for i, (x, y) in enumerate(points)
        if i >= 3 and y > 2 * statistics.median(values[max(0, i - 5) : i]) > 0
    ]
    return Lines(
        say("chart.losses", name=name) if name else say("chart.losses_plain"),
        say("axis.step"),
        say("axis.loss_nats"),
        (Series(say("series.losses"), tuple(points)),),
        log_y=min(values) > 0 and max(values) / min(values) > 8,
        alarms=tuple(spikes[:6]),
        note=say("losses.note"),
    )


def training_facts(training: Found) -> Pairs | None:
    """Settings of a run that the receipt tells."""
    told: list[tuple[Text, Text]] = []
    for key, form in (("steps", numbers.whole), ("best_step", numbers.whole), ("trainable", numbers.whole)):
        if (value := training.number(key)) is not None:
            told.append((say(f"training.{key}"), form(value) or ""))
    for key in ("learning_rate", "scale_learning_rate"):
        if (value := training.number(key)) is not None:
            told.append((say(f"training.{key}"), f"{value:.3g}"))
    return Pairs(tuple(told)) if told else None


def training_notes(training: Found) -> Remarks | None:
    notes = [note for note in training.texts("notes") if not _ALARMING.search(note)]
    return Remarks(tuple(notes)) if notes else None


def score_text(score: Any) -> Said | None:
    """The first number of a stored score, as what it measures."""
    values = score if isinstance(score, list) else []
    first = finite(values[0]) if values else None
    if first is None or not math.isfinite(first):
        return None
    if len(values) > 1:
        return say("score.accuracy", value=numbers.percent(-first, 2))
    return say("score.nats", value=f"{first:.4f}")


def _rows(value: Any) -> list[list[Any]]:
    return [row for row in value if isinstance(row, list)] if isinstance(value, list) else []
