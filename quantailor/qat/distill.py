"""What a float teacher says beside the labels: logits, hidden states and attention scores (qat/losses.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.data.columns import Task
from quantailor.errors import UsageError
from quantailor.models.attention import Scores, keeping_scores
from quantailor.qat.losses import IGNORED, cakld, hidden_loss, jsd, kl_to_teacher, score_loss, scored
from quantailor.qat.settings import Settings

_GAMMA_ROWS = 512  # rows of the training data that gamma is measured on


class Distiller:
    """Compares a student's forward pass with the teacher's on the same inputs. `gamma`: CAKLD's, measured once."""

    def __init__(self, teacher: nn.Module, settings: Settings, task: Task | str, gamma: float | None = None) -> None:
        self.teacher, self.settings, self.task, self.gamma = teacher, settings, task, gamma

    @property
    def extra(self) -> dict[str, Any]:
        """What the models are asked for beside logits."""
        return {"output_hidden_states": True} if self.settings.hidden_weight else {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[Scores | None]:
        """Around a forward pass: its attention scores, where they count."""
        if not self.settings.attention_weight:
            yield None
            return
        with keeping_scores(model) as kept:
            yield kept

    def loss(
        self, inputs: Mapping[str, Tensor], labels: Tensor, logits: Tensor, outputs: Any, kept: Scores | None
    ) -> Tensor:
        """The weighted sum of what the settings ask for, 0-d. `logits` [n, V]: the student's scored ones."""
        with torch.no_grad(), self.watching(self.teacher) as theirs:
            taught = self.teacher(**inputs, **self.extra)
        total = torch.zeros((), device=logits.device)
        if self.settings.kl_weight:
            total = total + self.settings.kl_weight * self._divergence(
                logits, scored(taught.logits, labels, self.task)[0]
            )
        if self.settings.hidden_weight:
            _check_same_shapes("hidden states", outputs.hidden_states, taught.hidden_states)
            real = _real(inputs)
            total = total + self.settings.hidden_weight * hidden_loss(outputs.hidden_states, taught.hidden_states, real)
        if kept is not None and theirs is not None:
            _check_same_shapes("attention scores", kept.scores, theirs.scores)
            total = total + self.settings.attention_weight * score_loss(kept.scores, theirs.scores, kept.seen)
        return total

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        temperature = self.settings.temperature
        match self.settings.divergence:
            case "cakld":
                assert self.gamma is not None
                return cakld(student, teacher, self.gamma, temperature)
            case "jsd":
                return jsd(student, teacher, temperature=temperature)
            case _:
                return kl_to_teacher(student, teacher, temperature)


@torch.no_grad()
def measure_gamma(teacher: nn.Module, batches: Iterable[Mapping[str, Tensor]], task: Task | str) -> float:
    """CAKLD's gamma: the mean over rows of the mean probability that the teacher gives a row's labels (Eq. 7).

    Raises: UsageError where no position counts.
    """
    device = next(teacher.parameters()).device
    rows: list[Tensor] = []
    was_training = teacher.training
    teacher.eval()
    for batch in batches:
        moved = {name: value.to(device) for name, value in batch.items()}
        labels = moved.pop("labels")
        logits = teacher(**moved).logits.float()
        if task != "lm":
            rows.append(logits.softmax(-1).gather(1, labels.view(-1, 1)).view(-1).cpu())
            continue
        targets = labels[:, 1:]
        chances = logits[:, :-1].softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        counts = targets != IGNORED
        kept = counts.any(1)
        rows.append(((chances * counts).sum(1)[kept] / counts.sum(1)[kept]).cpu())
    teacher.train(was_training)
    if not rows or not sum(len(part) for part in rows):
        raise UsageError("divergence='cakld' measures the teacher's probability of labels, and no row has any")
    return float(torch.cat(rows).double().mean())


def distiller_of(
    teacher: nn.Module | None, settings: Settings, examples: Any, device: torch.device
) -> tuple[Distiller | None, list[str]]:
    """The distiller of a run, and what is to be told of it; None without a teacher.

    Raises: UsageError where settings ask for what only a teacher can give.
    """
    if teacher is None:
        for name in ("hidden_weight", "attention_weight"):
            if getattr(settings, name):
                raise UsageError(f"{name} compares with a teacher, and there is none; name one, or leave it out")
        if settings.divergence != "kl":
            raise UsageError(f"divergence={settings.divergence!r} is to a teacher, and there is none; leave it out")
        return None, []
    if settings.divergence != "cakld" or not settings.kl_weight:
        return Distiller(teacher, settings, examples.task), []
    rows = min(_GAMMA_ROWS, len(examples))
    gamma = measure_gamma(teacher.to(device), examples.batches(settings.batch_size, limit=rows), examples.task)
    told = f"CAKLD: gamma = {gamma:.4f}, the teacher's mean probability of the label over {rows} training rows"
    return Distiller(teacher, settings, examples.task, gamma), [told]


def _real(inputs: Mapping[str, Tensor]) -> Tensor:
    """bool [B, T]: which tokens are no padding."""
    if "input_ids" not in inputs:
        raise UsageError("hidden_weight compares hidden states of tokens, and this model reads none; leave it out")
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _check_same_shapes(what: str, student: Any, teacher: Any) -> None:
    mine, theirs = ([tuple(t.shape[1:]) for t in tensors] for tensors in (student, teacher))
    if mine != theirs:
        raise UsageError(
            f"the student has {len(mine)} {what} of shape {mine[0]}, the teacher {len(theirs)} of {theirs[0]}; use a "
            "teacher of the same architecture, or the logits alone"
        )
