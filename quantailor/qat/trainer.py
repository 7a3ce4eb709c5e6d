"""HF's Trainer, with what QAT adds: distillation, scales in a group of their own, guards, the best iterate.

The training loop, mixed precision, accumulation and distribution are the Trainer's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from quantailor.errors import QuantailorError
from quantailor.progress import Advance
from quantailor.qat.best import Best, Score
from quantailor.qat.losses import kl_to_teacher, scored, task_loss
from quantailor.qat.settings import Settings

_STRIKES = 3  # steps in a row without a finite gradient before training goes back to its best iterate


class QATTrainer(Trainer):
    """`teacher` None: only the task's loss. The log-scales are in a no-decay group with a rate of their own."""

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        *,
        task: str,
        teacher: nn.Module | None,
        settings: Settings,
        rates: tuple[float, float],
        **others: Any,
    ) -> None:
        self.task, self.teacher, self.settings, self.rates = task, teacher, settings, rates
        super().__init__(model=model, args=arguments, **others)
        # The loss is a mean over a micro-batch: Trainer is to divide it by how many of them a step has.
        self.model_accepts_loss_kwargs = False
        if self.teacher is not None:
            self.teacher.to(self.args.device).eval()  # not frozen: it is the caller's, and runs under no_grad

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        """AdamW over three groups: matrices, vectors (no decay), log-scales (no decay, own rate)."""
        assert self.model is not None
        groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "scales": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                kind = "scales" if name.endswith("log_scale") else "matrices" if parameter.dim() >= 2 else "vectors"
                groups[kind].append(parameter)
        weight_rate, scale_rate = self.rates
        self.optimizer = torch.optim.AdamW(
            [
                {"params": groups["matrices"], "lr": weight_rate, "weight_decay": self.settings.weight_decay},
                {"params": groups["vectors"], "lr": weight_rate, "weight_decay": 0.0},
                {"params": groups["scales"], "lr": scale_rate, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.99),
        )
        return self.optimizer

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        labels = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**rest)
        student, targets = scored(outputs.logits, labels, self.task)
        loss = torch.zeros((), device=student.device)
        if self.settings.task_weight:
            loss = loss + self.settings.task_weight * task_loss(student, targets)
        if self.teacher is not None and self.settings.kl_weight:
            with torch.no_grad():
                teacher, _targets = scored(self.teacher(**rest).logits, labels, self.task)
            loss = loss + self.settings.kl_weight * kl_to_teacher(student, teacher, self.settings.temperature)
        return (loss, outputs) if return_outputs else loss


class Watch(TrainerCallback):
    """Looks for the best iterate, skips steps whose gradient is not finite, and reports progress."""

    def __init__(self, best: Best, validate: Callable[[nn.Module], Score], every: int, advance: Advance) -> None:
        self.best, self.validate, self.every, self.advance = best, validate, every, advance
        self.strikes = 0
        self.recoveries = 0
        self.skipped = 0
        self.curve: list[tuple[int, Score]] = []

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        assert model is not None
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if _all_finite(gradients):
            self.strikes = 0
            return
        self.skipped += 1
        self.strikes += 1
        for parameter in model.parameters():
            parameter.grad = None  # the optimizer passes over parameters without one
        if self.strikes < _STRIKES:
            return
        if self.recoveries:
            raise QuantailorError(
                f"training diverged twice (no finite gradient for {_STRIKES} steps at step {state.global_step}); "
                "lower --learning-rate"
            )
        self.best.restore()
        self.recoveries += 1
        self.strikes = 0
        inner = getattr(optimizer, "optimizer", optimizer)
        assert inner is not None
        for group in inner.param_groups:
            group["lr"] *= 0.5
            group["initial_lr"] = group.get("initial_lr", group["lr"]) * 0.5
        schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)
        if schedule is not None:  # it computes each step's rates from its own copy of the first ones
            schedule.base_lrs = [0.5 * rate for rate in schedule.base_lrs]

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None
        self.advance(1)
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            score = self.validate(model)
            self.curve.append((state.global_step, score))
            self.best.offer(state.global_step, score)


def _all_finite(gradients: list[Tensor]) -> bool:
    if not gradients:
        return True
    norms = torch._foreach_norm(gradients)
    return bool(torch.isfinite(torch.stack([n.float() for n in norms])).all())
