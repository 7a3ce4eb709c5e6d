"""The front door of `data/`: a path, or records in memory, becomes `Examples` for a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantailor.data.batching import LMDataset, PadCollator, RecordDataset
from quantailor.data.classified import NAMES_FILE, checked_names, encode_classified, label_ids, names_beside
from quantailor.data.columns import Task, find_columns, strings
from quantailor.data.encode import Encoded, padding_token
from quantailor.data.examples import Examples
from quantailor.data.instructions import encode_instructions
from quantailor.data.sources import Record, read_records
from quantailor.data.splitting import overlap, split
from quantailor.data.streams import lm_windows
from quantailor.errors import UntrustedInput, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Examples", "load_examples", "overlap", "split"]

Data = str | Path | Sequence[str] | Sequence[Record]


def load_examples(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | None = None,
    *,
    context: int = 256,
    limit: int | None = None,
    max_tokens: int | None = None,
    dataset_split: str | None = None,
    label_names: Sequence[str] | None = None,
) -> Examples:
    """Read, recognise and encode `data`: a file or data set folder, or a list of texts or of records.

    Plain text becomes windows of `context` tokens; instruction and classification records become rows of at most
    that many. `limit` counts documents or records, `max_tokens` tokens of plain text. `label_names` numbers the
    classes; without it a `labels.json` beside the file does, or the labels found.
    Raises: UntrustedInput for data that cannot be read, recognised or used; UsageError for an option out of range.
    """
    if context < 2:
        raise UsageError(f"context={context} leaves no token to predict; use 2 or more")
    records, source = _records(data, limit, dataset_split)
    columns = find_columns(records, task, source=source)
    pad_token_id, note = padding_token(tokenizer)
    notes = [note] if note else []
    if limit is not None and len(records) < limit:
        notes.append(f"{limit} records were asked for, {source} has {len(records)}")
    if context > tokenizer.model_max_length:
        notes.append(f"context={context} is above the {tokenizer.model_max_length} tokens the tokenizer is made for")
    if max_tokens is not None and columns.kind != "text":
        raise UsageError(f"max_tokens={max_tokens} counts tokens of plain text; use limit for {columns.kind} records")
    if label_names is not None and columns.kind != "classification":
        raise UsageError(f"label_names has no use for {columns.kind} records; leave it out")
    names: tuple[str, ...] = ()
    dataset: LMDataset | RecordDataset
    if columns.kind == "text":
        texts = strings(records, columns.inputs[0], source=source)
        if blank := sum(not text.strip() for text in texts):
            notes.append(f"{blank} blank document(s) skipped")
        dataset = LMDataset(lm_windows(texts, tokenizer, context=context, max_tokens=max_tokens))
        if dropped := dataset.windows.num_dropped_tokens:
            notes.append(f"the last {dropped} tokens fill no window of {context} and were left out")
        if dataset.windows.context < context:
            notes.append(f"the text has only {dataset.windows.context} tokens: one window, shorter than {context}")
    elif columns.kind == "instruction":
        encoded = encode_instructions(records, columns, tokenizer, max_length=context, source=source)
        dataset = _dataset(encoded, context, source, notes)
    else:
        names_given = checked_names(label_names) if label_names is not None else None
        if names_given is None and isinstance(data, str | Path):
            names_given = names_beside(Path(data))
            notes += [f"class names from {Path(data).parent / NAMES_FILE}"] if names_given else []
        labels, names = label_ids(records, columns.target or "label", names_given, source=source)
        encoded = encode_classified(records, columns, labels, tokenizer, max_length=context, source=source)
        dataset = _dataset(encoded, context, source, notes)
    return Examples(
        task="classification" if columns.kind == "classification" else "lm",
        dataset=dataset,
        collator=PadCollator(pad_token_id),
        source=source,
        label_names=names,
        notes=tuple(notes),
    )


def _records(data: Data, limit: int | None, dataset_split: str | None) -> tuple[Sequence[dict[str, Any]], str]:
    if isinstance(data, str | Path):
        return read_records(data, limit=limit, split=dataset_split), str(data)
    if dataset_split is not None:
        raise UsageError(f"dataset_split={dataset_split!r} has no use for records in memory; leave it out")
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit} leaves no records; use 1 or more, or None for all")
    records = [{"text": item} if isinstance(item, str) else item for item in data[:limit]]
    if not records or not all(isinstance(record, dict) for record in records):
        raise UntrustedInput("the data in memory must be a list of texts or of dicts, and not empty")
    return records, "the data"


def _dataset(encoded: Encoded, context: int, source: str, notes: list[str]) -> RecordDataset:
    if encoded.num_truncated:
        notes.append(f"{encoded.num_truncated} of {len(encoded.rows)} records cut to {context} tokens")
    if encoded.num_dropped:
        notes.append(f"{encoded.num_dropped} record(s) left out: no response within {context} tokens")
    if not encoded.rows:
        raise UntrustedInput(f"{source}: no record has a response within {context} tokens; raise the context")
    return RecordDataset(encoded.rows)
