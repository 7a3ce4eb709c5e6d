"""Pages of `sensitivity` and of a search for a mix of schemes, from what their --json holds."""

from __future__ import annotations

import re
from typing import Any

from quantailor.pages import numbers
from quantailor.pages.document import (
    Block,
    Cell,
    Column,
    Document,
    Figure,
    Heat,
    Pairs,
    Pareto,
    Point,
    Remarks,
    State,
    Table,
    Text,
    Verdict,
    finite,
    say,
    section,
)
from quantailor.pages.layers import merged_rows
from quantailor.pages.reading import Found

_MOST_ROWS, _MOST_HEAT_ROWS = 400, 160
_BLOCK = re.compile(r"^(.{0,200}?)(\d{1,6})\.(.{1,200})$", re.DOTALL)
_BITS = re.compile(r"w(\d(?:\.\d+)?)a|(nf4)")
_HOW = ("measured", "fisher")


def is_sensitivity(data: Found) -> bool:
    return {"units", "types", "bits"} <= set(data.value)


def is_mix(data: Found) -> bool:
    return {"assigned", "candidates", "budget"} <= set(data.value)


def sensitivities(data: Found, name: str) -> Document:
    """What each unit and each type of layers costs at each number of bits."""
    units, advice = data.objects("units"), data.objects("recommendation")
    bits = [str(b) for b in data.value["bits"]] if isinstance(data.value["bits"], list) else []
    advised = {a.text("role"): a.text("bits") for a in advice}
    heat = _heat(
        say("chart.sensitivity"),
        [(u.text("name"), u.object("kl").value, advised.get(u.text("role"))) for u in units],
        bits,
    )
    types = data.object("types")
    by_type = _heat(
        say("chart.types"), [(role, types.object(role).value, advised.get(role)) for role in types.value], bits
    )
    page = Document("sensitivity", name, _sensitivity_verdict(units, bits), _sensitivity_figures(data, units))
    lead = say("sensitivity.lead", positions=numbers.whole(data.number("positions")) or "?")
    notes = data.texts("notes")[:200]
    facts = ("metric", "how", "method", "group_size", "positions", "seconds", "fingerprint")
    return page.with_sections(
        section("types", by_type, _advice(advice)),
        section("sensitivity", heat, lead=lead),
        section("notes", Remarks(tuple(notes)) if notes else None),
        section("again", _facts(data, facts)),
    )


def mix(data: Found, name: str) -> Document:
    """A scheme for every unit, what it costs, and what else was tried."""
    assigned = data.objects("assigned")
    page = Document("search", name, _mix_verdict(data, assigned), _mix_figures(data))
    rules = data.texts("rules")
    return page.with_sections(
        section("pareto", _candidates(data)),
        section("choice", _assigned_heat(assigned), _assigned_table(assigned)),
        section("notes", Remarks(tuple(notes)) if (notes := data.texts("notes")[:200]) else None),
        section(
            "again",
            _facts(data, ("scheme", "budget", "budget_unit", "how", "passes", "seconds")),
            Remarks(tuple(rules[:_MOST_ROWS]), title=say("again.rules")) if rules else None,
        ),
    )


def _sensitivity_verdict(units: list[Found], bits: list[str]) -> Verdict:
    lowest = min(bits, key=lambda b: finite_or(b, 99), default="")
    known = [(u.text("name"), value) for u in units if (value := u.object("kl").number(lowest)) is not None]
    if not known:
        return Verdict("neutral", say("word.sensitivity"), say("verdict.sensitivity_none"))
    worst, least = max(known, key=lambda pair: pair[1]), min(known, key=lambda pair: pair[1])
    values = {"bits": lowest, "worst": worst[0], "kl": numbers.plain(worst[1]), "least": least[0]}
    return Verdict(
        "neutral", say("word.sensitivity"), say("verdict.sensitivity", **values, low=numbers.plain(least[1]))
    )


def finite_or(text: str, default: float) -> float:
    """A number written as text."""
    try:
        return float(text)
    except ValueError:
        return default


def _sensitivity_figures(data: Found, units: list[Found]) -> tuple[Figure, ...]:
    how = data.text("how")
    figures = [Figure(say("figure.units"), numbers.whole(len(units)) or "")]
    if how:
        figures.append(Figure(say("figure.how"), say(f"how.{how}") if how in _HOW else how))
    if positions := numbers.whole(data.number("positions")):
        figures.append(Figure(say("figure.positions"), positions))
    if seconds := numbers.seconds(data.number("seconds")):
        figures.append(Figure(say("figure.took"), seconds))
    return tuple(figures)


def _heat(title: Text, rows: list[tuple[str, dict[str, Any], str | None]], bits: list[str]) -> Heat | None:
    """A row a name, a column a number of bits; the advised number is marked."""
    if not rows or not bits:
        return None
    values: list[list[float | None]] = [[finite(held.get(b)) for b in bits] for _, held, _ in rows]
    names, cells, merged = merged_rows([name for name, _, _ in rows], values, _MOST_HEAT_ROWS)
    marked = set() if merged else {(r, bits.index(b)) for r, (_, _, b) in enumerate(rows) if b in bits}
    return Heat(
        title,
        tuple(names),
        tuple(say("heat.bits", bits=b) for b in bits),
        tuple(tuple(row) for row in cells),
        say("unit.kl"),
        corner=say("column.layer"),
        chosen=frozenset(marked),
        note=say("heat.merged") if merged else say("heat.errors_note"),
    )


def _advice(advice: list[Found]) -> Table | None:
    if not advice:
        return None
    columns = (
        Column(say("column.type")),
        Column(say("column.bits"), numeric=True),
        Column("KL", numeric=True),
        Column(say("column.why"), wide=True),
    )
    rows = []
    for one in advice[:_MOST_ROWS]:
        bits, kl = one.number("bits"), one.number("kl")
        shown: Text = say("scheme.float") if bits is None else f"{bits:g}"
        state: State = "fair" if bits is None else "neutral"
        rows.append(
            (
                Cell(one.text("role")),
                Cell(shown, bits, state),
                Cell("" if kl is None else f"{kl:.5f}", kl),
                Cell(one.text("reason")),
            )
        )
    return Table(columns, tuple(rows), title=say("table.advice"), note=say("table.advice_note"))


def _mix_verdict(data: Found, assigned: list[Found]) -> Verdict:
    kl, uniform = data.number("kl"), data.number("uniform_kl")
    values = {
        "schemes": numbers.whole(len({a.text("scheme") for a in assigned})),
        "bits": numbers.plain(data.number("average_bits")) or "?",
        "kl": numbers.plain(kl) or say("not_finite"),
        "uniform": data.text("uniform", "?"),
        "uniform_kl": numbers.plain(uniform) or "?",
    }
    if kl is None or uniform is None:
        return Verdict("neutral", say("word.search"), say("verdict.mix_alone", **values))
    if kl < uniform:
        return Verdict("good", say("word.mix_better"), say("verdict.mix_better", **values))
    return Verdict("fair", say("word.mix_no_better"), say("verdict.mix_no_better", **values))


def _mix_figures(data: Found) -> tuple[Figure, ...]:
    figures = []
    if (kl := numbers.plain(data.number("kl"))) is not None:
        figures.append(Figure(say("figure.kl"), kl, say("figure.kl_detail")))
    if (bits := numbers.plain(data.number("average_bits"))) is not None:
        figures.append(Figure(say("figure.average"), bits, say("figure.average_detail")))
    if (size := numbers.size(data.number("size_bytes"))) is not None:
        figures.append(Figure(say("figure.size"), size))
    if (seconds := numbers.seconds(data.number("seconds"))) is not None:
        figures.append(Figure(say("figure.took"), seconds))
    return tuple(figures)


def _candidates(data: Found) -> Pareto | None:
    in_bytes = data.text("budget_unit") == "bytes"
    points = []
    found = [(c.text("name"), c.number("cost"), c.number("kl")) for c in data.objects("candidates")[:_MOST_ROWS]]
    best = min((kl for _, _, kl in found if kl is not None), default=None)
    for name, cost, kl in found:
        if cost is not None and kl is not None:
            points.append(Point(name, cost / 1e6 if in_bytes else cost, kl, kl == best))
    if len({(p.x, p.y) for p in points}) < 2:
        return None
    x = say("axis.size") if in_bytes else say("axis.cost", unit=data.text("budget_unit", "?"))
    return Pareto(say("chart.candidates"), x, say("unit.kl"), tuple(points), note=say("chart.pareto_note"))


def _assigned_heat(assigned: list[Found]) -> Heat | None:
    """Bits of the weights: a row a block, a column a unit of it."""
    found: dict[str, dict[str, float]] = {}
    for one in assigned:
        match, scheme = _BLOCK.match(one.text("unit")), _BITS.search(one.text("scheme"))
        if match and scheme:
            found.setdefault(f"{match[1]}{match[2]}", {})[match[3]] = 4.0 if scheme[2] else float(scheme[1])
    columns = list(dict.fromkeys(name for row in found.values() for name in row))
    if len(found) < 2 or len(columns) > 16:
        return None
    values: list[list[float | None]] = [[row.get(name) for name in columns] for row in found.values()]
    names, cells, merged = merged_rows(list(found), values, _MOST_HEAT_ROWS)
    return Heat(
        say("chart.bits"),
        tuple(names),
        tuple(columns),
        tuple(tuple(row) for row in cells),
        "",
        corner=say("column.block"),
        note=say("heat.bits_merged") if merged else say("heat.bits_note"),
    )


def _assigned_table(assigned: list[Found]) -> Table | None:
    if not assigned:
        return None
    columns = (Column(say("column.unit"), name_like=True), Column(say("column.type")), Column(say("column.scheme")))
    rows = tuple((Cell(a.text("unit")), Cell(a.text("role")), Cell(a.text("scheme"))) for a in assigned[:_MOST_ROWS])
    left = len(assigned) - len(rows)
    return Table(columns, rows, note=say("table.cut", left=numbers.whole(left)) if left else "")


def _facts(data: Found, keys: tuple[str, ...]) -> Block | None:
    rows: list[tuple[Text, Text]] = []
    for key in keys:
        if value := data.text(key):
            rows.append((say(f"fact.{key}"), value))
    return Pairs(tuple(rows), say("again.configuration")) if rows else None
