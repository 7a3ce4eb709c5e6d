"""QAT end to end: from a calibrated model to the best iterate of a run, never to a worse one than the start."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from quantailor.data.batching import length_of
from quantailor.data.examples import Examples
from quantailor.errors import UsageError
from quantailor.kernels.native import library as native
from quantailor.kernels.scratch import release
from quantailor.kernels.triton import library as gpu
from quantailor.models.prepare import FAKE_QUANT
from quantailor.models.structure import modules_of
from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.nn.int_forward import set_backward
from quantailor.nn.packed import PackedWeight
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.progress import Progress
from quantailor.qat import checkpoint, distributed
from quantailor.qat.best import Best, Score
from quantailor.qat.distill import Distiller, distiller_of
from quantailor.qat.flight import Flight
from quantailor.qat.freezing import frozen
from quantailor.qat.groups import kinds_of
from quantailor.qat.low_bits import FOLLOWS, acting
from quantailor.qat.quantizers import StandIns, stand_ins
from quantailor.qat.recording import NAME as RECORDING
from quantailor.qat.recording import Listener, Recording
from quantailor.qat.settings import Settings, learning_rates, resolved
from quantailor.qat.sharding import scored_sharded, sharded
from quantailor.qat.stabilizer import Stabilizer
from quantailor.qat.starting import off_the_edges
from quantailor.qat.trainer import QATTrainer, adamw
from quantailor.qat.watch import Watch
from quantailor.store.work import Work

Validate = Callable[[nn.Module], Score]
_OPTIONS = {field.name for field in dataclasses.fields(TrainingArguments)}
# Its name, and the one that it has in the oldest transformers that we take.
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _OPTIONS else "gradient_checkpointing"


@dataclass(frozen=True)
class TrainReport:
    """What a run did. `start`, `best` are scores of `validate`, lower is better; `best_step` 0 = the start was kept.

    `curve`: (step, score) of each look; `losses`: (step, mean training loss since the last one). `optimizer_bytes`: of
    the optimizer's tensors in this process. `stopped`: why a rule, a goal or an alarm ended the run before its last
    step; "" if none did. `recording`: where `settings.record` asks for it, in the first process.
    """

    steps: int
    best_step: int
    start: Score
    best: Score
    curve: list[tuple[int, Score]] = field(default_factory=list)
    learning_rate: float = 0.0
    scale_learning_rate: float = 0.0
    trainable: int = 0
    notes: list[str] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    optimizer_bytes: int = 0
    stopped: str = ""
    recording: Recording | None = None

    @property
    def improved(self) -> bool:
        return self.best_step > 0


def weight_bits(model: nn.Module) -> int:
    """The lowest number of weight bits in the model, 0 if it is float."""
    bits = [m.spec.grid.bits for m in model.modules() if isinstance(m, WeightQuantizer | PackedWeight)]
    return min(bits, default=0)


def train(
    model: nn.Module,
    examples: Examples,
    validate: Validate,
    settings: Settings,
    *,
    teacher: nn.Module | None = None,
    progress: Progress | None = None,
    work: Work | None = None,
    saves: bool | None = None,
    floating: Score | None = None,
    listeners: Sequence[Listener] = (),
) -> TrainReport:
    """Train `model` (fake-quantized, or float as the control) in place, to its best iterate, the start included.

    `validate` gives a score, lower is better; it is asked before the first step and `settings.evaluations` times.
    `teacher` None: only the task's loss counts. With `work` (made with `states=checkpoint.KEPT`) training goes on
    behind the last checkpoint in it; where several processes train, the first one has it and the others say `saves`.
    `floating`: the float model's score, from which a goal of recovery is reckoned. `listeners` hear what is recorded.
    Where torch.distributed is initialised, every process calls this with the same arguments.
    Raises: QuantailorError if training diverges twice; UsageError where a setting does not suit the model.
    """
    bits = weight_bits(model)
    settings = resolved(settings, bits, len(examples))
    assert settings.steps is not None
    rates = learning_rates(settings, bits, sum(p.numel() for p in model.parameters()))
    notes = _uncalibrated(model) + _without_kernels(_device())
    saves = work is not None if saves is None else saves
    _check(settings, examples)
    distiller, gamma_told = distiller_of(teacher, settings, examples, _device())
    notes += gamma_told
    with ExitStack() as stack:
        stack.enter_context(repeatable(settings))
        standing = stack.enter_context(stand_ins(model, settings))
        stack.enter_context(frozen(model, settings))
        taught = teacher is not None and settings.distills
        if not (settings.dropout if settings.dropout is not None else not taught):
            stack.enter_context(without_dropout(model))
        _check_has_effect(model, settings)
        trained = model
        if settings.parallel == "fsdp2":
            off_the_edges(model, settings)  # sharded weights are not whole: the start that may come back has them moved
            trained, validate = sharded(model, _device()), scored_sharded(validate)
        best = Best(trained)
        restored = checkpoint.newest(work) if saves else None
        if restored is None:
            best.offer(0, validate(trained))
        else:
            restored.put_best(best)
        if settings.parallel != "fsdp2":
            off_the_edges(model, settings)
        watch, trainer = _run(
            trained,
            examples,
            validate,
            settings,
            rates,
            best,
            distiller,
            progress,
            work,
            saves,
            restored,
            bits,
            floating,
            listeners,
        )
        release()
        best.model = model
        best.restore()
        _settle(standing, best)
        stabilizer = watch.stabilizer
        notes += stabilizer.notes() if stabilizer is not None else []
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.eval()
    if restored is not None:
        notes.append(f"training went on from step {restored.record['step']}, where it had been interrupted")
    if trainer.parts > 1:
        notes.append(
            f"memory ran out: batches of {settings.batch_size} rows were split into {trainer.parts} parts, whose "
            "gradients are summed; a step counts as many rows as before"
        )
    if watch.skipped:
        notes.append(f"{watch.skipped} steps skipped: their gradient was not finite")
    if watch.recoveries:
        notes.append("training diverged once; it went on from its best iterate at half the learning rate")
    flight = watch.flight
    notes += flight.notes
    made = trainer.state.global_step or (restored.record["step"] if restored is not None else 0)
    if watch.stopped:
        notes.append(f"stopped after step {made} of {settings.steps}: {watch.stopped}")
    if flight.recording is not None and (alarms := flight.recording.alarms):
        told = ", ".join(f"{alarm.alarm} at step {alarm.step}" for alarm in alarms[:5])
        notes.append(f"{len(alarms)} alarm{'s' if len(alarms) > 1 else ''} raised: {told}; {RECORDING} has more")
    if best.step == 0:
        notes.append(f"{made} steps found nothing better than the start: the start was kept")
    assert best.score is not None
    return TrainReport(
        steps=made,
        best_step=best.step,
        start=best.start_score,
        best=best.score,
        curve=[(0, best.start_score), *watch.curve],
        learning_rate=rates[0],
        scale_learning_rate=rates[1],
        trainable=trainable,
        notes=notes,
        losses=watch.losses,
        optimizer_bytes=_optimizer_bytes(trainer),
        stopped=watch.stopped,
        recording=flight.recording,
    )


def _run(
    model: nn.Module,
    examples: Examples,
    validate: Validate,
    settings: Settings,
    rates: tuple[float, float],
    best: Best,
    distiller: Distiller | None,
    progress: Progress | None,
    work: Work | None,
    saves: bool,
    restored: checkpoint.Restored | None,
    bits: int,
    floating: Score | None,
    listeners: Sequence[Listener],
) -> tuple[Watch, QATTrainer]:
    """The steps that are left."""
    assert settings.steps is not None
    every = max(1, settings.steps // max(1, settings.evaluations))
    set_backward(model, _backward(settings, _device()))
    stabilizer = Stabilizer(model, settings) if settings.cage or settings.freeze_oscillating is not None else None
    quiet = Progress() if distributed.rank() else progress or Progress()
    with (
        tempfile.TemporaryDirectory() as folder,
        quiet.task("training", settings.steps) as advance,
        acting(model, settings) as others,
    ):
        flight = Flight(
            model,
            settings,
            every,
            path=None if work is None else work.path(RECORDING),
            listeners=listeners,
            say=quiet.say,
            floating=floating,
        )
        watch = Watch(best, validate, every, advance, settings, flight, work=work, saves=saves, stabilizer=stabilizer)
        arguments = _arguments(folder, settings, rates[0])
        set_seed(settings.seed)
        trainer = QATTrainer(
            model,
            arguments,
            task=examples.task,
            distiller=distiller,
            settings=settings,
            rates=rates,
            restored=restored,
            train_dataset=examples.dataset,
            data_collator=examples.collator,
            callbacks=[watch, *([stabilizer] if stabilizer is not None else []), *others],
        )
        # Trainer's own console printer: figures of ours stand in its place.
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
                trainer.remove_callback(callback)
        watch.trainer, watch.buffers = trainer, checkpoint.Buffers(model)
        state, made = None, 0
        if restored is None:
            watch.stopped = flight.looked(0, best.start_score, best.start_score, best.start_score, None)
        else:
            watch.load(restored)
            state, made = checkpoint.trainer_state(restored, Path(folder)), restored.record["step"]
            if watch.due or watch.stopped or made >= settings.steps:
                restored.put_model(model)
                watch.finish_look(model, made, saves=False)
        if not watch.stopped and made < settings.steps:  # the Trainer would make one step more
            with watch:
                trainer.train(resume_from_checkpoint=state)
        flight.close(trainer.state.global_step or made, watch.stopped)
    return watch, trainer


def _check(settings: Settings, examples: Examples) -> None:
    world = distributed.world()
    if settings.group_by_length and len({length_of(examples.dataset[row]) for row in range(len(examples))}) == 1:
        raise UsageError("group_by_length has no effect where all rows are of one length, as here; leave it out")
    if settings.parallel == "fsdp2" and world == 1:
        raise UsageError("parallel='fsdp2' shares a model between processes, and this is one; start it by torchrun")
    if settings.batch_size % world:
        raise UsageError(f"batch_size={settings.batch_size} is shared by {world} processes; use a multiple of {world}")
    if settings.parallel == "fsdp2" and (settings.cage or settings.freeze_oscillating is not None):
        raise UsageError("cage and freeze_oscillating look at whole weights; use parallel='ddp'")
    if settings.parallel == "fsdp2" and settings.recording:
        raise UsageError("a recording looks at whole weights; use parallel='ddp', or leave it out")
    if settings.parallel == "fsdp2" and settings.gradient in (*FOLLOWS, "binaryconnect"):
        raise UsageError(f"gradient={settings.gradient!r} looks at whole weights; use parallel='ddp'")
    if settings.parallel == "fsdp2" and settings.optimizer != "adamw":
        raise UsageError("optimizer='adamw-8bit' does not know sharded weights; use parallel='ddp', or 'adamw'")
    adamw(settings)


def _check_has_effect(model: nn.Module, settings: Settings) -> None:
    """Raises: UsageError where nothing trains, or a setting is about something that this model does not have."""
    kinds = set(kinds_of(model).values())
    if not kinds:
        raise UsageError("nothing is left to train; freeze less")
    if settings.freeze_ranges is not None and "ranges" not in kinds:
        raise UsageError("freeze_ranges is about scales of static inputs, and none is trained here; leave it out")
    pulled = any(m.weight.requires_grad and m.weight_quantizer is not None for _, m in modules_of(model, FAKE_QUANT))
    if (settings.cage or settings.freeze_oscillating is not None) and not pulled:
        raise UsageError("cage and freeze_oscillating act on weights with a grid, and none is trained; leave them out")


def _settle(standing: StandIns, best: Best) -> None:
    if best.step > 0:
        standing.settle()


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """No unit is dropped while it lasts. A teacher answers with all of its units: a student that drops some is taught
    to make up for chance, which is most of the loss where hidden states are compared (docs/LOG.md)."""
    modules: list[Any] = list(model.modules())
    shares = [(m, "p") for m in modules if isinstance(m, nn.modules.dropout._DropoutNd)]
    shares += [(m, "attention_dropout") for m in modules if isinstance(getattr(m, "attention_dropout", None), float)]
    before = [getattr(module, name) for module, name in shares]
    for module, name in shares:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for (module, name), share in zip(shares, before):
            setattr(module, name, share)


@contextmanager
def repeatable(settings: Settings) -> Iterator[None]:
    """With `settings.deterministic`: one thread, and only such kernels as give the same bits each time. As it was
    afterwards."""
    if not settings.deterministic:
        yield
        return
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)


def _optimizer_bytes(trainer: QATTrainer) -> int:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if optimizer is None:  # all steps had been made before
        return 0
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(distributed.local(t).numel() * t.element_size() for t in tensors)


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


def _without_kernels(device: torch.device) -> list[str]:
    """A note where a GPU trains without our kernels: last bits can differ, and it is slower."""
    reason = gpu.why_not(device.type) if device.type == "cuda" else ""
    return [f"torch operators did what our GPU kernels do: {reason}"] if reason else []


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _backward(settings: Settings, device: torch.device) -> torch.dtype:
    """What integer layers multiply their gradients in."""
    if settings.backward == "auto":
        return torch.bfloat16 if native.multiplies_bf16(device.type) else torch.float32
    return torch.bfloat16 if settings.backward == "bfloat16" else torch.float32


def _arguments(folder: str, settings: Settings, learning_rate: float) -> TrainingArguments:
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    assert settings.steps is not None and settings.warmup is not None
    options: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size // distributed.world(),
        "gradient_accumulation_steps": settings.accumulate,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": settings.final_rate},
        "warmup_steps": round(settings.warmup * settings.steps),
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.precision == "bfloat16",
        _CHECKPOINTING: settings.gradient_checkpointing,
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
