"""HF's Trainer, with what QAT adds: distillation, scales in a group of their own, batches that are split when memory
runs out, and checkpoints without pickle.

The training loop, mixed precision, accumulation and distribution are the Trainer's.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

from quantailor.data.batching import LengthGrouped, length_of
from quantailor.errors import QuantailorError, UsageError
from quantailor.qat import distributed
from quantailor.qat.checkpoint import Restored, restore_optimizer, restore_random
from quantailor.qat.distill import Distiller
from quantailor.qat.groups import parameter_groups
from quantailor.qat.losses import scored, task_loss
from quantailor.qat.quantizers import clipping_penalty
from quantailor.qat.settings import Settings

_HALVINGS = 4  # how often a micro-batch is split before memory is called too small


class QATTrainer(Trainer):
    """`distiller` None: only the task's loss. The log-scales are in a no-decay group with a rate of their own.

    `parts`: into how many pieces each micro-batch is split, 1 until memory runs out. `restored`: where to go on from.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        *,
        task: str,
        distiller: Distiller | None,
        settings: Settings,
        rates: tuple[float, float],
        restored: Restored | None = None,
        **others: Any,
    ) -> None:
        self.task, self.distiller, self.settings, self.rates, self.restored = task, distiller, settings, rates, restored
        self.parts = restored.record["parts"] if restored else 1
        self.losses: list[Tensor] = []  # of the micro-batches since the last look, each its share of a step
        self.gradient_norm: Any = None  # of the last step, before clipping
        self._tokens = 0
        self._share = 1.0
        self._done: list[Any] = []  # micro-batches of this step whose gradients are summed already
        super().__init__(model=model, args=arguments, **others)
        if isinstance(model, FSDPModule):  # sharded by sharding.py: placed, and its gradients reduced, by itself
            self.is_distributed_loading_by_transformers = True
        # The loss is a mean over a micro-batch: Trainer is to divide it by how many of them a step has.
        self.model_accepts_loss_kwargs = False
        if self.distiller is not None:
            self.distiller.teacher.to(self.args.device).eval()  # not frozen: it is the caller's, and runs under no_grad

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        """AdamW over the groups of groups.py. Raises: UsageError where 8-bit states are asked for and not to be had."""
        assert self.model is not None
        groups = parameter_groups(self.model, self.settings, self.rates)
        self.optimizer = adamw(self.settings)(groups, betas=(0.9, 0.99))
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.settings.group_by_length:
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset
        lengths = [length_of(rows[index]) for index in range(len(rows))]
        return LengthGrouped(lengths, self.settings.batch_size * self.settings.accumulate, self.settings.seed)

    # ------------------------------------------------------------------------------------------------ the loss

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        labels = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        with self.distiller.watching(model) if self.distiller else contextlib.nullcontext() as kept:
            outputs = model(**rest, **(self.distiller.extra if self.distiller else {}))
        student, targets = scored(outputs.logits, labels, self.task)
        loss = torch.zeros((), device=student.device)
        if self.settings.task_weight:
            loss = loss + self.settings.task_weight * task_loss(student, targets)
        if self.distiller is not None and self.settings.distills:
            loss = loss + self.distiller.loss(rest, labels, student, outputs, kept)
        if self.settings.gradient == "pact" and (penalty := clipping_penalty(model)) is not None:
            loss = loss + self.settings.clip_decay * penalty
        loss = loss * self._share
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *more: Any, **others: Any) -> Tensor:
        """One micro-batch, in `parts` pieces; in more of them if memory runs out, the whole step again.

        Pieces count by their scored positions, so that their gradients add up to the micro-batch's.
        """
        loss: Tensor | None = None
        while loss is None:
            try:
                loss = self._in_parts(model, inputs, *more, **others)
            except (MemoryError, RuntimeError) as error:
                self._split(error, inputs)
            if loss is None:  # outside of `except`: the traceback would keep the activations
                self._clear(model)
                for earlier in self._done:
                    self._in_parts(model, earlier, *more, **others)
        self._done.append(inputs)
        self._tokens += _tokens(inputs)
        if self.accelerator.sync_gradients:
            self._done = []
        self.losses.append(loss)
        return loss

    def tokens_seen(self) -> int:
        """In all processes, since it was asked last. Every process must ask."""
        seen = torch.tensor(float(self._tokens), device=self.args.device)
        self._tokens = 0
        return round(float(distributed.mean(seen)) * distributed.world())

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self.gradient_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.gradient_norm

    def _in_parts(self, model: nn.Module, inputs: dict[str, Any], *more: Any, **others: Any) -> Tensor:
        rows = len(inputs["labels"])
        pieces = min(self.parts, rows)
        if pieces == 1:
            return super().training_step(model, inputs, *more, **others)
        splits = {name: value.tensor_split(pieces) for name, value in inputs.items()}
        counts = [self._positions(labels) for labels in splits["labels"]]
        total = torch.zeros((), device=self.args.device)
        try:
            for number, count in enumerate(counts):
                if count:
                    self._share = count / sum(counts)
                    piece = {name: split[number] for name, split in splits.items()}
                    total += super().training_step(model, piece, *more, **others)
        finally:
            self._share = 1.0
        return total

    def _positions(self, labels: Tensor) -> int:
        if self.task == "classification":
            return len(labels)
        return int((labels[:, 1:] != -100).sum())

    def _split(self, error: BaseException, inputs: dict[str, Any]) -> None:
        """Twice as many pieces. Raises: `error` if it is no lack of memory; QuantailorError if none is left."""
        if not is_out_of_memory(error):
            raise error
        if distributed.world() > 1:  # the others wait in a collective that this process would have to repeat
            raise QuantailorError("a process ran out of memory; use a smaller --batch-size with more --accumulate")
        rows = len(inputs["labels"])
        if self.parts >= min(rows, 2**_HALVINGS):
            raise QuantailorError(
                f"out of memory with micro-batches of {-(-rows // self.parts)} rows; use a shorter --context, "
                "--gradient-checkpointing, or a machine with more memory"
            )
        self.parts = min(2 * self.parts, rows)

    def _clear(self, model: nn.Module) -> None:
        model.zero_grad()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------------------------------------ going on

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self.restored is not None and self.model is not None
        self.restored.put_model(self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.restored is not None
            restore_optimizer(self.restored, self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.restored is not None
            restore_random(self.restored)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """bfloat16 needs none."""

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Of a model that `train` sharded: micro-batches before the last leave their gradients unreduced."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)


def adamw(settings: Settings) -> Any:
    """The optimizer's class. Raises: UsageError where it is not installed."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            "optimizer='adamw-8bit' needs bitsandbytes, which is not installed; pip install bitsandbytes, or leave the "
            "optimizer out"
        )
    return importlib.import_module("bitsandbytes.optim").AdamW8bit


def _tokens(inputs: dict[str, Any]) -> int:
    """Those that the mask shows; without one, all there are; a picture is one."""
    if (mask := inputs.get("attention_mask")) is not None:
        return int(mask.sum())
    ids = inputs.get("input_ids")
    return ids.numel() if ids is not None else len(inputs["labels"])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how Python, torch on a GPU or torch on a CPU says that memory ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
