"""Classification records as token rows with one label each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantailor.data.columns import Columns, strings
from quantailor.data.encode import Encoded
from quantailor.errors import UntrustedInput, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_CLASSES = 100_000  # above that a "label" is a score, an id or a timestamp
NAMES_FILE = "labels.json"


def encode_classified(
    records: Sequence[dict[str, Any]],
    columns: Columns,
    labels: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    source: str = "the data",
) -> Encoded:
    """Rows of at most `max_length` tokens with the tokenizer's own special tokens; a pair is cut at its longer half.

    Raises: UntrustedInput naming a record without text or without a single token.
    """
    texts = [strings(records, name, source=source) for name in columns.inputs]
    encoded = tokenizer(*texts, verbose=False)  # uncut first, to count what is cut
    rows: list[dict[str, Any]] = []
    num_truncated = 0
    for index, label in enumerate(labels):
        row = {name: encoded[name][index] for name in encoded}
        if len(row["input_ids"]) > max_length:
            num_truncated += 1
            row = dict(tokenizer(*(column[index] for column in texts), truncation=True, max_length=max_length))
        if not row["input_ids"]:
            raise UntrustedInput(f"{source}: record {index + 1} has no token; remove it")
        rows.append({**row, "labels": label})
    return Encoded(rows, num_truncated=num_truncated)


def label_ids(
    records: Sequence[dict[str, Any]], column: str, names: Sequence[str] | None = None, *, source: str = "the data"
) -> tuple[list[int], tuple[str, ...]]:
    """(the class of each record, from 0; the classes' names).

    Labels are numbers, or names. Without `names`, numbers name themselves and names are numbered in sorted order,
    so give them wherever two files must agree. Raises: UntrustedInput naming the record whose label is none.
    """
    values = [_label(record.get(column), number, source) for number, record in enumerate(records, 1)]
    if names is None and not all(isinstance(value, int) for value in values):
        names = sorted({str(value) for value in values})
    if names is None:
        names = [str(number) for number in range(max(1, *map(int, values)) + 1)]  # one class alone means regression
    known = {name: number for number, name in enumerate(names)}
    ids = [known.get(value, -1) if isinstance(value, str) else value for value in values]
    for number, (value, label) in enumerate(zip(values, ids), 1):
        if not 0 <= label < len(names):
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise UntrustedInput(
                f"{source}: record {number}: label {value!r} is none of the {len(names)} classes ({shown}); mend it"
            )
    return ids, tuple(names)


def names_beside(path: Path) -> tuple[str, ...] | None:
    """The class names in a `labels.json` next to the file, in the order of their numbers; None if there is none.

    Raises: UntrustedInput unless it holds a list of different strings.
    """
    file = path.parent / NAMES_FILE
    if not file.is_file():
        return None
    try:
        names = json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UntrustedInput(f"{file} is no readable JSON: {error}; mend or remove it") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise UntrustedInput(f"{file} must hold a list of different strings, the class names in order; mend it")
    return tuple(names)


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """Class names that a caller gave. Raises: UsageError unless they are two or more different ones."""
    if len(set(names)) < max(2, len(names)):
        raise UsageError(f"label_names={list(names)[:5]} must be two or more different names")
    return tuple(names)


def _label(value: Any, number: int, source: str) -> int | str:
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 12:
        value = int(value)  # a .csv knows only text
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, int) or not 0 <= value < MAX_CLASSES:
        what = "missing" if value is None else repr(value)
        raise UntrustedInput(f"{source}: record {number}: label {what} is no class; use names, or numbers from 0")
    return int(value)
