"""Token rows as torch data sets, and rows to batches: padding is masked and never has a label.

Every batch is a dict of tensors with `input_ids`, `attention_mask` and `labels`, which `Trainer` and any
Hugging Face model take as it is. Language models shift the labels themselves.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from quantailor.data.encode import IGNORED
from quantailor.data.streams import LMWindows
from quantailor.errors import UsageError

Row = dict[str, Any]
PADDING = {"attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}  # and `input_ids`: the collator's own


class LMDataset(Dataset[Row]):
    """Windows of a token stream as rows: `input_ids` [context], an attention mask of ones, labels = input_ids."""

    def __init__(self, windows: LMWindows) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Row:
        ids = self.windows.input_ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    @property
    def num_tokens(self) -> int:
        return self.windows.input_ids.numel()

    def fingerprint(self) -> str:
        """The sha256 of shape and token ids, in hexadecimal."""
        shape = repr(tuple(self.windows.input_ids.shape))
        return hashlib.sha256(shape.encode() + self.windows.input_ids.numpy().tobytes()).hexdigest()


class RecordDataset(Dataset[Row]):
    """Rows of their own length: lists of token ids with `attention_mask` and `labels` (one for the row, or per token);
    or images, `pixel_values` float32 [C, H, W] with their label.

    Raises: UsageError on a row without `input_ids` (or `pixel_values`) or `labels`.
    """

    def __init__(self, encodings: Sequence[Row]) -> None:
        for index, row in enumerate(encodings):
            if not (row.get("input_ids") or "pixel_values" in row) or "labels" not in row:
                raise UsageError(f"row {index} has {sorted(row)}; every row needs input_ids (not empty) and labels")
        self.rows = list(encodings)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def num_tokens(self) -> int:
        return sum(length_of(row) for row in self.rows)

    def fingerprint(self) -> str:
        """The sha256 of every row's token ids and labels, in hexadecimal."""
        return hashlib.sha256(b"".join(row_digest(row) for row in self.rows)).hexdigest()


def length_of(row: Row) -> int:
    """How many tokens a row has; an image counts as one."""
    return len(row["input_ids"]) if "input_ids" in row else 1


def row_digest(row: Row) -> bytes:
    """The sha256 of a record's token ids and labels, or of an image's numbers and its label."""
    if "pixel_values" in row:
        pixels: Tensor = row["pixel_values"]
        shape = repr((tuple(pixels.shape), row["labels"]))
        return hashlib.sha256(shape.encode() + pixels.contiguous().numpy().tobytes()).digest()
    return hashlib.sha256(repr((list(row["input_ids"]), row["labels"])).encode()).digest()


@dataclass(frozen=True)
class PadCollator:
    """Rows to one batch, padded on the right to the longest: int64 [batch, longest], single labels int64 [batch].

    Padding has `attention_mask` 0 and label -100.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        masked = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
        return {name: self._column([row[name] for row in masked], name, longest) for name in masked[0]}

    def _column(self, values: list[Any], name: str, longest: int) -> Tensor:
        if isinstance(values[0], int):
            return torch.tensor(values, dtype=torch.int64)
        batch = torch.full((len(values), longest), PADDING.get(name, self.pad_token_id), dtype=torch.int64)
        for line, value in zip(batch, values):
            line[: len(value)] = torch.as_tensor(value, dtype=torch.int64)
        return batch


class ImageCollator(PadCollator):
    """Images of one size to one batch: `pixel_values` float32 [batch, C, H, W], labels int64 [batch]."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        labels = torch.tensor([row["labels"] for row in rows], dtype=torch.int64)
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}


def batches(
    dataset: LMDataset | RecordDataset,
    collator: PadCollator,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    limit: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """One pass over the first `limit` rows (all by default; drawn at random under `shuffle`), as padded batches.

    Raises: UsageError for a `batch_size` or `limit` below 1.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise UsageError(f"{name}={value} leaves nothing to do; use 1 or more")
    order = drawn_rows(len(dataset), limit, seed) if shuffle else list(range(len(dataset)))[:limit]
    return (
        collator([dataset[index] for index in order[start : start + batch_size]])
        for start in range(0, len(order), batch_size)
    )


def drawn_rows(num_rows: int, limit: int | None, seed: int) -> list[int]:
    """The rows that `batches` takes under `shuffle`, in its order: each at most once, so no more than there are.

    A smaller `limit` draws the first of what a larger one draws.
    """
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).tolist()[:limit]


class LengthGrouped(Sampler[int]):
    """Rows in random order, but those of one batch of about one length, so that little is padded.

    Each run of `_SORTED` batches of a random order is sorted and cut into batches, whose order is drawn again: no pass
    goes from long rows to short ones. A pass's order depends on `seed` and `epoch` alone.
    """

    _SORTED = 50

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the loader before each pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.randperm(len(self), generator=generator).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(drawn), run := self._SORTED * self.batch_size):
            rows = sorted(drawn[start : start + run], key=self.lengths.__getitem__)
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        short = [batch for batch in batches if len(batch) < self.batch_size]  # one at most; it ends the pass
        full = [batch for batch in batches if len(batch) == self.batch_size]
        order = torch.randperm(len(full), generator=generator).tolist()
        for batch in [*(full[i] for i in order), *short]:
            yield from batch
