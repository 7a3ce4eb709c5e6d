"""Any result document as a page, read by the shape of its parts, so that a command may add keys at any time.

    {"value", "low", "high", "basis"}            a planned figure: with its interval and what it rests on
    a list of {name, scheme, score}              sensitivities: a heat map by layer and scheme
    a list of {name, scores: {scheme: score}}    the same
    a list of {cost, loss}                       candidates: a Pareto chart
    `reasons`, `notes`                           lines of text
    other lists of objects, objects, values      tables, pairs

Keys that say the same thing are listed below. Everything that is there is shown; nothing is guessed at.
"""

from __future__ import annotations

from typing import Any

from quantailor.pages import numbers
from quantailor.pages.document import (
    Block,
    Cell,
    Column,
    Command,
    Document,
    Figure,
    Heat,
    Pairs,
    Pareto,
    Point,
    Remarks,
    Section,
    Table,
    Text,
    Verdict,
    finite,
    say,
    section,
)
from quantailor.pages.layers import merged_rows
from quantailor.pages.reading import Found

_NAMES = ("unit", "layer", "module", "name", "route", "way", "role", "method")
_SCHEMES = ("scheme", "bits")
_SCORES = ("score", "kl", "divergence", "sensitivity", "loss")
_COSTS = ("size_bytes", "bytes", "bits_per_weight", "latency_ms", "seconds")
_LOSSES = ("loss", "kl", "divergence", "score", "value")
_TEXT_KEYS = ("reasons", "notes", "warnings", "assumptions", "advice", "why")
_SENTENCES = ("summary", "sentence", "recommendation", "advice", "verdict")
_KINDS = ("plan", "search", "sensitivity")
_AGAIN = ("command", "environment", "seed", "versions", "out")
_MOST_ROWS, _MOST_COLUMNS, _MOST_DEPTH = 400, 10, 3
_BASES = ("counted", "measured", "table", "assumed")


def generic(data: Found, name: str) -> Document:
    """The page of any object."""
    kind = _kind(data, name)
    sections = [s for s in (*sections_of(data), _again(data)) if s.blocks]
    version = data.object("environment").text("quantailor") or data.object("versions").text("quantailor")
    page = Document(kind, name, _verdict(data, kind, name), _figures(data), version=version)
    return page.with_sections(*sections)


def _kind(data: Found, name: str) -> str:
    told = data.text("kind") or data.text("verb") or data.text("command")
    for kind in _KINDS:
        if told == kind or f"quantailor {kind}" in told:
            return kind
    return next((kind for kind in _KINDS if kind in name.lower()), "result")


def _verdict(data: Found, kind: str, name: str) -> Verdict:
    for key in _SENTENCES:
        if text := data.text(key):
            return Verdict("neutral", say(f"word.{kind}"), text)
        inner = data.object(key)
        for part in (*_SENTENCES, *_NAMES):
            if text := inner.text(part):
                return Verdict("neutral", say(f"word.{kind}"), text)
    return Verdict("neutral", say(f"word.{kind}"), say("verdict.result", subject=name))


def _figures(data: Found) -> tuple[Figure, ...]:
    """The first few planned figures or sizes, large."""
    found = []
    for key, value in data.value.items():
        if _is_figure(value):
            found.append(Figure(spoken(key), amount(key, finite(value["value"])), range_text(key, value)))
        elif key.endswith("_bytes") and (size := finite(value)) is not None:
            found.append(Figure(spoken(key), numbers.size(size) or ""))
        elif key in ("bits_per_weight", "kl", "coverage") and (number := finite(value)) is not None:
            found.append(Figure(spoken(key), numbers.plain(number) or ""))
    return tuple(found[:4])


def sections_of(data: Found) -> list[Section]:
    sections, pairs = [], []
    for key, value in list(data.value.items())[:80]:
        if key in _AGAIN or (key in _SENTENCES and isinstance(value, str)):
            continue
        if key in _TEXT_KEYS:
            lines = data.texts(key)
            if lines:
                sections.append(Section(_anchor(key), _title(key), (Remarks(tuple(lines[:200])),)))
        elif _is_figure(value):
            pairs.append((key, value))
        elif isinstance(value, dict | list) and value:
            if blocks := _blocks(value, key, 0):
                sections.append(Section(_anchor(key), _title(key), tuple(blocks)))
        elif value is not None and not isinstance(value, dict | list):
            pairs.append((key, value))
    figures = figure_table([(k, v) for k, v in pairs if _is_figure(v)])
    plain = Pairs(tuple((spoken(k), amount(k, v)) for k, v in pairs if not _is_figure(v)))
    first = section("figures", figures, plain if plain.rows else None)
    return [first, *sections]


def _blocks(value: Any, key: str, depth: int) -> list[Block]:
    """Whatever is in a list or an object, as the charts and tables that its shape asks for."""
    if isinstance(value, list):
        objects = [item for item in value if isinstance(item, dict)]
        if not objects:
            return [Remarks(tuple(_cell_text("", item) for item in value[:200]))]
        heat, pareto = _heat(objects), _pareto(objects)
        return [block for block in (heat, pareto, table_of(objects)) if block is not None]
    figures = [(k, v) for k, v in value.items() if _is_figure(v)]
    plain = [(k, v) for k, v in value.items() if v is not None and not isinstance(v, dict | list)]
    blocks: list[Block] = []
    if figures:
        blocks.append(figure_table(figures))  # type: ignore[arg-type]
    if plain:
        blocks.append(Pairs(tuple((spoken(k), amount(k, v)) for k, v in plain[:_MOST_ROWS])))
    for name, inner in value.items():
        if isinstance(inner, dict | list) and inner and not _is_figure(inner):
            if depth + 1 >= _MOST_DEPTH:
                blocks.append(Pairs(((spoken(name), _cell_text(name, inner)),)))
                continue
            below = _blocks(inner, name, depth + 1)
            blocks += [_titled(below[0], spoken(name)), *below[1:]] if below else []
    return blocks


def _heat(objects: list[dict[str, Any]]) -> Heat | None:
    """Scores by layer and scheme, from either form; None where the objects are no sensitivities."""
    values: dict[str, dict[str, float]] = {}
    chosen: dict[str, str] = {}
    for item in objects:
        found = Found(item)
        name = next((found.text(k) for k in _NAMES if found.text(k)), "")
        scheme = next((found.text(k) for k in _SCHEMES if found.text(k)), "")
        inner = next(
            (item[k] for k in ("scores", "kl", "sensitivity", "by_scheme") if isinstance(item.get(k), dict)), None
        )
        if not name:
            continue
        if inner is not None:
            row = {str(k): number for k, v in inner.items() if (number := finite(_value(v))) is not None}
            values.setdefault(name, {}).update(row)
            if picked := found.text("chosen") or scheme:
                chosen[name] = picked
        elif scheme:
            score = next((n for k in _SCORES if (n := finite(_value(item.get(k)))) is not None), None)
            if score is not None:
                values.setdefault(name, {})[scheme] = score
    columns = list(dict.fromkeys(scheme for row in values.values() for scheme in row))
    if len(values) < 2 or len(columns) < 2 or len(columns) > _MOST_COLUMNS * 2:
        return None
    rows, cells, merged = merged_rows(list(values), [[row.get(c) for c in columns] for row in values.values()], 160)
    marked = set()
    if not merged:
        marked = {(r, columns.index(chosen[n])) for r, n in enumerate(values) if chosen.get(n) in columns}
    return Heat(
        say("chart.sensitivity"), tuple(rows), tuple(columns), tuple(map(tuple, cells)), "",
        corner=say("column.layer"), chosen=frozenset(marked),
        note=say("heat.merged") if merged else say("heat.errors_note"),
    )  # fmt: skip


def _pareto(objects: list[dict[str, Any]]) -> Pareto | None:
    """Loss against cost, where all but a few objects have both."""
    cost = next((k for k in _COSTS if sum(finite(_value(o.get(k))) is not None for o in objects) > 1), None)
    loss = next((k for k in _LOSSES if sum(finite(_value(o.get(k))) is not None for o in objects) > 1), None)
    if cost is None or loss is None:
        return None
    points = []
    for number, item in enumerate(objects[:2000]):
        x, y = finite(_value(item.get(cost))), finite(_value(item.get(loss)))
        name = next((Found(item).text(k) for k in (*_NAMES, *_SCHEMES) if Found(item).text(k)), str(number + 1))
        if x is not None and y is not None:
            points.append(Point(name, x, y, item.get("chosen") is True))
    if len({(p.x, p.y) for p in points}) < 2:
        return None
    return Pareto(say("chart.pareto"), spoken(cost), spoken(loss), tuple(points[:400]), note=say("chart.pareto_note"))


def table_of(objects: list[dict[str, Any]]) -> Table:
    keys = list(dict.fromkeys(str(key) for item in objects[:_MOST_ROWS] for key in item))[:_MOST_COLUMNS]
    numeric = {k for k in keys if any(finite(_value(o.get(k))) is not None for o in objects)}
    long = {k for k in keys if any(isinstance(o.get(k), str) and len(o[k]) > 48 for o in objects)}
    columns = tuple(
        Column(spoken(k), numeric=k in numeric, name_like=k in _NAMES and k not in long, wide=k in long) for k in keys
    )
    rows = tuple(
        tuple(
            Cell(_cell_text(k, item.get(k)), finite(_value(item.get(k))), detail=range_text(k, item.get(k)))
            for k in keys
        )
        for item in objects[:_MOST_ROWS]
    )
    left = len(objects) - len(rows)
    return Table(columns, rows, note=say("table.cut", left=numbers.whole(left)) if left else "")


def figure_table(figures: list[tuple[str, Any]]) -> Table | None:
    if not figures:
        return None
    columns = (
        Column(say("column.name")),
        Column(say("column.value"), numeric=True),
        Column(say("column.range"), numeric=True),
        Column(say("column.basis")),
        Column(say("column.reason"), wide=True),
    )
    rows = []
    for key, value in figures[:_MOST_ROWS]:
        told = Found(value)
        basis = told.text("basis")
        rows.append(
            (
                Cell(spoken(key)),
                Cell(amount(key, told.number("value")), told.number("value")),
                Cell(range_text(key, value)),
                Cell(
                    say(f"basis.{basis}") if basis in _BASES else basis,
                    state="fair" if basis == "assumed" else "neutral",
                ),
                Cell(told.text("source")),
            )
        )
    return Table(columns, tuple(rows))


def _is_figure(value: Any) -> bool:
    return isinstance(value, dict) and {"value", "low", "high"} <= set(value) and finite(value["value"]) is not None


def _value(value: Any) -> Any:
    return value["value"] if _is_figure(value) else value


def range_text(key: str, value: Any) -> str:
    if not _is_figure(value) or value["low"] == value["high"]:
        return ""
    low, high = finite(value["low"]), finite(value["high"])
    return "" if low is None or high is None else f"{amount(key, low)} – {amount(key, high)}"


def amount(key: str, value: Any) -> str:
    """A value in the unit that its key ends in."""
    number = finite(value)
    if number is None:
        return _cell_text(key, value)
    if key.endswith("bytes"):
        return numbers.size(number) or numbers.plain(number) or ""
    if key.endswith("seconds"):
        return numbers.seconds(number) or numbers.plain(number) or ""
    if key == "money":
        return "< 0.01" if 0 < number < 0.01 else f"{number:,.2f}"
    if key.endswith("_ms"):
        return f"{numbers.plain(number)} ms"
    return numbers.plain(number) or ""


def _cell_text(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "✓" if value else "–"
    if _is_figure(value):
        return amount(key, value["value"])
    if finite(value) is not None:
        return amount(key, value)
    if isinstance(value, list):
        return ", ".join(_cell_text("", item) for item in value[:12]) + (" …" if len(value) > 12 else "")
    if isinstance(value, dict):
        parts = [f"{k}: {_cell_text(str(k), v)}" for k, v in list(value.items())[:8]]
        return ", ".join(parts) + (" …" if len(value) > 8 else "")
    return str(value)


def _titled(block: Block, title: Text) -> Block:
    if isinstance(block, Table):
        return Table(block.columns, block.rows, block.sortable, block.note, title)
    if isinstance(block, Pairs):
        return Pairs(block.rows, title)
    return Remarks(block.lines, block.ordered, title) if isinstance(block, Remarks) else block


def _again(data: Found) -> Section:
    command = data.text("command")
    environment = data.strings("environment") or data.strings("versions")
    blocks: list[Block | None] = [
        Command(command) if " " in command else None,
        Pairs(tuple(environment[:40]), say("again.environment")) if environment else None,
    ]
    return section("again", *blocks)


def _title(key: str) -> Text:
    names = {"notes": "section.notes", "reasons": "section.reasons", "sensitivity": "section.sensitivity"}
    return say(names[key]) if key in names else spoken(key)


def spoken(key: str) -> Text:
    """A key as words: it comes from the document, so it stays in its language."""
    return str(key).replace("_", " ")


def _anchor(key: str) -> str:
    letters = "".join(c for c in str(key).lower() if c.isascii() and c.isalpha())
    return f"of-{letters[:40]}" if letters else "of-part"
