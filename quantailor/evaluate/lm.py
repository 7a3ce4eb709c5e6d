"""How well a language model predicts text, and how far it is from its float original.

    nats per token    mean of -log p(token | the tokens before it in its window)
    perplexity        exp of that
    KL                mean over positions of sum_v p_ref(v) (log p_ref(v) - log p(v)), in nats a token

Windows do not overlap (stride = context) and every token but a window's first one is scored. Logits that are not finite
make the perplexity infinite, so such a model never passes for a good one.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quantailor.data.examples import Examples
from quantailor.data.streams import LMWindows
from quantailor.errors import UntrustedInput, UsageError
from quantailor.evaluate import bootstrap
from quantailor.evaluate.divergence import kl_divergence
from quantailor.evaluate.measuring import Progress, measuring
from quantailor.evaluate.result import jsonable
from quantailor.evaluate.rows import Scored, ScoredRows, score, scored_rows


@dataclass(frozen=True, eq=False)
class LMResult:
    """Perplexity on `num_tokens` scored tokens, and with a reference `kl` and `top1_agreement` on `compared_tokens`.

    `interval` and `kl_interval` are 95 %, from resampling the units: documents, or windows where there are fewer than
    20 documents. `sums` (nats) and `counts` (tokens) float64 [num_units] are what they were made from.
    `bos` says whether documents open with a start token (None: records, laid out by a template).
    """

    perplexity: float
    nats_per_token: float
    interval: tuple[float, float]
    num_tokens: int
    num_documents: int
    context: int
    stride: int
    bos: bool | None
    unit: str
    fingerprint: str
    sums: NDArray[np.float64]
    counts: NDArray[np.float64]
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    top1_agreement: float | None = None
    compared_tokens: int = 0
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        return "perplexity"

    @property
    def value(self) -> float:
        return self.perplexity

    @property
    def higher_is_better(self) -> bool:
        return False

    @property
    def statistic(self) -> bootstrap.Statistic:
        return bootstrap.perplexity

    def __str__(self) -> str:
        low, high = self.interval
        start = {True: "start tokens", False: "no start tokens", None: "laid out as instructions"}[self.bos]
        text = (
            f"perplexity {self.perplexity:.3f} (95 %: {low:.3f} to {high:.3f}) on {self.num_tokens:,} tokens of "
            f"{self.num_documents:,} documents, context {self.context}, {start}"
        )
        if self.kl is None:
            return text
        return f"{text}; KL {self.kl:.5f} nats, same top token {self.top1_agreement:.2%} ({self.compared_tokens:,})"

    def to_json(self) -> dict[str, Any]:
        names = "nats_per_token num_tokens num_documents context stride bos unit kl kl_interval top1_agreement"
        names += " compared_tokens source fingerprint notes"
        fields = {name: getattr(self, name) for name in names.split()}
        return jsonable({"metric": self.metric, "value": self.value, "interval": self.interval, **fields})


@dataclass(frozen=True, eq=False)
class Reference:
    """The float model's answers, so that it need not run again: `result` on everything, log-probabilities on a part.

    `log_probs[row]` float16 or float32 [scored, vocab] and `top1[row]` int64 [scored], for windows (or records)
    drawn at random, on the CPU. float16 changes a KL by some 1e-7 nats and 1e-4 of itself.
    """

    result: LMResult
    log_probs: dict[int, Tensor]
    top1: dict[int, Tensor]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: LMWindows | Examples,
        *,
        max_tokens: int = 20_000,
        max_bytes: int = 2**30,
        dtype: torch.dtype = torch.float16,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> "Reference":
        """Measure `model` on `data`, and keep log-probabilities of at most `max_tokens` tokens and `max_bytes`.

        Raises: as `evaluate_lm`; UsageError if not even one row fits.
        """
        rows = scored_rows(data)
        with measuring(model) as device:
            probe = next(score(model, rows, device, batch_size=1, only=[0]))
            affordable = min(max_tokens, max_bytes // (probe.log_probs.shape[1] * dtype.itemsize))
            kept = _drawn(rows, affordable)
            if not kept:
                raise UsageError(
                    f"a reference of {affordable} tokens is less than one row; raise max_tokens={max_tokens} "
                    f"or max_bytes={max_bytes}"
                )
            log_probs: dict[int, Tensor] = {}
            top1: dict[int, Tensor] = {}

            def keep(scored: Iterator[Scored]) -> Iterator[Scored]:
                for item in scored:
                    if item.row in kept:
                        log_probs[item.row] = item.log_probs.to("cpu", dtype)
                        top1[item.row] = item.log_probs.argmax(-1).cpu()
                    yield item

            result = _measured(rows, keep(score(model, rows, device, batch_size=batch_size, progress=progress)), None)
        return cls(result, log_probs, top1)


def evaluate_lm(
    model: nn.Module,
    windows: LMWindows | Examples,
    *,
    batch_size: int = 16,
    reference: nn.Module | Reference | None = None,
    progress: Progress | None = None,
) -> LMResult:
    """Measure `model`, called as `model(input_ids=..., attention_mask=...).logits`; its training mode is kept.

    With a float model as `reference` the KL and the top-1 agreement are over every token, with a `Reference` over
    those it kept. Raises: UsageError if the reference is of other data or another vocabulary, or if the model returns
    no logits over a vocabulary; UntrustedInput if no token can be scored.
    """
    rows = scored_rows(windows)
    if isinstance(reference, Reference) and reference.result.fingerprint != rows.fingerprint:
        raise UsageError("the reference was made on other data; make it again with Reference.of(model, data)")
    with ExitStack() as stack:
        device = stack.enter_context(measuring(model))
        answers = None
        if isinstance(reference, Reference):
            answers = _kept_answers(reference, rows)
        elif reference is not None:
            reference_device = stack.enter_context(measuring(reference))
            answers = _live_answers(score(reference, rows, reference_device, batch_size=batch_size))
        return _measured(rows, score(model, rows, device, batch_size=batch_size, progress=progress), answers)


Answer = tuple[Tensor, Tensor] | None  # (log-probabilities [scored, vocab], top token [scored]) of a row, if known


def _live_answers(scored: Iterator[Scored]) -> Iterator[Answer]:
    return ((item.log_probs, item.log_probs.argmax(-1)) for item in scored)


def _kept_answers(reference: Reference, rows: ScoredRows) -> Iterator[Answer]:
    for row in range(len(rows)):
        if row not in reference.log_probs:
            yield None
        else:  # normalized again, or the rounding to float16 would look like a divergence
            yield reference.log_probs[row].float().log_softmax(-1), reference.top1[row]


def _measured(rows: ScoredRows, scored: Iterator[Scored], answers: Iterator[Answer] | None) -> LMResult:
    sums, counts, kl_sums, kl_counts = (torch.zeros(rows.num_units, dtype=torch.float64) for _ in range(4))
    num_broken = num_agreeing = 0
    for item in scored:
        nll = -item.log_probs.gather(1, item.targets[:, None]).squeeze(1).double().cpu()
        units = item.units.cpu()
        broken = ~torch.isfinite(nll)
        num_broken += int(broken.sum())
        sums.index_add_(0, units, nll.masked_fill(broken, math.inf))
        counts.index_add_(0, units, torch.ones_like(nll))
        answer = next(answers) if answers is not None else None
        if answer is not None:
            kl, agreeing = _compared(item.log_probs, *answer)
            kl_sums.index_add_(0, units, kl.double().cpu())
            kl_counts.index_add_(0, units, torch.ones_like(nll))
            num_agreeing += agreeing
    return _result(rows, [a.numpy() for a in (sums, counts, kl_sums, kl_counts)], num_broken, num_agreeing)


def _compared(log_probs: Tensor, reference: Tensor, reference_top1: Tensor) -> tuple[Tensor, int]:
    """(KL(reference || model) float32 [scored], on how many tokens the most likely one is the same)."""
    if log_probs.shape != reference.shape:
        sizes = f"{log_probs.shape[1]} and {reference.shape[1]}"
        raise UsageError(f"model and reference know {sizes} tokens; compare models of one tokenizer")
    best = log_probs.max(-1)  # nan where any of them is, and then nothing agrees
    agreeing = (best.indices == reference_top1.to(log_probs.device)) & torch.isfinite(best.values)
    return kl_divergence(reference.to(log_probs.device), log_probs), int(agreeing.sum())


def _result(rows: ScoredRows, arrays: list[NDArray[np.float64]], num_broken: int, num_agreeing: int) -> LMResult:
    sums, counts, kl_sums, kl_counts = arrays
    num_tokens, compared = int(counts.sum()), int(kl_counts.sum())
    if not num_tokens:
        raise UntrustedInput(f"{rows.source or 'the data'} has no token to score; it needs rows of two tokens")
    notes = []
    if num_broken:
        notes.append(f"{num_broken:,} of {num_tokens:,} tokens got no finite probability")
    if rows.unit == "window":
        notes.append(f"the interval resamples windows: {rows.num_documents} document(s) are too few to draw from")
    if compared and compared < num_tokens:
        notes.append(f"KL and agreement are over {compared:,} of {num_tokens:,} tokens")
    nats = float(sums.sum() / num_tokens)
    return LMResult(
        perplexity=float(bootstrap.perplexity(sums.sum(), counts.sum())),
        nats_per_token=nats,
        interval=bootstrap.interval(sums, counts, bootstrap.perplexity),
        num_tokens=num_tokens,
        num_documents=rows.num_documents,
        context=rows.context,
        stride=rows.context,
        bos=rows.bos,
        unit=rows.unit,
        fingerprint=rows.fingerprint,
        sums=sums,
        counts=counts,
        kl=max(0.0, float(kl_sums.sum() / compared)) if compared else None,
        kl_interval=bootstrap.interval(kl_sums, kl_counts, bootstrap.mean) if compared else None,
        top1_agreement=num_agreeing / compared if compared else None,
        compared_tokens=compared,
        source=rows.source,
        notes=tuple(notes),
    )


def _drawn(rows: ScoredRows, max_tokens: int) -> set[int]:
    """Rows drawn at random, the same ones each time, as long as they have at most `max_tokens` scored tokens."""
    drawn = set()
    for row in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist():
        num_tokens = rows.num_scored(row)
        if num_tokens <= max_tokens:
            drawn.add(row)
            max_tokens -= num_tokens
    return drawn
