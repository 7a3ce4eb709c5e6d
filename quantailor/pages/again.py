"""What stands at the end of every page: the proof, every module, the notes, and what makes the result again."""

from __future__ import annotations

from quantailor.pages import numbers
from quantailor.pages.document import Cell, Column, Command, Pairs, Remarks, Section, Table, Text, say, section
from quantailor.pages.layers import inventory_table
from quantailor.pages.reading import Found

_MOST_NOTES, _MOST_FILES, _MOST_VALUES = 200, 120, 40


def closing(data: Found, kept: Found, manifest: Found, inventory: list[Found], notes: list[str]) -> tuple[Section, ...]:
    """Proof, inventory, notes, and what makes it again."""
    command = data.text("command")
    return (
        section("proof", _proof(data.object("check"))),
        section("inventory", inventory_table(inventory)),
        section("notes", Remarks(tuple(notes[:200])) if notes else None),
        section(
            "again",
            Command(command) if command else None,
            _configuration(data, kept),
            _environment(data, manifest),
            _hashes(kept, manifest),
        ),
    )


def _proof(check: Found) -> Pairs | None:
    if not check:
        return None
    rows: list[tuple[Text, Text]] = []
    if (equal := check.flag("equal")) is not None:
        rows.append((say("proof.title"), say("proof.equal") if equal else say("proof.unequal")))
    for key in ("layers", "integers_compared"):
        if (value := check.number(key)) is not None:
            rows.append((say(f"proof.{key}"), numbers.whole(value) or ""))
    if (value := check.number("max_logit_difference")) is not None:
        rows.append((say("proof.logits"), f"{value:.2g}"))
    if (allowed := check.number("tolerance")) is not None:
        rows.append((say("proof.allowed"), f"{allowed:g}"))
    if (same := check.flag("top1_equal")) is not None:
        rows.append((say("proof.top1"), say("yes") if same else say("no")))
    rows += [(say("proof.differs"), f"{d.text('layer')}: {d.text('what')}") for d in check.objects("differing")[:20]]
    return Pairs(tuple(rows)) if rows else None


def _configuration(data: Found, kept: Found) -> Pairs | None:
    rows: list[tuple[Text, Text]] = []
    for key in ("scheme", "method", "format", "format_reason", "seed"):
        if value := data.text(key) or kept.text(key) or kept.object("details").text(key):
            rows.append((say(f"config.{key}"), value))
    if (tolerance := data.number("tolerance")) is not None:
        rows.append((say("config.tolerance"), numbers.tolerance(tolerance) or ""))
    result = next((s.object("result") for s in data.objects("steps")), Found({}))
    for key in ("source", "num_tokens", "num_documents", "num_rows", "context", "fingerprint"):
        number = result.number(key)
        if value := numbers.whole(number) or result.text(key):
            rows.append((say(f"config.{key}"), value))
    return Pairs(tuple(rows), say("again.configuration")) if rows else None


def _environment(data: Found, manifest: Found) -> Pairs | None:
    rows = data.strings("environment") or manifest.strings("versions")
    return Pairs(tuple(rows[:40]), say("again.environment")) if rows else None


def _hashes(kept: Found, manifest: Found) -> Table | None:
    files = manifest.object("files")
    rows = []
    parent = kept.object("details").object("parent")
    if digest := parent.text("hash"):
        rows.append((Cell(say("hash.parent", name=parent.text("folder", "?"))), Cell(""), Cell(digest)))
    for name in list(files.value)[:120]:
        told = files.object(name)
        count = told.number("size_bytes")
        rows.append((Cell(str(name)), Cell(numbers.whole(count) or "", count), Cell(told.text("sha256"))))
    if digest := manifest.text("checksum"):
        rows.append((Cell("MANIFEST.json"), Cell(""), Cell(digest)))
    columns = (
        Column(say("column.file"), name_like=True),
        Column(say("column.bytes"), numeric=True),
        Column("sha256", name_like=True),
    )
    left = len(files.value) - 120
    note = say("hashes.cut", left=numbers.whole(left)) if left > 0 else ""
    return Table(columns, tuple(rows), title=say("again.hashes"), note=note) if rows else None
