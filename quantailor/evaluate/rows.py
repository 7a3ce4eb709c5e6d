"""What a language model is scored on: rows of tokens, and the unit (document, window or record) of each token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantailor.data.batching import LMDataset, PadCollator, RecordDataset
from quantailor.data.encode import IGNORED
from quantailor.data.examples import Examples
from quantailor.data.streams import LMWindows
from quantailor.errors import UsageError
from quantailor.evaluate.measuring import Progress

MIN_DOCUMENTS = 20  # fewer are too few to draw from: then windows are the units of the bootstrap


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """Rows with labels, and for each row the units of its tokens: int64 [context], or one number for all of them."""

    dataset: LMDataset | RecordDataset
    collator: PadCollator
    units: Sequence[Tensor | int]
    num_units: int
    unit: str
    num_documents: int
    context: int
    bos: bool | None
    fingerprint: str
    source: str = ""

    def __len__(self) -> int:
        return len(self.dataset)

    def num_scored(self, row: int) -> int:
        """How many tokens of a row have a label to be predicted."""
        return int((torch.as_tensor(self.dataset[row]["labels"])[1:] != IGNORED).sum())


def scored_rows(data: LMWindows | Examples) -> ScoredRows:
    """The rows of a token stream or of instruction records.

    Raises: UsageError for classification examples.
    """
    if isinstance(data, LMWindows):
        return _of_windows(LMDataset(data), PadCollator(0), source="")
    if data.task != "lm":
        raise UsageError(f"{data.source} holds {data.task} examples; load it with task='lm' to measure perplexity")
    if isinstance(data.dataset, LMDataset):
        return _of_windows(data.dataset, data.collator, data.source)
    return ScoredRows(
        dataset=data.dataset,
        collator=data.collator,
        units=range(len(data)),
        num_units=len(data),
        unit="record",
        num_documents=len(data),
        context=max(len(row["input_ids"]) for row in data.dataset.rows),
        bos=None,
        fingerprint=data.fingerprint,
        source=data.source,
    )


def _of_windows(dataset: LMDataset, collator: PadCollator, source: str) -> ScoredRows:
    windows = dataset.windows
    by_document = windows.num_documents >= MIN_DOCUMENTS
    return ScoredRows(
        dataset=dataset,
        collator=collator,
        units=list(windows.document_ids) if by_document else range(len(windows)),
        num_units=windows.num_documents if by_document else len(windows),
        unit="document" if by_document else "window",
        num_documents=windows.num_documents,
        context=windows.context,
        bos=windows.bos,
        fingerprint=dataset.fingerprint(),
        source=source,
    )


@dataclass(frozen=True, eq=False)
class Scored:
    """One row after the model: `log_probs` float32 [scored, vocab] over the next token, `targets` and `units`
    int64 [scored]. `scored` counts the row's tokens that have a label and something before them.
    """

    row: int
    log_probs: Tensor
    targets: Tensor
    units: Tensor


def score(
    model: nn.Module,
    rows: ScoredRows,
    device: torch.device,
    *,
    batch_size: int,
    only: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Iterator[Scored]:
    """Run `model` over the rows (over `only` some of them, if given), and yield them one by one, on `device`.

    One batch of logits and one row of log-probabilities exist at a time. Call it under `measuring(model)`.
    Raises: UsageError for a `batch_size` below 1 or a model without logits over a vocabulary.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} leaves nothing to do; use 1 or more")
    order = list(range(len(rows)) if only is None else only)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = {name: t.to(device) for name, t in rows.collator([rows.dataset[i] for i in chosen]).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = getattr(model(**batch), "logits", None)
        if logits is None or logits.shape[:2] != batch["input_ids"].shape:
            shape = "no logits" if logits is None else f"logits {tuple(logits.shape)}"
            raise UsageError(f"{type(model).__name__} returns {shape} for tokens; perplexity needs a causal LM")
        for index, row in enumerate(chosen):
            kept = labels[index] != IGNORED
            units = torch.as_tensor(rows.units[row], device=device).expand(batch["input_ids"].shape[1])
            yield Scored(
                row=row,
                log_probs=logits[index, :-1][kept].float().log_softmax(-1),
                targets=labels[index][kept],
                units=units[1:][kept],
            )
        del logits  # before the next batch's are made
        if progress is not None:
            progress(start + len(chosen), len(order))
