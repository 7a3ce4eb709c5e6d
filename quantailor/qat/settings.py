"""How long, how fast and towards what: the settings of a QAT run, and their defaults by bit width.

Everything that depends on the bits of the weights stands in `DEFAULTS`, one row a width. Learning rates fall with model
size, as published ones do from 10^8 to 10^10 parameters: the table holds the rate at one million parameters, and
rates go with the size to the power -0.65. Measured at 2 and 4 bits, between 0.26 and 3.7 million parameters, one
seed (docs/LOG.md); other rows are filled in between, larger models extrapolated.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

from quantailor.errors import UsageError
from quantailor.qat.stopping import parse, parse_goal

GRADIENTS = ("lsq", "lsq+", "ste", "pact", "bitnet", "xnor", "binaryconnect")
PRECISIONS = ("float32", "bfloat16")
BACKWARDS = ("auto", "bfloat16", "float32")
OPTIMIZERS = ("adamw", "adamw-8bit")
TRAINABLE = ("all", "scales", "ranges")
DIVERGENCES = ("kl", "cakld", "jsd")
PARALLEL = ("ddp", "fsdp2")
ON_ALARM = ("warn", "act", "stop")


class Defaults(NamedTuple):
    """What a width of weights gets where nothing else is asked for."""

    learning_rate: float  # of the weights, at 10^6 parameters
    scale_learning_rate: float  # of the logarithms of the scales
    steps: int
    warmup: float  # share of the steps


# Weight bits -> defaults. 0 stands for float.
DEFAULTS: dict[int, Defaults] = {
    1: Defaults(8.5e-4, 1e-3, 400, 0.1),
    2: Defaults(8.5e-4, 1e-3, 400, 0.1),
    3: Defaults(4e-4, 1e-3, 200, 0.1),
    4: Defaults(1.5e-4, 5e-4, 200, 0.1),
    5: Defaults(1e-4, 5e-4, 200, 0.1),
    6: Defaults(1e-4, 3e-4, 100, 0.1),
    7: Defaults(5e-5, 3e-4, 100, 0.1),
    8: Defaults(5e-5, 3e-4, 100, 0.1),
    0: Defaults(2e-4, 0.0, 200, 0.1),
}
_SCALES_ONLY = 5.0  # times the table's rate of scales where nothing but scales trains


@dataclass(frozen=True)
class Settings:
    """One QAT run. `None` = the default of the table for the scheme and the model's size.

    `epochs` in place of `steps`: passes over the training rows. `trains` "scales": integers stay as PTQ left them;
    log-scales, norm gains and biases train. "ranges": nothing but the scales of static inputs trains. `train_only`: the
    layers that these patterns name train, all others stay as PTQ left them (qat/freezing.py). `layer_decay` d: the
    block i from the top learns at d^i of the rate, embeddings one step lower still. `freeze_lower`: the share of the
    blocks, counted from the input, that does not train, embeddings included. `freeze_ranges`: the share of the run
    after which the scales of static inputs stay (0: from the start; None: never). `average`: the share of the run over
    which an exponential moving average of the weights, offered beside each iterate, forgets (0: no average). `blend`:
    the share of the run in which quantization comes in (0: whole from the first step; None: half of it with
    gradient="bitnet" on trained weights, else 0).
    `record`: keep a recording of the run (flight.py), a measure each `record_every` steps; `on_alarm`: what an alarm
    does; `stop`, `until`: rules and a goal that end the run early (stopping.py). Alarms that do something, and the
    rule error-stable, need what is recorded, so they turn it on.
    """

    steps: int | None = None
    learning_rate: float | None = None
    scale_learning_rate: float | None = None  # of log(scale): relative change a step
    batch_size: int = 8  # rows a forward pass, of all processes together
    accumulate: int = 1
    group_by_length: bool = False  # rows of about one length share a batch: little is padded
    dropout: bool | None = None  # the model's own; None: where no teacher is asked
    warmup: float | None = None  # share of the steps
    final_rate: float = 0.05  # what the cosine ends at, as a share of the highest rate
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    kl_weight: float = 1.0  # divergence of the logits from the float teacher's
    divergence: str = "kl"  # which one
    hidden_weight: float = 0.0  # hidden states, embeddings included, against the teacher's
    attention_weight: float = 0.0  # attention scores before softmax, likewise
    task_weight: float = 0.0  # the task's own loss
    temperature: float = 1.0
    evaluations: int = 8  # how often the best iterate is looked for
    seed: int = 0
    epochs: float | None = None
    trains: str = "all"
    train_only: tuple[str, ...] = ()
    gradient: str = "lsq"
    blend: float | None = None
    clip_decay: float = 1e-4  # PACT's L2 on its clipping level
    layer_decay: float = 1.0
    freeze_lower: float = 0.0
    freeze_ranges: float | None = None
    cage: float = 0.0  # strength of the pull towards the grid
    freeze_oscillating: float | None = None  # frequency above which a weight is frozen onto its integer
    average: float = 0.0
    precision: str = "float32"
    backward: str = "auto"  # what integer layers multiply gradients in: auto is bfloat16 where that is fast
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    parallel: str = "ddp"  # what several processes do with the model
    deterministic: bool = False
    checkpoint_every: int = 25  # steps, where there is a work folder
    record: bool = False
    record_every: int | None = None  # steps; None: ten, more in runs of over 4000
    on_alarm: str = "warn"
    stop: tuple[str, ...] = ()
    until: str | None = None

    @property
    def recording(self) -> bool:
        """Whether the run is recorded."""
        return self.record or self.on_alarm != "warn" or any(parse(r).name == "error-stable" for r in self.stop)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every", "record_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value} trains nothing; use 1 or more")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise UsageError(f"epochs={self.epochs} trains nothing; use more than 0, such as 1 or 2")
        if self.epochs is not None and self.steps is not None:
            raise UsageError(f"epochs={self.epochs} and steps={self.steps} both say how long; leave one out")
        if isinstance(self.train_only, str):
            raise UsageError(f"train_only={self.train_only!r} must be a tuple of patterns, such as ('*.down_proj',)")
        object.__setattr__(self, "train_only", tuple(self.train_only))
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"seed={self.seed} must be 0 or more and below 2^31")
        for name in ("learning_rate", "scale_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 10:
                raise UsageError(f"{name}={value} must lie between 0 and 10; leave it out for the default")
        if self.kl_weight < 0 or self.task_weight < 0 or self.kl_weight + self.task_weight == 0:
            raise UsageError(
                f"kl_weight={self.kl_weight}, task_weight={self.task_weight}: neither may be negative, one must count"
            )
        for name in ("warmup", "freeze_ranges", "freeze_oscillating", "final_rate", "freeze_lower", "average", "blend"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"{name}={value} is a share; use 0 to 1")
        if self.freeze_lower == 1:
            raise UsageError("freeze_lower=1 leaves no block to train; use less than 1")
        if not 0 < self.layer_decay <= 1:
            raise UsageError(f"layer_decay={self.layer_decay} must be above 0 and at most 1, which is no decay")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UsageError(f"temperature={self.temperature} must be above 0; 1 leaves the logits as they are")
        for name in ("cage", "clip_decay", "hidden_weight", "attention_weight"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise UsageError(f"{name}={getattr(self, name)} must be 0 or more")
        for name, known in (
            ("trains", TRAINABLE),
            ("gradient", GRADIENTS),
            ("divergence", DIVERGENCES),
            ("precision", PRECISIONS),
            ("backward", BACKWARDS),
            ("optimizer", OPTIMIZERS),
            ("parallel", PARALLEL),
            ("on_alarm", ON_ALARM),
        ):
            if getattr(self, name) not in known:
                raise UsageError(f"{name}={getattr(self, name)!r} is not known; use {' or '.join(known)}")
        object.__setattr__(self, "stop", tuple(self.stop))
        names = [parse(text).name for text in self.stop]
        if len(set(names)) < len(names):
            raise UsageError(f"stop={', '.join(self.stop)} gives a rule twice; give each once")
        if self.until is not None:
            parse_goal(self.until)
        if self.record_every is not None and not self.recording:
            raise UsageError(
                f"record_every={self.record_every} is of no use without record=True; leave it out, or record"
            )
        if self.trains != "all":
            for name, off in (("gradient", "lsq"), ("cage", 0.0), ("freeze_oscillating", None), ("blend", 0.0)):
                given = getattr(self, name)
                if given not in (off, None) and not (self.trains == "ranges" and given == "pact"):
                    raise UsageError(
                        f"{name}={given!r} is about weights that move, and trains={self.trains!r} moves none; "
                        "leave one of the two out"
                    )

    @property
    def distills(self) -> bool:
        """Whether a teacher is asked anything."""
        return bool(self.kl_weight or self.hidden_weight or self.attention_weight)


def resolved(settings: Settings, weight_bits: int, num_rows: int | None = None) -> Settings:
    """The same with steps counted out of epochs of `num_rows`, the table's steps and warm-up, and the blend of its
    gradient, where none are asked for."""
    row = DEFAULTS[weight_bits]
    steps = row.steps if settings.steps is None else settings.steps
    if settings.epochs is not None:
        if num_rows is None:
            raise UsageError(f"epochs={settings.epochs} counts rows, and none are given; use steps")
        steps = max(1, math.ceil(settings.epochs * num_rows / (settings.batch_size * settings.accumulate)))
    warmup = row.warmup if settings.warmup is None else settings.warmup
    blend = (0.5 if settings.gradient == "bitnet" else 0.0) if settings.blend is None else settings.blend
    return dataclasses.replace(settings, steps=steps, epochs=None, warmup=warmup, blend=blend)


def learning_rates(settings: Settings, weight_bits: int, num_parameters: int) -> tuple[float, float]:
    """(of the weights, of the log-scales), from the settings or the table."""
    size = (num_parameters / 1e6) ** -0.65
    row = DEFAULTS[weight_bits]
    scales = row.scale_learning_rate * (_SCALES_ONLY if settings.trains != "all" else 1.0)
    return (
        settings.learning_rate if settings.learning_rate is not None else row.learning_rate * size,
        settings.scale_learning_rate if settings.scale_learning_rate is not None else scales,
    )


# Of A and B (Adam), by the lowest number of weight bits. Tried at 4 bits alone (docs/LOG.md); at fewer bits steps are
# wider, and rates follow those of full QAT.
_ADAPTER_RATE = {1: 2e-3, 2: 2e-3, 3: 1e-3, 4: 5e-4, 5: 5e-4, 6: 3e-4, 7: 3e-4, 8: 2e-4}


def adapter_rate(settings: Settings, weight_bits: int) -> float:
    """Of adapters, from the settings or the table."""
    return settings.learning_rate if settings.learning_rate is not None else _ADAPTER_RATE[weight_bits]
