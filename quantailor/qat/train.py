"""QAT end to end: from a calibrated model to the best iterate of a run, never to a worse one than the start."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from quantailor.data.examples import Examples
from quantailor.models.prepare import FAKE_QUANT
from quantailor.models.structure import modules_of
from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.progress import Progress
from quantailor.qat.best import Best, Score
from quantailor.qat.settings import Settings, learning_rates
from quantailor.qat.trainer import QATTrainer, Watch

Validate = Callable[[nn.Module], Score]


@dataclass(frozen=True)
class TrainReport:
    """What a run did. `start`, `best` are scores of `validate`, lower is better; `best_step` 0 = the start was kept."""

    steps: int
    best_step: int
    start: Score
    best: Score
    curve: list[tuple[int, Score]] = field(default_factory=list)
    learning_rate: float = 0.0
    scale_learning_rate: float = 0.0
    trainable: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def improved(self) -> bool:
        return self.best_step > 0


def weight_bits(model: nn.Module) -> int:
    """The lowest number of weight bits in the model, 0 if it is float."""
    bits = [m.spec.grid.bits for m in model.modules() if isinstance(m, WeightQuantizer)]
    return min(bits, default=0)


def train(
    model: nn.Module,
    examples: Examples,
    validate: Validate,
    settings: Settings,
    *,
    teacher: nn.Module | None = None,
    progress: Progress | None = None,
) -> TrainReport:
    """Train `model` (fake-quantized, or float as the control) in place, to its best iterate, the start included.

    `validate` gives a score, lower is better; it is asked before the first step and `settings.evaluations` times.
    `teacher` None: only the task's loss counts. Raises: QuantailorError if training diverges twice.
    """
    bits = weight_bits(model)
    rates = learning_rates(settings, bits, sum(p.numel() for p in model.parameters()))
    best = Best(model)
    start = validate(model)
    best.offer(0, start)
    every = max(1, settings.steps // max(1, settings.evaluations))
    notes = _uncalibrated(model)
    with tempfile.TemporaryDirectory() as folder, (progress or Progress()).task("training", settings.steps) as advance:
        watch = Watch(best, validate, every, advance)
        arguments = _arguments(folder, settings, rates[0])
        set_seed(settings.seed)
        trainer = QATTrainer(
            model,
            arguments,
            task=examples.task,
            teacher=teacher,
            settings=settings,
            rates=rates,
            train_dataset=examples.dataset,
            data_collator=examples.collator,
            callbacks=[watch],
        )
        # Trainer's own console printer: figures of ours stand in its place.
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
                trainer.remove_callback(callback)
        trainer.train()
    best.restore()
    model.eval()
    if watch.skipped:
        notes.append(f"{watch.skipped} steps skipped: their gradient was not finite")
    if watch.recoveries:
        notes.append("training diverged once; it went on from its best iterate at half the learning rate")
    if best.step == 0:
        notes.append(f"{settings.steps} steps found nothing better than the start: the start was kept")
    assert best.score is not None
    return TrainReport(
        steps=settings.steps,
        best_step=best.step,
        start=start,
        best=best.score,
        curve=[(0, start), *watch.curve],
        learning_rate=rates[0],
        scale_learning_rate=rates[1],
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        notes=notes,
    )


def _uncalibrated(model: nn.Module) -> list[str]:
    """Static input scales that no data ever set: an error at packing, a note here."""
    names = []
    for name, module in modules_of(model, FAKE_QUANT):
        quantizer = module.input_quantizer
        if isinstance(quantizer, ActivationQuantizer) and not quantizer.spec.dynamic and not quantizer.calibrated:
            names.append(name)
    return (
        [f"{len(names)} layers have a static input scale that was never calibrated, such as {names[0]}"]
        if names
        else []
    )


def _arguments(folder: str, settings: Settings, learning_rate: float) -> TrainingArguments:
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.05},
        "warmup_steps": round(settings.warmup * settings.steps),
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
    }
    return TrainingArguments(**options)
