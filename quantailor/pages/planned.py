"""The page of `plan`: what every way would cost, which one to take, and why. Nothing here was measured on the model."""

from __future__ import annotations

from quantailor.pages import numbers
from quantailor.pages.document import (
    Cell,
    Column,
    Command,
    Document,
    Figure,
    Intervals,
    Pairs,
    Remarks,
    State,
    Step,
    Table,
    Text,
    Verdict,
    say,
    section,
)
from quantailor.pages.generic import amount, range_text, sections_of
from quantailor.pages.reading import Found

_SHOWN = ("ways", "decision", "command", "checklist", "environment", "notes", "model", "scheme")
_BASES = ("counted", "measured", "table", "assumed")
_LEVELS: dict[str, State] = {"ok": "good", "advice": "neutral", "warning": "fair", "error": "bad"}


def is_plan(data: Found) -> bool:
    return {"ways", "decision", "storage"} <= set(data.value)


def planned(data: Found, name: str) -> Document:
    """The decision first, then time, memory, money and disk of each way, then the reasons and what they rest on."""
    ways, decision = data.object("ways"), data.object("decision")
    chosen = decision.text("way")
    rest = Found({k: v for k, v in data.value.items() if k not in _SHOWN}, data.what)
    environment = data.strings("environment")
    notes = data.texts("notes")[:200]
    command = data.text("command")
    version = data.object("environment").text("quantailor")
    page = Document("plan", data.text("model") or name, _verdict(data), _figures(ways.object(chosen)), version=version)
    return page.with_sections(
        section("plan", _time_chart(ways, chosen), _ways_table(ways, chosen)),
        section("reasons", _reasons(decision)),
        section("checklist", _checklist(data)),
        *sections_of(rest),
        section("notes", Remarks(tuple(notes)) if notes else None),
        section(
            "again",
            Command(command) if command else None,
            Pairs(tuple(environment), say("again.environment")) if environment else None,
        ),
    )


def _verdict(data: Found) -> Verdict:
    decision = data.object("decision")
    way = data.object("ways").object(decision.text("way"))
    within = decision.flag("expected_within_tolerance")
    values = {
        "scheme": data.text("scheme"),
        "meaning": decision.text("meaning") or decision.text("way"),
        "time": _short(way, "seconds"),
        "memory": _short(way, "peak_bytes"),
        "money": _short(way, "money"),
    }
    state: State = "good" if within else "fair"
    if not way:
        return Verdict("bad", say("word.plan_none"), say("verdict.plan_none", **values))
    key = "verdict.plan" if within is not False else "verdict.plan_unsure"
    return Verdict(state, say("word.plan_way", way=decision.text("way")), say(key, **values))


def _short(way: Found, key: str) -> str:
    return amount(key, way.object(key).number("value")) or "?"


def _figures(way: Found) -> tuple[Figure, ...]:
    figures = []
    for key in ("seconds", "peak_bytes", "money"):
        told = way.object(key)
        if told.number("value") is not None:
            between = range_text(key, told.value)
            figures.append(Figure(say(f"plan.{key}"), amount(key, told.number("value")), between))
    if (disk := way.number("disk_bytes")) is not None:
        figures.append(Figure(say("plan.disk_bytes"), numbers.size(disk) or ""))
    return tuple(figures)


def _time_chart(ways: Found, chosen: str) -> Intervals | None:
    rows = []
    for name in list(ways.value)[:24]:
        told = ways.object(name).object("seconds")
        if (value := told.number("value")) is not None:
            state: State = "good" if name == chosen else "neutral"
            rows.append(Step(name, value, told.number("low"), told.number("high"), state))
    if len(rows) < 2:
        return None
    values = [row.value for row in rows]
    log = min(values) > 0 and max(values) / min(values) > 8
    return Intervals(say("chart.ways"), say("axis.way_seconds"), tuple(rows), log_x=log, note=say("chart.ways_note"))


def _ways_table(ways: Found, chosen: str) -> Table | None:
    keys = ("seconds", "peak_bytes", "money")
    columns = (
        Column(say("column.way")),
        Column(say("column.steps"), numeric=True),
        *(Column(say(f"plan.{key}"), numeric=True) for key in keys),
        Column(say("plan.disk_bytes"), numeric=True),
        Column(say("column.fits")),
    )
    rows = []
    for name in list(ways.value)[:200]:
        way = ways.object(name)
        fits, disk = way.flag("fits"), way.number("disk_bytes")
        cells = [Cell(name, state="good" if name == chosen else "neutral")]
        cells.append(Cell(numbers.whole(way.number("steps")) or "", way.number("steps")))
        for key in keys:
            told = way.object(key)
            value = told.number("value")
            cells.append(Cell(amount(key, value), value, detail=range_text(key, told.value)))
        cells.append(Cell(numbers.size(disk) or "", disk))
        shown: Text = "" if fits is None else say("yes") if fits else say("no")
        cells.append(Cell(shown, state="bad" if fits is False else "neutral"))
        rows.append(tuple(cells))
    return Table(columns, tuple(rows), note=say("plan.note")) if rows else None


def _reasons(decision: Found) -> Table | None:
    reasons = decision.objects("reasons")
    if not reasons:
        return None
    columns = (
        Column(say("column.rule")),
        Column(say("column.why"), wide=True),
        Column(say("column.basis")),
        Column(say("column.source"), wide=True),
    )
    rows = []
    for reason in reasons[:200]:
        basis = reason.text("basis")
        shown: Text = say(f"basis.{basis}") if basis in _BASES else basis
        state: State = "fair" if basis == "assumed" else "neutral"
        rows.append(
            (
                Cell(reason.text("rule")),
                Cell(reason.text("text")),
                Cell(shown, state=state),
                Cell(reason.text("source")),
            )
        )
    return Table(columns, tuple(rows))


def _checklist(data: Found) -> Table | None:
    findings = data.objects("checklist")
    if not findings:
        return None
    columns = (Column(say("column.item")), Column(say("column.level")), Column(say("column.why"), wide=True))
    rows = []
    for one in findings[:200]:
        level = one.text("level")
        word: Text = say(f"level.{level}") if level in _LEVELS else level
        rows.append((Cell(one.text("item")), Cell(word, state=_LEVELS.get(level, "neutral")), Cell(one.text("text"))))
    return Table(columns, tuple(rows))
