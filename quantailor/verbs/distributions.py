"""What a layer holds and what it is given: levels of its weight, float weights over them, activations on the probe."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.evaluate.measuring import measuring
from quantailor.nn.packed import QuantConv2d, QuantEmbedding, QuantLinear
from quantailor.numerics.grids import limits
from quantailor.pages.charts import bins_of
from quantailor.pages.document import Bins, Histogram, Mark, Text, say
from quantailor.spec import NF4

Packed = QuantLinear | QuantEmbedding | QuantConv2d
_MOST_LEVELS = 64  # more levels than this share bars
_FINE = 4  # float bins a level
_ACTIVATION_BINS = 61
_CHUNK = 2**22
_MOVES = ("smoothquant", "awq", "magr", "rotate", "quarot", "spinquant")  # rescale or move weights before rounding


def weight_histogram(name: str, layer: Packed, method: str = "", parent: Tensor | None = None) -> Histogram:
    """Shares of the grid's levels; over them the float `parent` [O, N] in steps of each weight's own group.

    A float weight beyond the drawn range counts in the outermost bin, as rounding clips it there.
    """
    store = layer.packed
    lowest, highest, offset = limits(store.spec.grid)
    counts = _level_counts(store.integers(), lowest, highest)
    step = -(-len(counts) // _MOST_LEVELS)
    counts += [0] * (-len(counts) % step)
    merged = [sum(counts[i : i + step]) for i in range(0, len(counts), step)]
    edges = [lowest - 0.5 + offset + i * step for i in range(len(merged) + 1)]
    bars = bins_of(merged, edges, say("series.integers"))
    title = say("chart.weights", layer=name)
    drawable = parent is not None and not isinstance(store.spec.grid, NF4)
    if not drawable:
        return Histogram(title, say("axis.levels"), bars, note=say("chart.levels_note"))
    assert parent is not None
    outline = _float_steps(parent, layer, edges, step)
    moved = [part for part in method.split("+") if any(part.startswith(m) for m in _MOVES)]
    note = say("chart.weights_moved", method=method) if moved else say("chart.weights_note")
    return Histogram(title, say("axis.steps"), bars, outline, note=note)


def activation_histogram(
    name: str, model: nn.Module, probe: Mapping[str, Tensor], parent: nn.Module | None = None
) -> Histogram | None:
    """What enters layer `name` on the probe, and in the float `parent`; None where no floats enter it."""
    layer = model.get_submodule(name)
    mine = _inputs(model, layer, probe)
    theirs = None if parent is None else _inputs(parent, parent.get_submodule(name), probe)
    if mine is None:
        return None
    both = [mine] if theirs is None else [mine, theirs]
    reach = max(float(x.abs().max()) for x in both) or 1.0
    edges = torch.linspace(-reach, reach, _ACTIVATION_BINS + 1)
    bars = _binned(mine, edges, say("series.activations"))
    outline = None if theirs is None else _binned(theirs, edges, say("series.activations_float"))
    tokens = probe["input_ids"].shape
    return Histogram(
        say("chart.activations", layer=name),
        say("axis.value"),
        bars,
        outline,
        log_y=True,
        marks=_clip_marks(layer, reach),
        note=say("chart.activations_note", rows=tokens[0], tokens=tokens[1]),
    )


def weight_ON(module: Any) -> Tensor | None:
    """A float layer's weight as [O, N], float32; None where it has none of that form."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return None
    weight = weight.detach().float()
    return weight.T if type(module).__name__ == "Conv1D" else weight.reshape(weight.shape[0], -1)


def fits(layer: Packed, parent: nn.Module) -> bool:
    """Whether `parent` is the float layer that `layer` was made of, by its shape."""
    weight = weight_ON(parent)
    return weight is not None and tuple(weight.shape) == (layer.packed.out_features, layer.packed.in_features)


def _level_counts(q_ON: Tensor, lowest: int, highest: int) -> list[float]:
    counts = torch.zeros(highest - lowest + 1, dtype=torch.int64)
    rows = max(1, _CHUNK // max(1, q_ON.shape[1]))
    for part in q_ON.split(rows):
        levels = (part.to(torch.int64) - lowest).clamp(0, len(counts) - 1)
        counts += torch.bincount(levels.flatten().cpu(), minlength=len(counts))
    return [float(c) for c in counts]


def _float_steps(parent_ON: Tensor, layer: Packed, edges: list[float], step: int) -> Bins:
    """The parent's weights over their group's scale, shifted by its zero point, in finer bins than the levels'."""
    store = layer.packed
    fine = _FINE if step == 1 else 1
    fine_edges = torch.linspace(edges[0], edges[-1], (len(edges) - 1) * fine + 1)
    counts = torch.zeros(len(fine_edges) - 1, dtype=torch.float64)
    scale_OG, zero_OG = store.scales().float(), store.zero_points()
    rows = max(1, _CHUNK // max(1, parent_ON.shape[1]))
    for start in range(0, parent_ON.shape[0], rows):
        part = parent_ON[start : start + rows].cpu()
        own = slice(start, start + rows) if scale_OG.shape[0] > 1 else slice(0, 1)
        x = part / store.of_elements(scale_OG[own]).cpu()
        if isinstance(zero_OG, Tensor):
            x = x + store.of_elements(zero_OG[own].float()).cpu()
        counts += torch.histc(x.clamp(edges[0], edges[-1]), len(counts), edges[0], edges[-1]).double()
    shares = (counts * fine).tolist()  # a share a level, so that it lies on the bars
    total = float(counts.sum()) or 1.0
    return Bins(say("series.float"), tuple(fine_edges.tolist()), tuple(s / total for s in shares))


@torch.no_grad()
def _inputs(model: nn.Module, layer: nn.Module, probe: Mapping[str, Tensor]) -> Tensor | None:
    """What entered `layer` while the model ran on the probe, as one row of floats."""
    seen: list[Tensor] = []
    with _watching(layer, seen), measuring(model) as device:
        model(**{name: value.to(device) for name, value in probe.items()})
    floats = [x.detach().float().flatten().cpu() for x in seen if x.is_floating_point()]
    return torch.cat(floats) if floats else None


@contextmanager
def _watching(layer: nn.Module, seen: list[Tensor]) -> Any:
    def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            seen.append(args[0])

    handle = layer.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _binned(x: Tensor, edges: Tensor, name: Text) -> Bins:
    counts = torch.histc(x[torch.isfinite(x)], len(edges) - 1, float(edges[0]), float(edges[-1]))
    return bins_of(counts.tolist(), edges.tolist(), name)


def _clip_marks(layer: Any, reach: float) -> tuple[Mark, ...]:
    """Where a static activation scale clips; a dynamic one clips nothing."""
    spec, scale = layer.scheme.input, getattr(layer, "input_scale", None)
    if spec is None or scale is None:
        return ()
    lowest, highest, _ = limits(spec.grid)
    ends = (float(scale) * lowest, float(scale) * highest)
    return tuple(Mark(end, say("mark.clip"), "bad") for end in ends if abs(end) <= 1.5 * reach)
