"""Pages of `search` (Auto-QAT) and of `nas`: the verdict, the front, everything that was tried, and what it cost."""

from __future__ import annotations

from quantailor.pages import numbers
from quantailor.pages.document import (
    Block,
    Cell,
    Column,
    Document,
    Figure,
    Lines,
    Mark,
    Pairs,
    Pareto,
    Point,
    Remarks,
    Series,
    State,
    Table,
    Text,
    Verdict,
    finite,
    say,
    section,
)
from quantailor.pages.reading import Found

_MOST_ROWS = 400


def is_search(data: Found) -> bool:
    return {"trials", "front", "budgets", "cost_unit"} <= set(data.value)


def is_nas(data: Found) -> bool:
    return {"candidates", "supernet", "max_bytes", "winner"} <= set(data.value)


def searched(data: Found, name: str) -> Document:
    """Recipes under an accuracy, a latency and a time."""
    page = Document("search", name, _verdict(data), _figures(data))
    return page.with_sections(
        section("budgets", _budgets(data)),
        section("front", _front(data), lead=data.text("latency_how")),
        section("trials", _trials(data)),
        section("cost", _cost(data)),
        section("notes", _notes(data)),
        section("again", _configuration(data)),
    )


def architectures(data: Found, name: str) -> Document:
    """Parts of a supernet under so many bytes."""
    final, winner = data.object("final"), data.object("winner")
    sentence = say("verdict.nas", winner=winner.text("name", "?"), loss=numbers.change(final.number("loss")) or "?")
    page = Document("nas", name, Verdict("neutral", say("word.search"), sentence), _nas_figures(data))
    return page.with_sections(
        section("front", _candidates(data)),
        section("candidates", _candidate_table(data)),
        section("training", _supernet_curve(data)),
        section("cost", _cost(data)),
        section("notes", _notes(data)),
        section("again", _configuration(data)),
    )


# ------------------------------------------------------------------------------------------------ search


def _verdict(data: Found) -> Verdict:
    recipe, final = data.object("winner").text("recipe", "?"), data.object("final")
    values = {"recipe": recipe, "loss": numbers.change(final.number("loss")) or "?"}
    if data.text("verdict") == "feasible":
        return Verdict("good", say("word.feasible"), say("verdict.feasible", **values))
    if data.text("verdict") == "infeasible":
        return Verdict("bad", say("word.closest"), say("verdict.closest", **values))
    return Verdict("neutral", say("word.search"), say("verdict.trials", recipe=recipe))


def _figures(data: Found) -> tuple[Figure, ...]:
    final, figures = data.object("final"), []
    if (value := numbers.plain(final.number("value"))) is not None:
        before = numbers.plain(data.object("float").number("value")) or "?"
        figures.append(Figure(data.text("metric", "?"), value, say("figure.in_float", before=before)))
    if (latency := numbers.plain(final.number("latency_ms"))) is not None:
        figures.append(Figure(say("figure.latency"), f"{latency} ms"))
    if (size := numbers.size(final.number("size_bytes"))) is not None:
        figures.append(Figure(say("figure.size"), size))
    figures.append(Figure(say("figure.trials"), numbers.whole(len(data.objects("trials"))) or ""))
    if (took := numbers.seconds(data.object("cost").number("seconds"))) is not None:
        figures.append(Figure(say("figure.took"), took))
    return tuple(figures)


def _budgets(data: Found) -> Table | None:
    """A row a budget: what was allowed, what was measured at the end, whether it holds."""
    budgets, final, cost = data.object("budgets"), data.object("final"), data.object("cost")
    if not final:
        return None
    seconds = budgets.number("minutes")
    rows: list[tuple[Cell, ...]] = []
    for key, allowed, got, show in (
        ("budget.loss", budgets.number("loss"), final.number("loss"), numbers.change),
        ("budget.latency", budgets.number("latency_ms"), final.number("latency_ms"), _ms),
        ("budget.size", budgets.number("size_bytes"), final.number("size_bytes"), numbers.size),
        ("budget.time", None if seconds is None else 60 * seconds, cost.number("seconds"), numbers.seconds),
    ):
        if allowed is None or got is None:
            continue
        state: State = "good" if got <= allowed else "bad"
        answer = say("budget.kept") if got <= allowed else say("budget.broken")
        shown = Cell(show(allowed) or "", allowed), Cell(show(got) or "", got), Cell(answer, state=state)
        rows.append((Cell(say(key)), *shown))
    columns = (
        Column(say("column.budget")),
        Column(say("column.allowed"), numeric=True),
        Column(say("column.measured"), numeric=True),
        Column(say("column.verdict")),
    )
    return Table(columns, tuple(rows)) if rows else None


def _front(data: Found) -> Pareto | None:
    unit = data.text("cost_unit", "?")
    winner, points = data.object("winner").number("number"), []
    for one in data.objects("trials")[:_MOST_ROWS]:
        loss, cost = one.number("loss"), one.number("cost")
        if loss is not None and cost is not None and loss < 1e6:
            at = cost / 1e6 if unit == "bytes" else cost
            points.append(Point(one.text("recipe"), at, 100 * loss, one.number("number") == winner))
    if len({(p.x, p.y) for p in points}) < 2:
        return None
    allowed = finite(data.object("budgets").number("loss"))
    limit = None if allowed is None else Mark(100 * allowed, say("mark.allowed"))
    x = say("axis.size") if unit == "bytes" else say("axis.cost", unit=unit)
    return Pareto(say("chart.recipes"), x, say("axis.loss"), tuple(points), limit=limit, note=say("chart.pareto_note"))


def _trials(data: Found) -> Table | None:
    trials = data.objects("trials")
    if not trials:
        return None
    front = data.value.get("front")
    kept = front if isinstance(front, list) else []
    unit = data.text("cost_unit", "?")
    columns = (
        Column(say("column.trial"), numeric=True),
        Column(say("column.recipe"), wide=True),
        Column(say("column.loss"), numeric=True),
        Column(say("column.cost", unit=unit), numeric=True),
        Column(say("column.steps"), numeric=True),
        Column(say("column.time"), numeric=True),
        Column(say("column.reason"), wide=True),
    )
    rows = []
    for one in trials[:_MOST_ROWS]:
        state: State = "good" if one.value.get("number") in kept else "neutral"
        loss, cost, seconds = one.number("loss"), one.number("cost"), one.number("seconds")
        rows.append(
            (
                Cell(one.text("number"), one.number("number")),
                Cell(one.text("recipe"), state=state),
                Cell(numbers.change(loss) or "", loss),
                Cell(numbers.plain(cost) or "", cost),
                Cell(one.text("steps_done"), one.number("steps_done")),
                Cell(numbers.seconds(seconds) or "", seconds),
                Cell(one.text("reason")),
            )
        )
    left = len(trials) - len(rows)
    return Table(columns, tuple(rows), note=say("table.cut", left=numbers.whole(left)) if left else say("trials.note"))


def _cost(data: Found) -> Block | None:
    cost = data.object("cost")
    rows: list[tuple[Text, Text]] = []
    for key in ("trial_seconds", "search_seconds", "supernet_seconds", "winner_seconds", "seconds", "budget_seconds"):
        if (shown := numbers.seconds(cost.number(key))) is not None:
            rows.append((say(f"cost.{key}"), shown))
    if (workers := numbers.whole(cost.number("workers"))) is not None:
        rows.append((say("cost.workers"), workers))
    if stopped := data.text("stopped"):
        rows.append((say("cost.stopped"), stopped))
    return Pairs(tuple(rows)) if rows else None


# ------------------------------------------------------------------------------------------------ architectures


def _nas_figures(data: Found) -> tuple[Figure, ...]:
    final, figures = data.object("final"), []
    if (value := numbers.plain(final.number("value"))) is not None:
        before = numbers.plain(data.object("float").number("value")) or "?"
        figures.append(Figure(data.text("metric", "?"), value, say("figure.in_float", before=before)))
    if (size := numbers.size(data.object("winner").number("size_bytes"))) is not None:
        allowed = numbers.size(data.number("max_bytes")) or "?"
        figures.append(Figure(say("figure.size"), size, say("figure.at_most", allowed=allowed)))
    if (took := numbers.seconds(data.object("cost").number("seconds"))) is not None:
        figures.append(Figure(say("figure.took"), took))
    return tuple(figures)


def _candidates(data: Found) -> Pareto | None:
    winner, points = data.object("winner").text("name"), []
    for one in data.objects("candidates")[:_MOST_ROWS]:
        score, size = one.number("score"), one.number("size_bytes")
        if score is not None and size is not None:
            points.append(Point(one.text("name"), size / 1e6, score, one.text("name") == winner))
    if len({(p.x, p.y) for p in points}) < 2:
        return None
    note = say("chart.pareto_note")
    return Pareto(say("chart.candidates"), say("axis.size"), say("axis.loss_nats"), tuple(points), note=note)


def _candidate_table(data: Found) -> Table | None:
    found = data.objects("candidates")
    if not found:
        return None
    names = ("depth", "width", "heads", "ffn", "bits")
    columns = (
        *(Column(say(f"nas.{name}"), numeric=True) for name in names),
        Column(say("nas.score"), numeric=True),
        Column(say("column.size"), numeric=True),
    )
    rows = []
    for one in found[:_MOST_ROWS]:
        score, size = one.number("score"), one.number("size_bytes")
        cells = [Cell(one.text(name), one.number(name)) for name in names]
        rows.append((*cells, Cell(numbers.fixed(score, 4) or "", score), Cell(numbers.size(size) or "", size)))
    left = len(found) - len(rows)
    return Table(columns, tuple(rows), note=say("table.cut", left=numbers.whole(left)) if left else say("nas.note"))


def _supernet_curve(data: Found) -> Lines | None:
    losses = data.object("supernet").value.get("losses")
    values = [finite(v) for v in losses[:100_000]] if isinstance(losses, list) else []
    points = tuple((float(i), v) for i, v in enumerate(values, 1) if v is not None)
    if len(points) < 2:
        return None
    every = max(1, len(points) // 400)
    series = Series(say("nas.largest"), points[::every])
    return Lines(say("chart.supernet"), say("axis.step"), say("axis.loss_nats"), (series,))


# ------------------------------------------------------------------------------------------------ both


def _notes(data: Found) -> Remarks | None:
    notes = data.texts("notes")[:200]
    return Remarks(tuple(notes)) if notes else None


def _configuration(data: Found) -> Block | None:
    rows: list[tuple[Text, Text]] = []
    space = data.object("space").value
    for key, values in list(space.items())[:20]:
        shown = ", ".join(str(v) for v in values[:50]) if isinstance(values, list) else str(values)
        rows.append((str(key)[:200], shown[:500]))
    rows += [(name[:200], value[:500]) for name, value in data.strings("environment")[:40]]
    return Pairs(tuple(rows), say("again.configuration")) if rows else None


def _ms(value: float | None) -> str | None:
    shown = numbers.plain(value)
    return None if shown is None else f"{shown} ms"
