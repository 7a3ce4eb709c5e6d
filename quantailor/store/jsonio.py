"""JSON in and out, with limits checked before the parser runs.

Python's parser recurses on nesting and holds a whole document in memory, so size and depth are looked at first, on
the raw bytes. `NaN` and `Infinity` are read, since published configs hold them (Mamba-2's `time_step_limit`), and
never written.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from quantailor.errors import UntrustedInput
from quantailor.store.paths import open_regular, shown
from quantailor.store.publish import write_atomic

MAX_BYTES = 10_000_000
MAX_DEPTH = 64

# Possessive, and closed by the end of the text too: no input makes it look at a byte twice.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.?+[^"\\]*+)*+(?:"|\Z)', re.DOTALL)
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def without_strings(raw: bytes) -> bytes:
    """A JSON text less its strings: what is left tells its structure.

    >>> without_strings(b'{"a]": ["\\\\"[", 1]}')
    b'{: [, 1]}'
    """
    return _STRING.sub(b"", raw)


def depth_of(structure: bytes, limit: int) -> int:
    """How deep the brackets of `without_strings` nest; counts no further than `limit` + 1."""
    depth = deepest = 0
    for byte in structure.translate(None, _ALL_BUT_BRACKETS):
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
            if depth > limit:
                break
        else:
            depth -= 1
    return deepest


def read_json(path: Path, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH, *, follow: bool = True) -> Any:
    """The value in `path`, a file that a stranger may have written.

    Raises: UntrustedInput if it is missing, larger than `max_bytes`, nested deeper than `max_depth`, or not JSON.
    """
    with open_regular(path, follow=follow) as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise UntrustedInput(
            f"{shown(path)} is larger than {max_bytes / 1e6:g} MB, the limit for its kind; use the original"
        )
    if depth_of(without_strings(raw), max_depth) > max_depth:
        raise UntrustedInput(f"{shown(path)} nests deeper than {max_depth} levels, the limit; use the original file")
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: syntax, bad UTF-8, a number of 10000 digits
        raise UntrustedInput(f"{shown(path)} is not JSON ({shown(error)}); download or copy it again") from error


def to_bytes(value: Any) -> bytes:
    """`value` as `write_json` writes it. Raises: ValueError naming the place of a number that JSON does not have."""
    if place := _not_finite(value, ""):
        raise ValueError(f"{place} is not finite, and JSON has no such number; store None or a string instead")
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value`, keys in their own order. The file at `path` is the old one or the whole new one, at any moment.

    Raises: ValueError on NaN and infinities; QuantailorError if the disk is full.
    """
    write_atomic(path, to_bytes(value))


def _not_finite(value: Any, place: str) -> str | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{place or 'the value'} = {value}"
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        if found := _not_finite(item, f"{place}.{key}" if place else str(key)):
            return found
    return None
