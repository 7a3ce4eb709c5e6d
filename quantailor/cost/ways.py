"""Steps, seconds, memory, disk and money of each way to fewer bits: PTQ, hybrid, QAT, LoRA-QAT, progressive, scratch.

Training is priced by a traced step (cost/step.py); PTQ by a traced forward pass over the calibration rows and the
solvers' measured seconds a weight (bench/results/ptq_cost.json), scaled by the speed of products.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from quantailor.cost.figures import Figure, counted
from quantailor.cost.hardware import Hardware
from quantailor.cost.memory import Memory, of_training
from quantailor.cost.step import Step
from quantailor.cost.storage import Storage
from quantailor.cost.throughput import Machine
from quantailor.cost.trace import Op
from quantailor.recipe import Inventory, in_features

HOUR = 3600.0
TOKENS_PER_PARAMETER = 20  # of training from scratch: Hoffmann et al. 2022, arXiv:2203.15556, section 3
IMAGE_EPOCHS = 300  # of training an image model from scratch: assumed
# Seconds a weight of the range search, and seconds per flop of K^2 N + K^3 of the solver, on a machine that multiplies
# 340 GFLOP/s in float32: bench/results/ptq_cost.json at 768x3072 and 2048x5632.
RTN_SECONDS = 3.5e-8
SOLVER_SECONDS = 3e-11
REFERENCE_FLOPS = 340e9
PTQ_ERROR = 1.5  # PTQ seconds, up or down by up to 2.5 times: assumed
PASSES = 3  # of each block over the calibration rows: float, on the quantized prefix, and its outputs


@dataclass(frozen=True)
class Way:
    """One way, priced. `seconds` of wall time; `hours` of devices, all together. `fits`: None = no limit is known."""

    name: str
    steps: int
    seconds: Figure
    hours: Figure
    money: Figure
    memory: Memory | None
    peak: Figure
    disk: int
    fits: bool | None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "steps": self.steps,
            "seconds": self.seconds.to_json(),
            "gpu_hours": self.hours.to_json(),
            "money": self.money.to_json(),
            "memory": self.memory.to_json() if self.memory else None,
            "peak_bytes": self.peak.to_json(),
            "disk_bytes": self.disk,
            "fits": self.fits,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Target:
    """What the work runs on: this machine as it was probed, or a device of the table."""

    name: str
    price: Figure  # an hour of one device
    count: int
    memory_bytes: float | None
    machine: Machine | None = None
    hardware: Hardware | None = None

    def seconds(self, ops: Counter[Op]) -> Figure:
        if self.machine is not None:
            return self.machine.figure(ops)
        assert self.hardware is not None
        return self.hardware.seconds(ops)

    @property
    def product_rate(self) -> float:
        """float32 flops a second of one device."""
        if self.machine is not None:
            return self.machine.flops_per_second()
        assert self.hardware is not None
        return 1e12 * self.hardware.peak["float32"] * 0.3

    def to_json(self) -> dict[str, Any]:
        inner = (
            self.hardware.to_json() if self.hardware else {"about": dict(self.machine.about) if self.machine else {}}
        )
        return {
            "name": self.name,
            "count": self.count,
            "price_per_hour": self.price.to_json(),
            "memory_bytes": self.memory_bytes,
            **inner,
        }


def money(target: Target, seconds: Figure) -> tuple[Figure, Figure]:
    """(device hours, their price)."""
    hours = seconds * (target.count / HOUR)
    return hours, hours * target.price


def step_seconds(target: Target, step: Step, accumulate: int) -> Figure:
    """One update: `accumulate` micro-batches and the optimizer's step."""
    whole: Counter[Op] = Counter({op: n * accumulate for op, n in step.ops.items()})
    return target.seconds(whole + step.update_ops)


def training(
    name: str,
    target: Target,
    step: Step,
    steps: int,
    storage: Storage,
    *,
    accumulate: int = 1,
    start: Figure | None = None,
    sources: int = 1,
    rows: int = 1,
    notes: tuple[str, ...] = (),
) -> Way:
    """A training run of so many updates of micro-batches of `rows`, after `start` (such as PTQ)."""
    seconds = step_seconds(target, step, accumulate) * steps + (start or counted(0))
    memory = of_training(step, accumulate=accumulate, copies=2, sources=sources)
    if target.hardware is not None:
        memory = memory.on_gpus(target.count, rows)
        if target.count > 1:
            notes = (*notes, f"memory of one device of {target.count}, states sharded (fsdp2)")
    checkpoint = step.gradient_bytes + step.optimizer_bytes
    hours, amount = money(target, seconds)
    return Way(
        name,
        steps,
        seconds,
        hours,
        amount,
        memory,
        memory.peak,
        storage.total + checkpoint,
        fits(target, memory.peak),
        notes,
    )


def fits(target: Target, peak: Figure) -> bool | None:
    """Whether the middle of the peak is in one device's memory."""
    return None if target.memory_bytes is None else peak.value <= target.memory_bytes


def ptq(
    target: Target,
    forward: Step,
    descent: Step | None,
    inventory: Inventory,
    storage: Storage,
    *,
    rows: int,
    length: int,
    batch: int,
    bits: int,
) -> Way:
    """RTN or a solver over `rows` calibration rows; `descent`: also Block-AP, a training step of `batch` rows."""
    seconds = target.seconds(Counter({op: n * PASSES * -(-rows // batch) for op, n in forward.ops.items()}))
    seconds = seconds + _solving(target, inventory, rows * length)
    notes = ["one pass of a solver (Qronos), with activations of the calibration rows kept"]
    if descent is not None:
        blocks = target.seconds(descent.ops) * (600 if bits <= 2 else 300)
        seconds = seconds + blocks
        notes = ["Qronos, then descent on the rounding of each block (Block-AP)"]
    wide = max((in_features(e.kind, e.shape) for e in inventory if e.scheme), default=0)
    block = max(_block_bytes(inventory), 1)
    hidden = min((min(e.shape) for e in inventory if e.scheme and len(e.shape) == 2), default=0)
    peak = block + 7 * 4 * wide**2 + 2 * 4 * rows * length * hidden
    figure = Figure(peak, peak / 1.5, peak * 1.5, "assumed", "a float32 block, 7 of the widest X^T X, kept activations")
    hours, amount = money(target, seconds)
    return Way("ptq", 0, seconds, hours, amount, None, figure, storage.total, fits(target, figure), tuple(notes))


def _block_bytes(inventory: Inventory) -> int:
    """float32 bytes of the largest run of layers that share a block's name: the first three parts of it."""
    blocks: dict[str, int] = {}
    for entry in inventory:
        if entry.scheme is not None:
            key = ".".join(part for part in entry.name.split(".")[:4])
            number = next((i for i, part in enumerate(entry.name.split(".")) if part.isdigit()), None)
            key = ".".join(entry.name.split(".")[: number + 1]) if number is not None else key
            blocks[key] = blocks.get(key, 0) + 4 * entry.num_weights
    return max(blocks.values(), default=0)


def _solving(target: Target, inventory: Inventory, tokens: int) -> Figure:
    """Statistics, range search and solver of every layer."""
    weights = cubes = grams = 0.0
    for entry in inventory:
        if entry.scheme is None or entry.tied_to is not None:
            continue
        k = in_features(entry.kind, entry.shape)
        n = math.prod(entry.shape) / k
        weights += n * k
        cubes += k * k * n + k**3
        grams += 2.0 * 2 * tokens * k * k  # H and G of Qronos
    scale = REFERENCE_FLOPS / target.product_rate
    seconds = scale * (RTN_SECONDS * weights + SOLVER_SECONDS * cubes) + grams / target.product_rate
    source = "bench/results/ptq_cost.json, scaled by the speed of products; within 2.5 times"
    return Figure(seconds, seconds / (1 + PTQ_ERROR), seconds * (1 + PTQ_ERROR), "assumed", source)


def scratch_steps(step: Step, kind: str, rows: int | None, batch_rows: int, length: int) -> tuple[int, str]:
    """(updates, how they were counted) of training from scratch."""
    if kind == "image":
        if rows is None:
            return 0, "how many images there are is not known"
        return math.ceil(IMAGE_EPOCHS * rows / batch_rows), f"{IMAGE_EPOCHS} epochs of the data: assumed"
    tokens = TOKENS_PER_PARAMETER * step.num_parameters
    return math.ceil(tokens / (batch_rows * length)), f"{TOKENS_PER_PARAMETER} tokens a parameter (arXiv:2203.15556)"


def epochs(steps: int, batch_rows: int, rows: int | None) -> float | None:
    """How often a run of so many updates sees the data."""
    return None if not rows else steps * batch_rows / rows
