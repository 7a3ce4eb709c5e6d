"""Alarms of a recording in the words of a page: as a table, and as marks on a curve."""

from __future__ import annotations

from collections.abc import Sequence

from quantailor.pages import numbers
from quantailor.pages.document import Cell, Column, Mark, Said, Table, Text, say
from quantailor.pages.reading import Found
from quantailor.qat.recording import KINDS, Alarm

_MOST_MARKS = 12


def kind_of(kind: str) -> Said:
    return say(f"alarmed.{kind}")


def marks(alarms: Sequence[Alarm]) -> tuple[Mark, ...]:
    """One a step and kind, at its step."""
    found = [
        Mark(float(a.step), say("alarm.reported", step=numbers.whole(a.step), what=kind_of(a.alarm)), "bad")
        for a in alarms
    ]
    return tuple(found[:_MOST_MARKS])


def alarm_table(alarms: Sequence[Alarm]) -> Table | None:
    """Every alarm with its figure, its limit and what was done."""
    if not alarms:
        return None
    columns = (
        Column(say("column.step"), numeric=True),
        Column(say("column.alarm")),
        Column(say("column.module"), name_like=True),
        Column(say("column.value"), numeric=True),
        Column(say("column.limit"), numeric=True),
        Column(say("column.done")),
    )
    rows = tuple(
        (
            Cell(numbers.whole(a.step) or "", a.step),
            Cell(kind_of(a.alarm), state="bad"),
            Cell(
                a.where or say("module.whole"),
                detail=say("alarmed.others", count=numbers.whole(a.others)) if a.others else "",
            ),
            Cell(numbers.plain(a.value) or say("not_finite"), a.value),
            Cell(numbers.plain(a.limit) or "", a.limit),
            Cell(say(f"acted.{a.action.replace(' ', '_')}")),
        )
        for a in alarms
    )
    return Table(columns, rows, title=say("recording.alarms"))


def reported(alarm: Found) -> Text:
    """What a receipt's alarm says: of a kind that is known in our words, else as it was written."""
    kind = alarm.text("alarm")
    if kind in KINDS:
        return kind_of(kind)
    return alarm.text("what") or alarm.text("message") or alarm.text("reason") or alarm.text("kind")
