"""Looks for the best iterate, skips steps whose gradient is not finite, saves checkpoints, and reports progress."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from quantailor.errors import QuantailorError
from quantailor.progress import Advance, finishing
from quantailor.qat import checkpoint, distributed
from quantailor.qat.alarms import sentence
from quantailor.qat.best import Best, Score
from quantailor.qat.flight import Flight
from quantailor.qat.recording import Alarm
from quantailor.qat.settings import Settings
from quantailor.qat.stabilizer import Stabilizer
from quantailor.qat.starting import off_the_edges
from quantailor.store.work import Work

_STRIKES = 3  # steps in a row without a finite gradient before training goes back to its best iterate


class Watch(TrainerCallback):
    """One run's. `every`: steps between looks. With `saves`, a signal waits for the end of its step, which is saved.

    `work`: where checkpoints go, in process 0 of those that save. The context it is ends what a failed step had begun.
    """

    def __init__(
        self,
        best: Best,
        validate: Callable[[nn.Module], Score],
        every: int,
        advance: Advance,
        settings: Settings,
        flight: Flight,
        *,
        work: Work | None = None,
        saves: bool = False,
        stabilizer: Stabilizer | None = None,
    ) -> None:
        self.best, self.validate, self.every, self.advance, self.settings = best, validate, every, advance, settings
        self.flight, self.work, self.saves, self.stabilizer = flight, work, saves, stabilizer
        self.trainer: Any = None  # set once there is one
        self.buffers: checkpoint.Buffers | None = None
        self.strikes = 0
        self.recoveries = 0
        self.skipped = 0
        self.curve: list[tuple[int, Score]] = []
        self.losses: list[tuple[int, float]] = []
        self.since: list[float] = []  # losses of the steps since the last look
        self.average: dict[str, Tensor] = {}
        self.due = False  # a look that a signal came before
        self.stopped = ""  # why the run ends early
        self.rate = 0.0  # of the weights, in this step
        self._step = ExitStack()
        self._waits = False  # whether a signal waits for the step to come, or the one that runs

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._step.__exit__(kind, error, trace)

    # ------------------------------------------------------------------------------------------------ the Trainer calls

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None
        if self.settings.average and not self.average:
            self.average = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        self.wait_for(state)
        self.rate = max((group["lr"] for group in optimizer.param_groups if group["params"]), default=0.0)
        self.flight.begin(state.global_step + 1)
        share = self.settings.freeze_ranges
        if share is not None and state.global_step >= share * state.max_steps:
            for group in optimizer.param_groups:
                if group["kind"] == "ranges":
                    group["lr"] = 0.0  # the schedule sets it anew after each step, so it is put back here

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
        gradients = [distributed.local(p.grad) for p in model.parameters() if p.grad is not None]
        if not distributed.anywhere(not _all_finite(gradients), args.device):
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
        self.go_back(model)
        self.recoveries += 1
        self.strikes = 0
        halve_rates(optimizer, lr_scheduler)

    @torch.no_grad()
    def on_step_end(
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
        step = state.global_step
        self.since.append(float(distributed.mean(torch.stack(self.trainer.losses).sum())))
        self.trainer.losses.clear()
        alarm = self.flight.end(step, self.since[-1], self.trainer.gradient_norm, self.rate, self.trainer.tokens_seen())
        if alarm is not None:
            self.answer(alarm, model, optimizer, lr_scheduler)
        self.stopped = self.stopped or self.flight.over_budget(step)
        if self.average:  # rises to its full memory as Adam's averages do, so that the start is soon forgotten
            memory = min(1 - 1 / max(1.0, self.settings.average * state.max_steps), step / (step + 9))
            for name, parameter in model.named_parameters():
                if name in self.average:
                    self.average[name].lerp_(parameter.detach(), 1 - memory)
        self.due = step % self.every == 0 or step == state.max_steps or bool(self.stopped)
        self.advance_saving(args.device)
        looks = self.due
        self.finish_look(model, step, saves=self.saves)
        if self.saves and not looks and step % self.settings.checkpoint_every == 0:
            self.save()
        if self.stopped:
            control.should_training_stop = True
        elif step < state.max_steps:
            self.wait_for(state)

    # ------------------------------------------------------------------------------------------------ its parts

    def wait_for(self, state: TrainerState) -> None:
        """From now on a signal waits for the next step, where there are checkpoints: also while its batch is fetched,
        or the steps behind the last checkpoint would be lost."""
        if self.saves and not self._waits:
            self._step.enter_context(finishing(f"step {state.global_step + 1} of {state.max_steps}"))
            self._waits = True

    def advance_saving(self, device: torch.device) -> None:
        """Report the step. Raises: what a signal asked for while it ran, in every process; it is saved first."""
        stop: BaseException | None = None
        self._waits = False
        try:
            self._step.close()
            self.advance(1)
        except BaseException as error:
            stop = error
            if not self.saves:
                raise
        if self.saves and distributed.anywhere(stop is not None, device):
            self.save()
            raise stop or KeyboardInterrupt

    def answer(self, alarm: Alarm, model: nn.Module, optimizer: Any, lr_scheduler: Any) -> None:
        """Do what the alarm's action says."""
        if alarm.action == "went back":
            self.go_back(model)
        if alarm.action in ("went back", "lowered"):
            halve_rates(optimizer, lr_scheduler)
        if alarm.action == "stopped":
            self.stopped = sentence(alarm)

    def go_back(self, model: nn.Module) -> None:
        """To the best iterate."""
        self.best.restore()
        if self.best.step == 0 and self.settings.parallel != "fsdp2":
            off_the_edges(self.best.model, self.settings)
        self.average = {n: p.detach().clone() for n, p in model.named_parameters() if n in self.average}

    def finish_look(self, model: nn.Module, step: int, *, saves: bool) -> None:
        """The look that is due, if one is, and a checkpoint. Where there are checkpoints, a signal waits for both."""
        if not self.due:
            return
        with finishing(f"the evaluation after step {step}") if self.saves else nullcontext():
            with torch.random.fork_rng():  # looking does not change what comes after
                self._look(model, step)
            self.due = False
            if saves:
                self.save()

    def _look(self, model: nn.Module, step: int) -> None:
        score = self.validate(model)
        self.best.offer(step, score)
        if self.average:
            kept = self._exchange(model, self.average)
            averaged = self.validate(model)
            self.best.offer(step, averaged)
            self._exchange(model, kept)
            score = min(score, averaged)
        self.curve.append((step, score))
        loss = sum(self.since) / len(self.since) if self.since else None
        if loss is not None:
            self.losses.append((step, loss))
            self.since = []
        assert self.best.score is not None
        told = self.flight.looked(step, score, self.best.score, self.best.start_score, loss)
        self.stopped = self.stopped or told

    @torch.no_grad()
    def _exchange(self, model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put `values` into the model; what was there."""
        kept = {}
        for name, parameter in model.named_parameters():
            if name in values:
                kept[name] = parameter.detach().clone()
                parameter.copy_(values[name])
        return kept

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """A checkpoint behind the step just finished; a signal waits for it."""
        assert self.buffers is not None
        tensors = {f"average/{name}": value for name, value in self.average.items()}
        if self.stabilizer is not None:
            tensors |= {f"stable/{name}": value for name, value in self.stabilizer.tensors().items()}
        tensors |= {f"seen/{name}": value for name, value in self.flight.tensors().items()}
        watched = {
            "tensors": tensors,
            "strikes": self.strikes,
            "recoveries": self.recoveries,
            "skipped": self.skipped,
            "curve": [[step, checkpoint.words(score)] for step, score in self.curve],
            "losses": [[step, repr(loss)] for step, loss in self.losses],
            "since": [repr(loss) for loss in self.since],
            "due": self.due,
            "stopped": self.stopped,
            "flight": self.flight.record(),
        }
        with finishing("the checkpoint"):
            checkpoint.save(self.work, self.trainer, self.best, self.buffers.changed(), watched)

    def load(self, restored: checkpoint.Restored) -> None:
        """Go on from a checkpoint. The trainer and its model must be there, the model at its start."""
        record = restored.record
        self.strikes, self.recoveries, self.skipped = record["strikes"], record["recoveries"], record["skipped"]
        self.curve = [(step, checkpoint.numbers(score)) for step, score in record["curve"]]
        self.losses = [(step, float(loss)) for step, loss in record["losses"]]
        self.since = [float(loss) for loss in record["since"]]
        self.due, self.stopped = record["due"], record["stopped"]
        places = dict(self.trainer.model.named_parameters())
        self.average = {name: distributed.like(places[name], t) for name, t in restored.of("average").items()}
        if self.stabilizer is not None:
            self.stabilizer.load(restored.of("stable"))
        curve = [(0, self.best.start_score), *self.curve]
        self.flight.load(record["flight"], restored.of("seen"), curve, self.losses)
        self.advance(record["step"])


def halve_rates(optimizer: Any, lr_scheduler: Any) -> None:
    """Of all groups, for the rest of the run."""
    for group in getattr(optimizer, "optimizer", optimizer).param_groups:
        group["lr"] *= 0.5
        group["initial_lr"] = group.get("initial_lr", group["lr"]) * 0.5
    schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)
    if schedule is not None:  # it computes each step's rates from its own copy of the first ones
        schedule.base_lrs = [0.5 * rate for rate in schedule.base_lrs]


def _all_finite(gradients: list[Tensor]) -> bool:
    if not gradients:
        return True
    norms = torch._foreach_norm(gradients)
    return bool(torch.isfinite(torch.stack([n.float() for n in norms])).all())
