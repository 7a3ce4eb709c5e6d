"""Peak memory of training by part, from a traced step.

    peak = weights + quantizers + teacher + kept copies + optimizer + max over phases of (activations + gradients)

With accumulation gradients stay between micro-batches, and are added to the phases that come before backward. On top
lies what no trace sees: the kernels' own buffers (`BUFFERS`, a share of all) and the gaps that C's allocator leaves. Of
a step's small activations glibc keeps freed ones on its heap, where optimizer states settle among them and the next
step does not fit into the holes: measured without a heap (mmap for all), the traced sum is met within 3 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quantailor.cost.figures import Figure
from quantailor.cost.step import Step

BUFFERS = 1.02  # measured without a heap / traced
GAPS = 0.8  # of the small activations, on the fitting models of bench/plan_accuracy.py
ERROR = 0.25  # covers every model of that file (kept out of fitting: 9.9 % on average, 25 % too high at most)
SOURCE = "traced step; overhead and interval from bench/results/plan_accuracy.json"


GPU_GAPS = 0.10  # of the activations: assumed
GPU_ERROR = 0.25  # not checked against a GPU
GPU_SOURCE = "traced step; gaps of the allocator and interval assumed, not checked against a GPU"


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the moment of the peak, and their sum with what no trace sees.

    On `devices` GPUs (0: in this machine's memory) parts are those of one of them: states in equal shards, rows
    divided, and what is kept for later stays in the host's memory.
    """

    weights: int
    activations: int
    gradients: int
    optimizer: int
    quantizer: int
    teacher: int
    cache: int  # copies that are kept: the best iterate, and of a command the model it started from
    gaps: int  # what the allocator cannot give to others
    phase: str
    devices: int = 0

    def __iter__(self) -> Iterator[tuple[str, int]]:
        names = ("weights", "activations", "gradients", "optimizer", "quantizer", "teacher", "cache", "gaps")
        return iter([(name, getattr(self, name)) for name in names])

    @property
    def peak(self) -> Figure:
        value = float(sum(size for _, size in self))
        if self.devices:
            return Figure(value, value * (1 - GPU_ERROR), value * (1 + GPU_ERROR), "assumed", GPU_SOURCE)
        return Figure(value, value * (1 - ERROR), value * (1 + ERROR), "measured", SOURCE)

    def to_json(self) -> dict[str, Any]:
        return {**dict(self), "phase": self.phase, "devices": self.devices, "peak": self.peak.to_json()}

    def on_gpus(self, count: int, rows: int) -> Memory:
        """Of one of `count` GPUs that share the states (FSDP2) and the `rows` of a micro-batch."""

        def share(size: int) -> int:
            return -(-size // count)

        activations = -(-self.activations // min(count, rows))
        return Memory(
            weights=share(self.weights),
            activations=activations,
            gradients=share(self.gradients),
            optimizer=share(self.optimizer),
            quantizer=share(self.quantizer),
            teacher=share(self.teacher),
            cache=0,
            gaps=round(GPU_GAPS * activations),
            phase=self.phase,
            devices=count,
        )


def of_training(step: Step, *, accumulate: int = 1, copies: int = 1, sources: int = 0) -> Memory:
    """`copies`: of all that trains, kept for the best iterate; `sources`: of the float weights, kept by the command."""
    before = step.gradient_bytes if accumulate > 1 else 0
    peaks = {
        phase: peak + (before if phase in ("forward", "loss", "backward, first half") else 0)
        for phase, peak in step.peaks.items()
    }
    phase = max(peaks, key=lambda name: peaks[name])
    early = phase in ("forward", "loss")
    gradients = (
        before
        if early
        else min(step.gradient_bytes, peaks[phase])
        if phase == "update"
        else min(before or step.gradient_bytes // 2, peaks[phase])
    )
    kept = copies * step.gradient_bytes + sources * step.weight_bytes
    traced = step.weight_bytes + step.quantizer_bytes + step.teacher_bytes + kept + step.optimizer_bytes + peaks[phase]
    return Memory(
        weights=step.weight_bytes,
        activations=peaks[phase] - gradients,
        gradients=gradients,
        optimizer=step.optimizer_bytes,
        quantizer=step.quantizer_bytes,
        teacher=step.teacher_bytes,
        cache=kept,
        gaps=round((BUFFERS - 1) * traced + GAPS * step.saved_small_bytes),
        phase=phase,
    )
