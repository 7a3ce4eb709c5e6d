"""Records out of a local file or data set folder; whatever is wrong with it is found here and named with its line.

    .txt            documents, split at lines `<|endoftext|>`; without one the file is one document   -> {"text": ...}
    .jsonl          one object a line, at most 10 MB each
    .json           a list of objects
    .csv, .tsv      with a header; a tab-separated file knows no quotes (IANA text/tab-separated-values)
    any of these with .gz behind, and a folder that `datasets.Dataset.save_to_disk` wrote

Text is UTF-8, with or without a byte order mark and with either line end. Nothing is ever fetched.
"""

import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from quantailor.errors import UntrustedInput, UsageError

Record = dict[str, Any]

SEPARATOR = "<|endoftext|>"
MAX_LINE_BYTES = 10_000_000
MAX_FILE_BYTES = 4 * 2**30  # unpacked: what is read is kept in memory, and 1 MB of .gz can hold 1 GB of text
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv")


def read_records(path: str | Path, *, limit: int | None = None, split: str | None = None) -> list[Record]:
    """The first `limit` records (all by default) of `path`, each a dict of its columns.

    `split` chooses among the splits of a data set folder; by default "train" where it has one.
    Raises: UntrustedInput if the file is missing, empty, damaged or of no known kind, naming file and line;
    UsageError for a `limit` below 1, a `split` of something that has none, or without the `data` extra.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit} leaves no records; use 1 or more, or None for all")
    if not path.exists():
        raise UntrustedInput(f"{path} does not exist; name a file ({', '.join(SUFFIXES)}) or a saved data set folder")
    if path.is_dir():
        records = _dataset_folder(path, limit, split)
    elif split is not None:
        raise UsageError(f"split={split!r}: {path.name} is a single file without splits; leave the split out")
    else:
        records = list(itertools.islice(_file(path), limit))
    if not records:
        raise UntrustedInput(f"{path} holds no records; it is empty or has a header only")
    return records


def _file(path: Path) -> Iterator[Record]:
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in SUFFIXES:
        raise UntrustedInput(f"{path} ends in {path.suffix or 'nothing'!r}; use {', '.join(SUFFIXES)}, or one with .gz")
    if not path.is_file():
        raise UntrustedInput(f"{path} is no regular file; copy its content into one")
    if kind == ".txt":
        return _documents(_lines(path, MAX_FILE_BYTES))
    if kind == ".jsonl":
        return _json_lines(path)
    if kind == ".json":
        return _json_list(path)
    return _table(path, dialect={"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {"strict": True})


def _lines(path: Path, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[str]:
    """The lines of a UTF-8 file, packed or not, with their line ends and without its byte order mark."""
    total = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as stream:
            for number in itertools.count(1):
                raw = stream.readline(max_line_bytes + 1)
                total += len(raw)
                if not raw:
                    return
                if len(raw) > max_line_bytes:
                    raise UntrustedInput(f"{path}:{number}: the line is over {max_line_bytes:,} bytes; cut it up")
                if total > MAX_FILE_BYTES:
                    raise UntrustedInput(f"{path}:{number}: over {MAX_FILE_BYTES:,} bytes; split the file or set limit")
                try:
                    yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    looks_like = " (it looks like UTF-16)" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
                    raise UntrustedInput(
                        f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8{looks_like}; save it so"
                    ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UntrustedInput(f"{path} cannot be read: {error}; check the file and who may read it") from error


def _documents(lines: Iterable[str]) -> Iterator[Record]:
    """Whatever stands between separator lines, without the line breaks around it; empty documents are skipped."""
    parts: list[str] = []
    for line in itertools.chain(lines, [SEPARATOR]):
        if line.strip() != SEPARATOR:
            parts.append(line.replace("\r\n", "\n"))
            continue
        text = "".join(parts).strip("\n")
        parts = []
        if text.strip():
            yield {"text": text}


def _json_lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        value = _parsed(line, path, number)
        if not isinstance(value, dict):
            raise UntrustedInput(f"{path}:{number}: {_kind(value)} where an object is needed; write one object a line")
        yield value


def _json_list(path: Path) -> Iterator[Record]:
    text = "".join(_lines(path, MAX_FILE_BYTES))
    if not text.strip():
        return
    value = _parsed(text, path, 1)
    if not isinstance(value, list):
        raise UntrustedInput(f"{path}: {_kind(value)} where a list of objects is needed; use .jsonl for one a line")
    for index, record in enumerate(value):
        if not isinstance(record, dict):
            raise UntrustedInput(f"{path}: item {index + 1} is {_kind(record)}, not an object; remove or wrap it")
        yield record


def _parsed(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UntrustedInput(f"{path}:{line}: not JSON at column {error.colno}: {error.msg}; mend the line") from None
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
        raise UntrustedInput(f"{path}:{first_line}: JSON that cannot be read: {error}; mend or remove it") from None


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def _table(path: Path, dialect: dict[str, Any]) -> Iterator[Record]:
    rows = csv.reader(_lines(path), **dialect)
    header: list[str] | None = None
    while True:
        try:
            row = _next_row(rows)
        except csv.Error as error:
            raise UntrustedInput(f"{path}:{rows.line_num}: not a readable table: {error}; mend its quotes") from None
        if row is None:
            return
        if not row:  # a blank line
            continue
        if header is None:
            header = row
            if repeated := [name for name in header if header.count(name) > 1]:
                raise UntrustedInput(f"{path}:1: column {repeated[0]!r} stands there twice; rename one of the two")
            continue
        if len(row) != len(header):
            raise UntrustedInput(
                f"{path}:{rows.line_num}: {len(row)} fields under a header of {len(header)}; quote fields with commas"
            )
        yield dict(zip(header, row))


def _next_row(rows: Iterator[list[str]]) -> list[str] | None:
    """One row. The size limit of a field belongs to the whole process, so it is put back after each row."""
    before = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        return next(rows, None)
    finally:
        csv.field_size_limit(before)


def _dataset_folder(path: Path, limit: int | None, split: str | None) -> list[Record]:
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise UntrustedInput(f"{path} is a folder without a saved data set; name a file in it ({', '.join(SUFFIXES)})")
    try:
        import datasets  # here: an optional extra, and a second of import
    except ImportError:
        raise UsageError(f"{path} is a data set folder and needs an extra: pip install quantailor[data]") from None
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow, json and datasets each raise their own for a damaged folder
        raise UntrustedInput(f"{path} cannot be read as a data set: {_one_line(error)}; save it again") from error
    if isinstance(loaded, datasets.DatasetDict):
        chosen = split or "train"
        if chosen not in loaded:
            raise UsageError(f"{path} has no split {chosen!r}; choose one of: {', '.join(loaded)}")
        loaded = loaded[chosen]
    elif split is not None:
        raise UsageError(f"split={split!r}: {path} is a single data set without splits; leave the split out")
    try:
        return loaded.select(range(min(limit or len(loaded), len(loaded)))).to_list()
    except Exception as error:  # the table is read only now
        raise UntrustedInput(f"{path} cannot be read as a data set: {_one_line(error)}; save it again") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
