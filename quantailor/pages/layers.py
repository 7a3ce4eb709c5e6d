"""The inventory of a model as a table and as a picture, however many layers it has."""

from __future__ import annotations

import re
from collections.abc import Sequence

from quantailor.pages import numbers
from quantailor.pages.document import Cell, Column, Heat, Table, say
from quantailor.pages.reading import Found

MOST_ROWS = 400
_MOST_HEAT_ROWS, _MOST_HEAT_COLUMNS = 64, 16
_BLOCK = re.compile(r"^(.{0,200}?)(\d{1,6})\.(.{1,200})$", re.DOTALL)


def inventory_table(entries: Sequence[Found], most: int = MOST_ROWS) -> Table | None:
    """A row a module, as the receipt lists them; more than `most` are grouped by name, numbers left out."""
    if not entries:
        return None
    columns = (
        Column(say("column.module"), name_like=True),
        Column(say("column.type")),
        Column(say("column.scheme")),
        Column(say("column.weights"), numeric=True),
        Column(say("column.output_error"), numeric=True),
        Column(say("column.reason"), wide=True),
    )
    if len(entries) <= most:
        errors = [e.object("report").number("output_error") for e in entries]
        rows = [_row(e, _name(e), e.number("num_weights"), error) for e, error in zip(entries, errors, strict=True)]
        return _without_empty(columns, rows)
    groups: dict[tuple[str, ...], list[Found]] = {}
    for entry in entries:
        key = (re.sub(r"\d+", "*", _name(entry)), entry.text("type"), entry.text("scheme"), entry.text("reason"))
        groups.setdefault(key, []).append(entry)
    rows = []
    for (name, *_), members in list(groups.items())[:most]:
        errors = [e.object("report").number("output_error") for e in members]
        known = [e for e in errors if e is not None]
        weights = sum(e.number("num_weights") or 0 for e in members)
        shown = f"{name} × {len(members):,}" if len(members) > 1 else _name(members[0])
        rows.append(_row(members[0], shown, weights, max(known, default=None)))
    note = say("inventory.aggregated", layers=numbers.whole(len(entries)), rows=numbers.whole(len(rows)))
    if len(groups) > most:
        note = say("inventory.cut", note=note, left=numbers.whole(len(groups) - most))
    return _without_empty(columns, rows, note)


def error_heat(entries: Sequence[Found]) -> Heat | None:
    """Output error of each quantized layer: a row a block, a column a layer of it. None without two blocks."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for entry in entries:
        error = entry.object("report").number("output_error")
        match = _BLOCK.match(entry.text("name"))
        if error is not None and match:
            found.setdefault((match[1], int(match[2])), {})[match[3]] = error
    columns = list(dict.fromkeys(name for row in found.values() for name in row))
    if len(found) < 2 or not columns or len(columns) > _MOST_HEAT_COLUMNS:
        return None
    same = len({prefix for prefix, _ in found}) == 1
    names = [str(n) if same else f"{prefix}{n}" for prefix, n in found]
    values = [[row.get(name) for name in columns] for row in found.values()]
    rows, values, merged = merged_rows(names, values)
    return Heat(
        say("chart.layer_errors"),
        tuple(rows),
        tuple(_short(columns)),
        tuple(tuple(row) for row in values),
        say("unit.output_error"),
        corner=say("column.block"),
        note=say("heat.merged") if merged else say("heat.errors_note"),
    )


def merged_rows(
    names: Sequence[str], values: Sequence[list[float | None]], most: int = _MOST_HEAT_ROWS
) -> tuple[list[str], list[list[float | None]], bool]:
    """At most `most` rows: runs of neighbours become one that holds the worst of each column."""
    if len(values) <= most:
        return list(names), [list(row) for row in values], False
    every = -(-len(values) // most)
    rows, kept = [], []
    for start in range(0, len(values), every):
        run = values[start : start + every]
        last = min(start + every, len(values)) - 1
        rows.append(names[start] if last == start else f"{names[start]} – {names[last]}")
        kept.append([max((v for v in column if v is not None), default=None) for column in zip(*run, strict=True)])
    return rows, kept, True


def _row(entry: Found, name: str, weights: float | None, error: float | None) -> tuple[Cell, ...]:
    scheme, reason = entry.text("scheme"), entry.text("reason")
    if tied := entry.text("tied_to"):
        reason = f"{reason} (= {tied})"
    return (
        Cell(name or say("module.whole")),
        Cell(entry.text("type")),
        Cell(scheme or say("scheme.float")),
        Cell(numbers.whole(weights) or "", weights),
        Cell("" if error is None else f"{error:.4f}", error),
        Cell(reason),
    )


def _without_empty(columns: tuple[Column, ...], rows: list[tuple[Cell, ...]], note: object = "") -> Table:
    """The column of errors is left out where no layer has one."""
    keep = [i for i, column in enumerate(columns) if not column.numeric or any(row[i].text for row in rows)]
    return Table(
        tuple(columns[i] for i in keep),
        tuple(tuple(row[i] for i in keep) for row in rows),
        note=note,  # type: ignore[arg-type]
    )


def _name(entry: Found) -> str:
    return entry.text("name")


def _short(names: Sequence[str]) -> list[str]:
    """Last parts of names, where these alone tell them apart."""
    last = [name.rpartition(".")[2] for name in names]
    return last if len(set(last)) == len(last) else list(names)
