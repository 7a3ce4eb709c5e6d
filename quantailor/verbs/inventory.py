"""`inventory`: every tensor of a model that a recipe quantizes or could, counted a block, each with its reason."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from quantailor.errors import UsageError
from quantailor.models.loading import task_of
from quantailor.models.points import find_points
from quantailor.models.structure import blocks
from quantailor.points import NAMES
from quantailor.recipe import Entry, Inventory, Rule
from quantailor.spec import Scheme
from quantailor.store.untrusted import scan_model_folder
from quantailor.verbs.model import Model, as_model, load
from quantailor.verbs.quantizing import PointsLike, recipe_for

_KINDS = ("weight", "input", "output", "scores", "kv", "norm", "gelu", "residual", "embedding", "probabilities")
_WORDS = {
    "weight": ("weight", "weights"),
    "input": ("linear input", "linear inputs"),
    "output": ("linear output", "linear outputs"),
    "scores": ("score", "scores"),
    "kv": ("cached tensor", "cached tensors"),
    "norm": ("norm", "norms"),
    "gelu": ("nonlinearity", "nonlinearities"),
    "residual": ("residual add", "residual adds"),
    "embedding": ("embedding output", "embedding outputs"),
    "probabilities": ("probability", "probabilities"),
}


@dataclass(frozen=True)
class Line:
    """One tensor. `point`: weight, input, one of points.NAMES, or probabilities; `spec` None: kept, for the reason."""

    name: str
    point: str
    kind: str
    block: int | None
    spec: str | None
    reason: str


@dataclass(frozen=True)
class InventoryReport:
    """All lines of a model under a scheme and points, in the order of its blocks."""

    scheme: str
    points: str
    block_types: tuple[str, ...]
    lines: tuple[Line, ...]

    def counts(self, block: int | None) -> dict[str, int]:
        """How many tensors of each kind are quantized in one block (None: outside of them)."""
        found = Counter(line.point for line in self.lines if line.block == block and line.spec is not None)
        return {point: found[point] for point in _KINDS}

    def to_json(self) -> dict[str, Any]:
        return {
            "scheme": self.scheme,
            "points": self.points,
            "num_blocks": len(self.block_types),
            "blocks": [
                {"blocks": list(alike), "type": self.block_types[alike[0]], "quantized": self.counts(alike[0])}
                for alike in self._alike()
            ],
            "outside": self.counts(None),
            "lines": [dataclasses.asdict(line) for line in self.lines],
        }

    def __str__(self) -> str:
        found = [f"scheme {self.scheme}" + (f", points {self.points}" if self.points else "")]
        for alike in self._alike():
            same = f", and alike in {len(alike) - 1} more" if len(alike) > 1 else ""
            found += ["", f"block {alike[0]} ({self.block_types[alike[0]]}){same}"]
            found += self._paragraph(alike[0])
        found += ["", "outside the blocks" if self.block_types else "the whole model", *self._paragraph(None)]
        return "\n".join(found)

    def _paragraph(self, block: int | None) -> Iterator[str]:
        groups: dict[tuple[str, str, str | None, str], int] = {}
        for line in self.lines:
            if line.block == block:
                key = (line.point, line.kind, line.spec, "" if line.spec else line.reason)
                groups[key] = groups.get(key, 0) + 1
        for (point, kind, spec, reason), n in sorted(groups.items(), key=lambda item: _KINDS.index(item[0][0])):
            words = _WORDS[point][n != 1]
            if point == "gelu":  # by its own name
                words = kind.removesuffix("Activation") + ("s" if n > 1 else "")
            yield f"{n:>5} {words:<18} {kind:<16} {spec or 'float':<16} {reason}".rstrip()

    def _alike(self) -> list[list[int]]:
        """Numbers of blocks, those with the same lines together."""
        groups: dict[Any, list[int]] = {}
        for number, kind in enumerate(self.block_types):
            lines = [(x.point, x.kind, x.spec, x.reason) for x in self.lines if x.block == number]
            groups.setdefault((kind, tuple(lines)), []).append(number)
        return list(groups.values())


def inventory(
    model: str | Path | Model,
    scheme: str | Scheme | None = None,
    *,
    points: PointsLike = None,
    rules: Sequence[Rule] = (),
    ragged: bool = True,
) -> InventoryReport:
    """Every tensor that `scheme` and `points` quantize or could, with the reason where one is kept; nothing is changed.

    Of a quantized model (`scheme` and `points` left out) what was done to it.
    Raises: UsageError, UntrustedInput as the parts do.
    """
    source = _loaded(model)
    if source.state is not None:
        if scheme is not None or points or rules:
            raise UsageError(f"the model is quantized already ({source.state.scheme}); leave scheme and points out")
        return _report(source.model, str(source.state.scheme), source.state.inventory)
    if scheme is None:
        raise UsageError("the model is float: name the scheme that it would be quantized to, such as w8a8")
    recipe = recipe_for(scheme, rules, ragged=ragged, points=points)
    found = recipe.assign(source.model)
    entries = find_points(source.model, recipe.points, found.entries)
    return _report(source.model, str(recipe.scheme), Inventory(found.entries, entries))


def _loaded(model: str | Path | Model) -> Model:
    """A bare encoder gets a head to be looked at with."""
    if isinstance(model, str | Path) and (Path(model) / "config.json").exists():
        config = scan_model_folder(Path(model)).config
        if task_of(config) is None and config.get("model_type") != "quantailor":
            return load(model, task="classification", num_labels=2)
    return as_model(model)


def _report(model: nn.Module, scheme: str, found: Inventory) -> InventoryReport:
    named = [(name, block) for name, block in blocks(model) if name]
    asked = {e.point: str(e.spec) for e in found.points if e.spec is not None}
    lines = [line for entry in found for line in _of_layer(entry, _block_of(entry.name, named))]
    lines += [
        Line(e.name, e.point, e.kind, e.block, None if e.spec is None else str(e.spec), e.reason) for e in found.points
    ]
    place = {id(line): i for i, line in enumerate(lines)}
    lines.sort(
        key=lambda x: (len(named) if x.block is None else x.block, _KINDS.index(x.point), place[id(x)]),
    )
    text = " ".join(f"{name}={asked[name]}" for name in NAMES if name in asked)
    return InventoryReport(scheme, text, tuple(type(block).__name__ for _, block in named), tuple(lines))


def _block_of(name: str, named: Sequence[tuple[str, nn.Module]]) -> int | None:
    return next((i for i, (block, _) in enumerate(named) if name.startswith(f"{block}.")), None)


def _of_layer(entry: Entry, block: int | None) -> Iterator[Line]:
    """A layer's weight, and its input where it multiplies one."""
    if entry.scheme is None or entry.scheme.weight is None:
        yield Line(f"{entry.name}.weight", "weight", entry.kind, block, None, entry.reason)
        return
    weight = str(Scheme(weight=entry.scheme.weight)).replace("a16", "", 1)
    yield Line(f"{entry.name}.weight", "weight", entry.kind, block, weight, entry.reason)
    if entry.kind == "Embedding":
        return
    given = entry.scheme.input
    text = None if given is None else str(Scheme(Scheme.parse("w8a16").weight, given)).removeprefix("w8")
    reason = entry.reason if given is not None else "the scheme leaves inputs in float (a16)"
    yield Line(f"{entry.name}.input", "input", entry.kind, block, text, reason)
