"""Several processes share the calibration samples; each ends with the same integers. No-ops in a single process.

Started by `torchrun`, or by any program that has initialised torch.distributed. A process takes every world-th batch;
what is summed over samples (X^T X, its diagonal, rows, rejected batches) is summed over the processes, ranges of static
activations are merged, and one process's solution of each layer is sent to the others. Only sums differ from a single
process's, by the order of float additions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantailor.errors import UsageError
from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.observers.ranges import EMA, Histogram, MinMax, Observer
from quantailor.processes import barrier as barrier
from quantailor.processes import from_all as from_all
from quantailor.processes import from_rank as from_rank
from quantailor.processes import join as join
from quantailor.processes import leave as leave
from quantailor.processes import rank as rank
from quantailor.processes import world as world

T = TypeVar("T")


def share(batches: Sequence[T]) -> list[T]:
    """This process's batches: every world-th. Raises: UsageError if there are fewer batches than processes."""
    if len(batches) < world():
        raise UsageError(
            f"{len(batches)} calibration batches for {world()} processes; give more samples, or start fewer processes"
        )
    return list(batches[rank() :: world()])


def mean_(tensors: Iterable[Tensor | None]) -> None:
    """Replace each tensor, in place, by its mean over the processes: gradients, or losses. None is passed over."""
    if world() == 1:
        return
    for tensor in tensors:
        if tensor is not None:
            dist.all_reduce(tensor)
            tensor /= world()


def sum_(tensors: Iterable[Tensor | None]) -> None:
    """Replace each tensor, in place, by its sum over the processes."""
    if world() > 1:
        for tensor in tensors:
            if tensor is not None:
                dist.all_reduce(tensor)


def same_(module: nn.Module) -> None:
    """Every parameter and buffer of `module` becomes that of process 0."""
    if world() > 1:
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                plain = tensor.detach().contiguous()
                dist.broadcast(plain, src=0)
                tensor.copy_(plain)


def agree_on_units(units: list[list[str]], repeated: set[str]) -> tuple[list[list[str]], set[str]]:
    """One order of layers for all: process 0's, then what only others saw, such as an expert their data reached."""
    if world() == 1:
        return units, repeated
    merged: list[list[str]] = []
    seen: set[str] = set()
    everywhere = from_all((units, repeated))
    for theirs, _ in everywhere:
        for unit in theirs:
            new = [name for name in unit if name not in seen]
            merged += [new] if new else []
            seen.update(new)
    return merged, set().union(*(twice for _, twice in everywhere))


class _Replayed(EMA):
    """An EMA that remembers what it folded: an average that moves depends on the order, so it is done over again."""

    def __init__(self, decay: float) -> None:
        super().__init__(decay)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def _fold(self, values: Tensor) -> None:
        self.seen.append((values.min().cpu(), values.max().cpu()))
        super()._fold(values)


def start_ranges(quantizers: Sequence[ActivationQuantizer]) -> None:
    """Before the first batch: averages that move are replaced by ones that can be merged."""
    if world() > 1:
        for quantizer in quantizers:
            if type(quantizer.observer) is EMA:
                quantizer.observer = _Replayed(quantizer.observer.decay)


def same_bins(quantizers: Sequence[ActivationQuantizer]) -> None:
    """Histograms start as wide as that of process 0, who calls this after its first batch, and the others before."""
    histograms = [q.observer for q in quantizers if isinstance(q.observer, Histogram)]
    if world() == 1 or not histograms:
        return
    for histogram, width in zip(histograms, from_rank([h.width for h in histograms])):
        histogram.width = histogram.width or width


def merge_ranges(quantizers: Sequence[ActivationQuantizer]) -> None:
    """After the last batch: every process's observers become what one would have seen alone.

    A histogram that started by itself (process 0's first batch did not reach the layer) is moved to the common bins
    by the middles of its own.
    """
    if world() == 1 or not quantizers:
        return
    everywhere = from_all([q.observer for q in quantizers])
    for quantizer, *observers in zip(quantizers, *everywhere):
        if quantizer.observer is not None:
            quantizer.observer = _merged([o for o in observers if o is not None])


def _merged(observers: list[Observer]) -> Observer:
    result = observers[0]
    if isinstance(result, _Replayed):
        decay, result = result.decay, EMA(result.decay)
        turns = max(len(o.seen) for o in observers)  # type: ignore[attr-defined]
        ordered = [o.seen[i] for i in range(turns) for o in observers if i < len(o.seen)]  # type: ignore[attr-defined]
        for low, high in ordered:
            result.low = low if result.low is None else torch.lerp(low, result.low, decay)
            result.high = high if result.high is None else torch.lerp(high, result.high, decay)
    if isinstance(result, MinMax | Histogram):
        result.low = torch.stack([o.low for o in observers]).min()  # type: ignore[attr-defined]
        result.high = torch.stack([o.high for o in observers]).max()  # type: ignore[attr-defined]
    if isinstance(result, Histogram):
        width = max(o.width for o in observers)  # type: ignore[attr-defined]
        result.counts = torch.stack([_rebinned(o, width) for o in observers]).sum(0)  # type: ignore[arg-type]
        result.width = width
    result.batches, result.rejected = (sum(getattr(o, key) for o in observers) for key in ("batches", "rejected"))
    return result


def _rebinned(histogram: Histogram, width: float) -> Tensor:
    """Counts [num_bins] over -width..width, of a histogram that is at most as wide."""
    counts, own, num_bins = histogram.counts, histogram.width, histogram.num_bins
    if own in (0.0, width):
        return counts
    while own * 2 <= width:  # as `Histogram` widens itself: exact
        half = counts.unflatten(0, (-1, 2)).sum(1)
        counts = torch.zeros_like(counts)
        counts[num_bins // 4 : num_bins // 4 * 3] = half
        own *= 2
    if own == width:
        return counts
    centers = (torch.arange(num_bins, dtype=torch.float64) + 0.5) * (2 * own / num_bins) - own
    place = ((centers + width) * (num_bins / (2 * width))).long().clamp(0, num_bins - 1)
    return torch.zeros_like(counts).index_add_(0, place, counts)
