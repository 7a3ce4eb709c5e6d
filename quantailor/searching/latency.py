"""What one forward pass of a packed model takes: measured on this machine, or predicted from its bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.errors import UsageError

CALLS = 40  # timed ones


def size_bytes(model: nn.Module) -> int:
    """Bytes of every parameter and buffer that is stored, shared ones once: what a pass has to read."""
    kept = model.state_dict(keep_vars=True)
    return sum({id(t): t.numel() * t.element_size() for t in kept.values()}.values())


@dataclass(frozen=True)
class Latency:
    """How the time of a pass over `batch` is found. `bandwidth` GB/s: predicted as bytes / bandwidth, the time of a
    device that is kept waiting by its memory, as one is that decodes one token at a time; None: measured here.

    Measured is the lower quartile of 40 calls behind a warm-up: other work on the machine only ever adds to a call.
    """

    batch: Mapping[str, Tensor]
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        if self.bandwidth is not None and not 0 < self.bandwidth < float("inf"):
            raise UsageError(f"bandwidth={self.bandwidth} GB/s must be above 0, such as 50 for a desktop's memory")

    @property
    def how(self) -> str:
        """In words, for receipts."""
        rows, length = next(iter(self.batch.values())).shape[:2]
        over = f"one pass over {rows} x {length} tokens"
        if self.bandwidth is not None:
            return f"predicted, not measured: bytes of the weights over {self.bandwidth:g} GB/s"
        return f"measured on this machine: {over}, lower quartile of {CALLS} calls"

    def __call__(self, packed: nn.Module) -> float:
        """Milliseconds."""
        if self.bandwidth is not None:
            return size_bytes(packed) / self.bandwidth / 1e6
        return forward_ms(packed, self.batch)


@torch.inference_mode()
def forward_ms(model: nn.Module, batch: Mapping[str, Any], calls: int = CALLS) -> float:
    """Lower quartile of so many calls in milliseconds, on the model's device. Its training mode is kept."""
    device = next(iter(model.state_dict(keep_vars=True).values())).device
    inputs = {name: value.to(device) for name, value in batch.items()}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    training, times = model.training, []
    model.eval()
    try:
        for number in range(calls + 3):
            began = time.perf_counter()
            model(**inputs)
            wait()
            if number >= 3:
                times.append(1e3 * (time.perf_counter() - began))
    finally:
        model.train(training)
    return statistics.quantiles(times, n=4)[0]
