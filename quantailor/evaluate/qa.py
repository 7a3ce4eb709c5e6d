"""Extractive question answering: the best span of each text, held against the answers that people gave.

    span(i, j)    i <= j < i + max_length, both tokens of the text      score = start[i] + end[j]

The best over all windows of a text is the answer. Every span is looked at, where BERT's own evaluation combines the 20
best starts and ends only. Sources: Devlin et al. 2019, arXiv:1810.04805, section 4.2; metrics in `squad.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quantailor.data.squad import QAExamples
from quantailor.errors import UsageError
from quantailor.evaluate import bootstrap, squad
from quantailor.evaluate.measuring import Progress, measuring
from quantailor.evaluate.result import jsonable

MAX_ANSWER = 30  # tokens, as in BERT's own evaluation


@dataclass(frozen=True, eq=False)
class QAResult:
    """Mean `f1` and `exact_match`, 0 to 1, over the questions; `answers` are the texts found, in their order.

    `sums` float64 [num_questions] are the F1 of each. `interval` is 95 %, from resampling questions. `agreement`: the
    share of questions answered as the reference answers them.
    """

    f1: float
    exact_match: float
    interval: tuple[float, float]
    num_questions: int
    num_windows: int
    fingerprint: str
    answers: tuple[str, ...]
    sums: NDArray[np.float64]
    agreement: float | None = None
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        return "f1"

    @property
    def value(self) -> float:
        return self.f1

    @property
    def higher_is_better(self) -> bool:
        return True

    @property
    def counts(self) -> NDArray[np.float64]:
        return np.ones(self.num_questions)

    @property
    def statistic(self) -> bootstrap.Statistic:
        return bootstrap.mean

    def __str__(self) -> str:
        low, high = self.interval
        text = (
            f"F1 {self.f1:.4f} (95 %: {low:.4f} to {high:.4f}), exact match {self.exact_match:.4f} on "
            f"{self.num_questions:,} questions in {self.num_windows:,} windows"
        )
        return text if self.agreement is None else f"{text}; same answer {self.agreement:.2%}"

    def to_json(self) -> dict[str, Any]:
        names = "exact_match num_questions num_windows agreement source fingerprint notes"
        fields = {name: getattr(self, name) for name in names.split()}
        return jsonable({"metric": self.metric, "value": self.value, "interval": self.interval, **fields})


def evaluate_qa(
    model: nn.Module,
    examples: QAExamples,
    *,
    batch_size: int = 32,
    reference: nn.Module | QAResult | None = None,
    progress: Progress | None = None,
) -> QAResult:
    """Measure `model`, called as `model(input_ids=..., ...)` for `start_logits` and `end_logits` [B, T].

    Raises: UsageError if it returns none, or for a reference measured on other questions.
    """
    if isinstance(reference, QAResult) and reference.fingerprint != examples.fingerprint:
        raise UsageError("the reference was measured on other data; evaluate the float model on these examples")
    if isinstance(reference, nn.Module):
        reference = evaluate_qa(reference, examples, batch_size=batch_size)
    answers = find_answers(model, examples, batch_size=batch_size, progress=progress)
    pairs = list(zip(answers, (question.answers for question in examples.questions)))
    f1 = np.array([squad.f1(found, right) for found, right in pairs])
    exact = np.array([squad.exact_match(found, right) for found, right in pairs])
    none = sum(not found for found in answers)
    return QAResult(
        f1=float(f1.mean()),
        exact_match=float(exact.mean()),
        interval=bootstrap.interval(f1, np.ones(len(f1)), bootstrap.mean),
        num_questions=len(answers),
        num_windows=len(examples),
        fingerprint=examples.fingerprint,
        answers=tuple(answers),
        sums=f1,
        agreement=None if reference is None else float(np.mean([a == b for a, b in zip(answers, reference.answers)])),
        source=examples.source,
        notes=(f"{none:,} of {len(answers):,} questions got no finite span",) if none else (),
    )


def find_answers(
    model: nn.Module, examples: QAExamples, *, batch_size: int = 32, progress: Progress | None = None
) -> list[str]:
    """The text found for each question; empty where no span has a finite score."""
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} leaves nothing to do; use 1 or more")
    best: list[tuple[float, str]] = [(-math.inf, "")] * len(examples.questions)
    rows = examples.dataset
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    with measuring(model) as device:
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            batch = examples.collator([rows[index] for index in chosen])
            batch.pop("labels")
            output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
            start, end = getattr(output, "start_logits", None), getattr(output, "end_logits", None)
            if start is None or end is None or start.shape != batch["input_ids"].shape:
                raise UsageError(f"{type(model).__name__} gives no start and end logits; use a model for answers (qa)")
            for row, index in enumerate(chosen):
                window = examples.windows_of[index]
                inside = torch.tensor([place is not None for place in window.places])
                size = len(window.places)
                score, i, j = best_span(start[row, :size].float().cpu(), end[row, :size].float().cpu(), inside)
                if score > best[window.question][0]:
                    (left, _), (_, right) = window.places[i], window.places[j]  # type: ignore[misc]
                    best[window.question] = (score, examples.questions[window.question].context[left:right])
            if progress is not None:
                progress(first + len(chosen), len(order))
    return [text for _, text in best]


def best_span(start: Tensor, end: Tensor, inside: Tensor, max_length: int = MAX_ANSWER) -> tuple[float, int, int]:
    """(score, i, j) of the best span of at most `max_length` tokens; -inf where there is none.

    Shapes: `start`, `end` float [T]; `inside` bool [T], the tokens that a span may begin and end with. Of equal scores
    the shortest span wins, then the first.
    """
    barred = torch.full_like(start, -math.inf)
    start, end = (torch.where(inside & torch.isfinite(logits), logits, barred) for logits in (start, end))
    best = (-math.inf, 0, 0)
    for more in range(min(max_length, len(start))):
        scores = start[: len(start) - more] + end[more:]
        score, i = scores.max(0)
        if float(score) > best[0]:
            best = (float(score), int(i), int(i) + more)
    return best
