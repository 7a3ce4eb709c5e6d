"""What kind of records these are, told from the names of their columns.

    classification   text | sentence | a pair such as sentence1, sentence2     and   label
    instruction      messages | instruction (, input), output | prompt, response
    text             text

Told from the first record; a later one that lacks a column is an error, not another kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quantailor.errors import UntrustedInput, UsageError

Task = Literal["lm", "classification", "qa"]  # qa: answers out of a text, which `squad` reads
Kind = Literal["text", "instruction", "classification"]

LABEL = "label"
MESSAGES = "messages"
CLASSIFIED = (  # GLUE's names; pairs first, since a pair may hold a column that also stands alone
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)
INSTRUCTED = (("instruction", "output"), ("instruction", "response"), ("prompt", "response"), ("prompt", "completion"))
EXTRA_INPUT = ("input", "context")  # what an instruction is about, where it has a column of its own
NEEDED = {
    "text": "text",
    "instruction": "messages, or instruction and output (input may be there), or prompt and response",
    "classification": "label, and text, sentence, or sentence1 and sentence2",
}


@dataclass(frozen=True)
class Columns:
    """Which columns are read: `inputs` in their order, and `target` (a label or a response; None for plain text)."""

    kind: Kind
    inputs: tuple[str, ...]
    target: str | None = None


def find_columns(records: Sequence[dict[str, Any]], task: Task | None = None, *, source: str = "the data") -> Columns:
    """The columns of the first record that serve `task`; without a task, the most telling kind there is.

    Raises: UntrustedInput if none fits, naming the columns present and needed; UsageError for an unknown task.
    """
    if task not in (None, "lm", "classification"):
        raise UsageError(f"task={task!r} is unknown; use 'lm' or 'classification', or None to tell it from the columns")
    present = set(records[0])
    candidates = []
    if task != "classification":
        candidates += [_instruction(present)]
    if task != "lm":
        candidates += [_classification(present)]
    if task != "classification":
        candidates += [Columns("text", ("text",)) if "text" in present else None]
    for columns in candidates:
        if columns is not None:
            return columns
    kinds = {"lm": ("text", "instruction"), "classification": ("classification",), None: tuple(NEEDED)}[task]
    needed = "; or ".join(NEEDED[kind] for kind in kinds)
    has = ", ".join(map(repr, records[0])) or "no columns"
    raise UntrustedInput(f"{source} has {has}; {f'task {task!r}' if task else 'a task'} needs {needed}: rename columns")


def strings(records: Sequence[dict[str, Any]], column: str, *, source: str = "the data") -> list[str]:
    """One column as text.

    Raises: UntrustedInput naming the record where the column is missing, is no string, or no valid Unicode.
    """
    return [checked_string(record.get(column), column, number, source) for number, record in enumerate(records, 1)]


def checked_string(value: Any, column: str, number: int, source: str) -> str:
    """`value`, unchanged. Raises: UntrustedInput, naming record `number`, unless a tokenizer can read it."""
    if not isinstance(value, str):
        what = "missing" if value is None else f"{type(value).__name__}, not a string"
        raise UntrustedInput(f"{source}: record {number}: {column!r} is {what}; mend or remove that record")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can smuggle in as \ud800
        raise UntrustedInput(
            f"{source}: record {number}: {column!r} is no valid Unicode at character {error.start + 1}; remove it"
        ) from None
    return value


def _instruction(present: set[str]) -> Columns | None:
    if MESSAGES in present:
        return Columns("instruction", (MESSAGES,))
    for prompt, response in INSTRUCTED:
        if {prompt, response} <= present:
            extra = tuple(name for name in EXTRA_INPUT if name in present)[:1]
            return Columns("instruction", (prompt, *extra), response)
    return None


def _classification(present: set[str]) -> Columns | None:
    if LABEL in present:
        for names in CLASSIFIED:
            if present.issuperset(names):
                return Columns("classification", names, LABEL)
    return None
