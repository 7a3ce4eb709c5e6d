"""Data ready for a model: rows, how to batch them, and what had to be done to get there."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantailor.data import batching
from quantailor.data.batching import LMDataset, PadCollator, RecordDataset
from quantailor.data.columns import Task
from quantailor.data.streams import LMWindows
from quantailor.errors import UsageError


@dataclass(frozen=True, eq=False)
class Examples:
    """What `load_examples` returns and every verb takes.

    `notes` has a line for everything that was done to the data unasked; `fingerprint` is the sha256 of the token
    ids, so two results with the same one were measured on the same tokens. `label_names` is empty for `lm`.
    """

    task: Task
    dataset: LMDataset | RecordDataset
    collator: PadCollator
    source: str
    label_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    num_tokens: int = dataclasses.field(init=False)
    fingerprint: str = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_tokens", self.dataset.num_tokens)
        object.__setattr__(self, "fingerprint", self.dataset.fingerprint())

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def num_labels(self) -> int:
        return len(self.label_names)

    @property
    def are_images(self) -> bool:
        """Whether rows are pixels, not tokens."""
        return "pixel_values" in self.dataset[0]

    @property
    def windows(self) -> LMWindows | None:
        """The token stream of a language model's text; None for rows of instructions or of classes."""
        return self.dataset.windows if isinstance(self.dataset, LMDataset) else None

    def batches(
        self, batch_size: int, *, shuffle: bool = False, seed: int = 0, limit: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """One pass in padded batches, as `quantailor.data.batching.batches`."""
        return batching.batches(self.dataset, self.collator, batch_size, shuffle=shuffle, seed=seed, limit=limit)

    def calibration_batches(
        self, samples: int, *, seed: int = 0, batch_size: int = 4
    ) -> tuple[list[dict[str, Tensor]], list[str]]:
        """(`samples` rows drawn by `seed`, each once, in padded batches; what has to be said about them).

        Kept as int64: 5,000 rows of 256 tokens are 31 MB. Raises: UsageError for fewer than one sample.
        """
        batches = list(self.batches(batch_size, shuffle=True, seed=seed, limit=samples))
        return batches, self.notes_on(batching.drawn_rows(len(self), samples, seed), samples)

    def notes_on(self, rows: Sequence[int], asked: int) -> list[str]:
        """Whether there are fewer rows than were asked for, and whether some of them say the same."""
        notes = []
        if len(rows) < asked:
            notes.append(f"{asked:,} rows were asked for, {self.source} has {len(rows):,}: each is used once")
        name = "pixel_values" if self.are_images else "input_ids"
        different = {torch.as_tensor(self.dataset[row][name]).numpy().tobytes() for row in rows}
        if repeated := len(rows) - len(different):
            notes.append(f"{repeated:,} of {len(rows):,} rows repeat another, token for token")
        return notes

    def take(self, limit: int) -> "Examples":
        """The first `limit` rows. Raises: UsageError for a `limit` below 1."""
        if limit < 1:
            raise UsageError(f"limit={limit} leaves no rows; use 1 or more, or None for all")
        if limit >= len(self):
            return self
        if isinstance(self.dataset, LMDataset):
            return self.replaced(LMDataset(self.dataset.windows.first(limit)))
        return self.replaced(RecordDataset(self.dataset.rows[:limit]))

    def drawn(self, limit: int, seed: int) -> "Examples":
        """`limit` rows (all, where there are fewer) drawn by `seed`, in their own order. Raises: UsageError below 1."""
        if limit < 1:
            raise UsageError(f"limit={limit} leaves no rows; use 1 or more")
        rows = sorted(batching.drawn_rows(len(self), limit, seed))
        if isinstance(self.dataset, LMDataset):
            windows = self.dataset.windows
            names, numbers = windows.document_ids[rows].unique(return_inverse=True)
            chosen = dataclasses.replace(
                windows, input_ids=windows.input_ids[rows], document_ids=numbers, num_documents=len(names)
            )
            return self.replaced(LMDataset(chosen))
        return self.replaced(RecordDataset([self.dataset.rows[row] for row in rows]))

    def replaced(self, dataset: LMDataset | RecordDataset, *notes: str) -> "Examples":
        """The same with other rows, and further notes."""
        return dataclasses.replace(self, dataset=dataset, notes=(*self.notes, *notes))
