"""How often a classifier is right, and how often it says what its float original says."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quantailor.data.batching import length_of
from quantailor.data.examples import Examples
from quantailor.errors import UsageError
from quantailor.evaluate import bootstrap, metrics
from quantailor.evaluate.divergence import kl_divergence
from quantailor.evaluate.measuring import Progress, measuring
from quantailor.evaluate.result import jsonable


@dataclass(frozen=True, eq=False)
class ClassificationResult:
    """Accuracy on `num_rows` rows, and with a reference the share of rows with its prediction, and the mean KL.

    `f1` is of class 1 where there are two classes, else the macro average; `mean_loss` and `kl` are in nats a row.
    `predictions` int64 [num_rows] (-1 where the logits were not finite), `log_probs` float32 [num_rows, num_labels]
    are in the order of the rows. `interval` is 95 %, from resampling rows.
    """

    accuracy: float
    f1: float
    matthews: float
    mean_loss: float
    interval: tuple[float, float]
    num_rows: int
    num_labels: int
    fingerprint: str
    predictions: NDArray[np.int64]
    labels: NDArray[np.int64]
    log_probs: Tensor
    agreement: float | None = None
    kl: float | None = None
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        return "accuracy"

    @property
    def value(self) -> float:
        return self.accuracy

    @property
    def higher_is_better(self) -> bool:
        return True

    @property
    def sums(self) -> NDArray[np.float64]:
        return (self.predictions == self.labels).astype(np.float64)

    @property
    def counts(self) -> NDArray[np.float64]:
        return np.ones(self.num_rows)

    @property
    def statistic(self) -> bootstrap.Statistic:
        return bootstrap.mean

    def __str__(self) -> str:
        low, high = self.interval
        text = (
            f"accuracy {self.accuracy:.4f} (95 %: {low:.4f} to {high:.4f}) on {self.num_rows:,} rows, "
            f"F1 {self.f1:.4f}, Matthews {self.matthews:.4f}, loss {self.mean_loss:.4f}"
        )
        if self.agreement is None:
            return text
        return f"{text}; same prediction {self.agreement:.2%}, KL {self.kl:.5f} nats"

    def to_json(self) -> dict[str, Any]:
        names = "f1 matthews mean_loss num_rows num_labels agreement kl source fingerprint notes"
        fields = {name: getattr(self, name) for name in names.split()}
        return jsonable({"metric": self.metric, "value": self.value, "interval": self.interval, **fields})


def evaluate_classification(
    model: nn.Module,
    examples: Examples,
    *,
    batch_size: int = 32,
    reference: nn.Module | ClassificationResult | None = None,
    progress: Progress | None = None,
) -> ClassificationResult:
    """Measure `model`, called as `model(input_ids=..., attention_mask=...).logits`; its training mode is kept.

    `reference` is the float model, or its result on the same examples. Raises: UsageError for examples of another
    task, for fewer classes in the model than in the data, or for a reference of other data or classes.
    """
    if examples.task != "classification":
        raise UsageError(f"{examples.source} holds {examples.task} examples; load it with task='classification'")
    if isinstance(reference, ClassificationResult) and reference.fingerprint != examples.fingerprint:
        raise UsageError("the reference was measured on other data; evaluate the float model on these examples")
    if isinstance(reference, nn.Module):
        reference = evaluate_classification(reference, examples, batch_size=batch_size)
    log_probs = _log_probs(model, examples, batch_size, progress)
    labels = torch.tensor([examples.dataset[row]["labels"] for row in range(len(examples))], dtype=torch.int64)
    num_labels = log_probs.shape[1]
    if num_labels <= int(labels.max()) or num_labels < examples.num_labels:
        raise UsageError(
            f"the model has {num_labels} classes, {examples.source} has {examples.num_labels}; train its head for these"
        )
    finite = torch.isfinite(log_probs).any(-1) & ~torch.isnan(log_probs).any(-1)
    predictions = torch.where(finite, log_probs.argmax(-1), -1).numpy()
    loss = nn.functional.nll_loss(log_probs, labels, reduction="none").double()
    right = (predictions == labels.numpy()).astype(np.float64)
    agreement, kl = _compared(log_probs, predictions, reference) if reference is not None else (None, None)
    num_broken = int((~finite).sum())
    return ClassificationResult(
        accuracy=metrics.accuracy(predictions, labels.numpy()),
        f1=metrics.f1(predictions, labels.numpy(), num_labels),
        matthews=metrics.matthews(predictions, labels.numpy()),
        mean_loss=float(torch.where(torch.isnan(loss), math.inf, loss).mean()),
        interval=bootstrap.interval(right, np.ones(len(right)), bootstrap.mean),
        num_rows=len(right),
        num_labels=num_labels,
        fingerprint=examples.fingerprint,
        predictions=predictions,
        labels=labels.numpy(),
        log_probs=log_probs,
        agreement=agreement,
        kl=kl,
        source=examples.source,
        notes=(f"{num_broken:,} of {len(right):,} rows got logits that are not finite",) if num_broken else (),
    )


def _log_probs(model: nn.Module, examples: Examples, batch_size: int, progress: Progress | None) -> Tensor:
    """float32 [num_rows, num_labels] on the CPU, in the order of the rows."""
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} leaves nothing to do; use 1 or more")
    rows = examples.dataset
    # Longest first: rows of a batch then need little padding, and a batch that does not fit is the first one
    order = sorted(range(len(rows)), key=lambda index: -length_of(rows[index]))
    found: list[Tensor] = []
    with measuring(model) as device:
        for start in range(0, len(order), batch_size):
            batch = examples.collator([rows[index] for index in order[start : start + batch_size]])
            labels = batch.pop("labels")
            logits = getattr(model(**{name: tensor.to(device) for name, tensor in batch.items()}), "logits", None)
            if logits is None or logits.ndim != 2 or len(logits) != len(labels):
                shape = "no logits" if logits is None else f"logits {tuple(logits.shape)}"
                raise UsageError(f"{type(model).__name__} returns {shape} for {len(labels)} rows; load a classifier")
            found.append(logits.float().log_softmax(-1).cpu())
            if progress is not None:
                progress(start + len(labels), len(order))
    log_probs = torch.empty(len(order), found[0].shape[1])
    log_probs[torch.tensor(order)] = torch.cat(found)
    return log_probs


def _compared(
    log_probs: Tensor, predictions: NDArray[np.int64], reference: ClassificationResult
) -> tuple[float, float]:
    """(the share of equal predictions, the mean KL(reference || model) in nats)."""
    if reference.log_probs.shape != log_probs.shape:
        raise UsageError(
            f"model and reference have {log_probs.shape[1]} and {reference.num_labels} classes; compare like with like"
        )
    agreeing = (predictions == reference.predictions) & (predictions >= 0)
    return float(agreeing.mean()), max(0.0, float(kl_divergence(reference.log_probs, log_probs).double().mean()))
