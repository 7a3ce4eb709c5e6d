"""The page of several fits side by side: quality against size, and a row each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantailor.pages import numbers
from quantailor.pages.comparisons import loss_text, metric_name
from quantailor.pages.document import (
    Cell,
    Column,
    Document,
    Intervals,
    Mark,
    Pareto,
    Point,
    State,
    Step,
    Table,
    Verdict,
    say,
    section,
)
from quantailor.pages.reading import Found

_MOST_ROWS = 400


def compared(found: Sequence[tuple[str, dict[str, Any]]], subject: str) -> Document:
    """Several fits: quality against size, and a row each. `found`: (folder's name, its report.json)."""
    runs = [(name, Found(report, f"{name}/report.json")) for name, report in found]
    for _, run in runs:
        run.needed("verdict", "metric", "scheme", "final", "float")
    meeting = [(n, r) for n, r in runs if r.text("verdict") != "infeasible"]
    sized = [(n, r) for n, r in meeting if r.number("size_bytes")]
    best = min(sized, key=lambda pair: pair[1].number("size_bytes") or 0, default=None)
    count = numbers.whole(len(runs)) or ""
    word = say("word.compare", met=numbers.whole(len(meeting)), count=count)
    if best is None:
        verdict = Verdict("bad" if not meeting else "neutral", word, say("verdict.compare_none", count=count))
    else:
        small, large = best[1].number("size_bytes") or 0, best[1].number("float_size_bytes") or 0
        values = {"best": best[0], "size": numbers.size(small), "ratio": numbers.times(large / small) or "?"}
        verdict = Verdict("good", word, say("verdict.compare", **values))
    points = []
    for name, run in runs:
        size, loss = run.number("size_bytes"), run.object("final").number("loss")
        if size is not None and loss is not None:
            points.append(Point(name, size / 1e6, 100 * loss, best is not None and name == best[0]))
    if (size := runs[0][1].number("float_size_bytes")) is not None:
        points.append(Point(say("step.float"), size / 1e6, 0.0))
    chart = Pareto(
        say("chart.pareto"), say("axis.size"), say("axis.loss"), tuple(points), note=say("chart.pareto_note")
    )
    rows = [step for name, run in runs[:24] if (step := _relative(name, run)) is not None]
    allowed = {run.number("tolerance") for _, run in runs}
    limit = None
    if len(allowed) == 1 and (tolerance := allowed.pop()) is not None:
        limit = Mark(100 * tolerance, say("mark.tolerance", tolerance=numbers.tolerance(tolerance)), "good")
    losses = Intervals(say("chart.relative"), say("axis.loss"), tuple(rows), limit) if len(rows) > 1 else None
    page = Document("compare", subject, verdict, version=runs[0][1].object("environment").text("quantailor"))
    return page.with_sections(
        section("pareto", chart if len(points) > 1 else None, losses),
        section("runs", _runs_table(runs, best and best[0])),
    )


def _relative(name: str, run: Found) -> Step | None:
    """The loss of a run's result in % of float, with the interval of the change, which was measured in pairs."""
    final, base = run.object("final"), run.object("float").number("value")
    loss = final.number("loss")
    if loss is None:
        return None
    step = next((s for s in run.objects("steps") if s.text("name") == final.text("name")), Found({}))
    interval = step.pair("change_interval")
    state: State = "bad" if run.text("verdict") == "infeasible" else "good"
    if interval is None or not base:
        return Step(name, 100 * loss, state=state)
    ends = [100 * end / abs(base) * (-1 if run.text("metric") == "accuracy" else 1) for end in interval]
    return Step(name, 100 * loss, min(ends), max(ends), state)


def _runs_table(runs: list[tuple[str, Found]], best: str | None) -> Table:
    columns = (
        Column(say("column.run"), name_like=True),
        Column(say("column.scheme")),
        Column(say("column.verdict")),
        Column(metric_name(runs[0][1].text("metric")), numeric=True),
        Column(say("column.loss"), numeric=True),
        Column(say("column.tolerance"), numeric=True),
        Column(say("column.size"), numeric=True),
        Column(say("column.bits"), numeric=True),
    )
    rows = []
    for name, run in runs[:_MOST_ROWS]:
        final, verdict = run.object("final"), run.text("verdict")
        size, bits, loss = run.number("size_bytes"), run.number("bits_per_weight"), final.number("loss")
        known = verdict in ("ptq", "hybrid", "qat", "infeasible")
        state: State = "bad" if verdict == "infeasible" else "good"
        rows.append(
            (
                Cell(name),
                Cell(run.text("scheme")),
                Cell(say(f"word.{verdict}") if known else verdict, state=state),
                Cell(numbers.fixed(final.number("value")) or say("not_finite"), final.number("value")),
                Cell(loss_text(loss), loss),
                Cell(numbers.tolerance(run.number("tolerance")) or "", run.number("tolerance")),
                Cell(numbers.size(size) or "", size, "good" if name == best else "neutral"),
                Cell("" if bits is None else f"{bits:.2f}", bits),
            )
        )
    return Table(columns, tuple(rows))
