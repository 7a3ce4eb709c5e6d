"""What rows of data look like from inside a float model: gathered by running each row once.

For every layer input in the blocks, a sum of squares a fold and channel, and a short sketch of each row; for a few of
the layers X^T X a fold as well; and each row's loss beside the loss that the model itself expected. Padding counts
nowhere. A fold is an eighth of the rows, drawn by document, so that any half of the folds shares no document with the
other half.

Axes: B rows of a batch, T tokens, N input features, K folds, F length of a sketch.
Source of the sketch: Charikar, Chen & Farach-Colton 2002, Finding frequent items in data streams, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantailor.data.encode import IGNORED
from quantailor.data.examples import Examples
from quantailor.errors import UntrustedInput, UsageError
from quantailor.evaluate.measuring import Progress, measuring
from quantailor.evaluate.rows import scored_rows
from quantailor.models.structure import blocks, modules_of

FOLDS = 8
SKETCH = 1024  # numbers kept of a row, over all layers together
MAX_BYTES = 2**30  # of X^T X, over all layers and folds
_FLOOR = 1e-6  # of a row's mean square: below it a channel is as good as zero, and a logarithm says nothing


@dataclass
class LayerInputs:
    """One layer's input. `weight` [O, N]; `squares` [K, N] sums of x^2 and `num_inputs` [K] a fold; `hessian`
    [K, N, N] or None; `sketch` [num_rows, F] of the logarithms of each row's mean squares: the squared distance of two
    sketches estimates the mean over channels of the squared difference of those logarithms.
    """

    name: str
    weight: Tensor
    squares: Tensor
    num_inputs: Tensor
    hessian: Tensor | None
    sketch: Tensor


@dataclass
class Gathered:
    """Rows of `examples` after the model. `nats`, `expected_nats`, `num_scored` float64 [num_rows]: summed loss, the
    loss that the model expected (the entropy of its predictions), and of how many tokens (or labels) they are.
    `clusters` int64 [num_rows]: rows of one number may resemble each other; `folds` int64 [num_rows].
    `sums`, `counts` float64 [num_units]: the task's metric, by unit, over these rows.
    """

    examples: Examples
    rows: NDArray[np.int64]
    folds: NDArray[np.int64]
    clusters: NDArray[np.int64]
    nats: NDArray[np.float64]
    expected_nats: NDArray[np.float64]
    num_scored: NDArray[np.float64]
    sums: NDArray[np.float64]
    counts: NDArray[np.float64]
    unit: str
    num_tokens: int = 0
    layers: dict[str, LayerInputs] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def num_folds(self) -> int:
        """How many folds have rows: an even number, 0 where there are too few documents for two."""
        return int(self.folds.max()) + 1 if len(self.folds) and self.folds.max() > 0 else 0


def gather(
    model: nn.Module,
    examples: Examples,
    rows: Sequence[int],
    *,
    max_hessians: int = 4,
    more_rows: Sequence[int] = (),
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> Gathered:
    """Run `rows` of `examples` through the float `model`, once each; `more_rows` only for the metric.

    `max_hessians`: of how many layers X^T X is kept, evenly spread over the model and as far as `MAX_BYTES` allows.
    Raises: UsageError if the model has no Linear layer to look at; UntrustedInput where a row has no finite loss.
    """
    units, num_units, unit = _units(examples)
    clusters = np.array([_cluster(units[row]) for row in rows], dtype=np.int64)
    folds = fold_numbers(clusters, seed)
    order = np.argsort(folds, kind="stable")  # rows of a fold together: few products a batch
    found = Gathered(
        examples=examples,
        rows=np.asarray(rows, dtype=np.int64)[order],
        folds=folds[order],
        clusters=clusters[order],
        nats=np.zeros(len(order)),
        expected_nats=np.zeros(len(order)),
        num_scored=np.zeros(len(order)),
        sums=np.zeros(num_units),
        counts=np.zeros(num_units),
        unit=unit,
    )
    watched, num_rows = found.rows.tolist(), len(rows) + len(more_rows)
    with measuring(model) as device:
        watch = _Watch(model, examples, found, device, max_hessians, seed)
        for todo, on in ((watched, watch), (list(more_rows), None)):
            for start in range(0, len(todo), batch_size):
                _run(model, found, units, todo[start : start + batch_size], start, device, on)
                if progress is not None:
                    progress(min(start + batch_size, len(todo)) + (0 if on else len(watched)), num_rows)
        watch.check()
    return found


def fold_numbers(clusters: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The fold of each row, from 0: clusters whole, drawn at random, each to the fold with the fewest rows so far.

    An even number of folds, at most `FOLDS` and no more than clusters; all 0 where there is one cluster alone.
    """
    names, members = np.unique(clusters, return_inverse=True)
    num_folds = min(FOLDS, len(names)) // 2 * 2
    fold_of = np.zeros(len(names), dtype=np.int64)
    if num_folds:
        sizes = np.zeros(num_folds)
        for cluster in np.random.default_rng(seed).permutation(len(names)):
            fold_of[cluster] = int(sizes.argmin())
            sizes[fold_of[cluster]] += (members == cluster).sum()
    return fold_of[members]


def _units(examples: Examples) -> tuple[Sequence[Tensor | int], int, str]:
    if examples.task == "lm":
        rows = scored_rows(examples)
        return rows.units, rows.num_units, rows.unit
    return range(len(examples)), len(examples), "record"


def _cluster(units: Tensor | int) -> int:
    """The document that a window belongs to: the one in its middle. A record is its own."""
    return int(units[len(units) // 2]) if isinstance(units, Tensor) else units


def _run(
    model: nn.Module,
    found: Gathered,
    units: Sequence[Tensor | int],
    rows: list[int],
    start: int,
    device: torch.device,
    watch: _Watch | None,
) -> None:
    """One batch: its losses into `found`, its layers' inputs into `watch`."""
    batch = {k: v.to(device) for k, v in found.examples.collator([found.examples.dataset[i] for i in rows]).items()}
    labels = batch.pop("labels")
    if watch is not None:
        with watch.on(batch["attention_mask"], start):
            logits = model(**batch).logits
        found.num_tokens += int(batch["attention_mask"].sum())
    else:
        logits = model(**batch).logits
    if found.examples.task == "classification" and int(labels.max()) >= logits.shape[-1]:
        raise UsageError(
            f"the model has {logits.shape[-1]} classes, {found.examples.source} has {found.examples.num_labels}; "
            "train its head for these"
        )
    for index, row in enumerate(rows):
        if found.examples.task == "lm":
            kept = labels[index, 1:] != IGNORED
            log_probs, targets = logits[index, :-1][kept].float().log_softmax(-1), labels[index, 1:][kept]
            unit = torch.as_tensor(units[row]).expand(labels.shape[1])[1:][kept.cpu()].numpy()
        else:
            log_probs, targets = logits[index : index + 1].float().log_softmax(-1), labels[index : index + 1]
            unit = np.array([row])
        nats = -log_probs.gather(1, targets[:, None]).squeeze(1).double().cpu().numpy()
        if not np.isfinite(nats).all():
            raise UntrustedInput(
                f"{found.examples.source}: the float model gives row {row + 1} no finite loss; check it on this data"
            )
        right = (log_probs.argmax(-1) == targets).double().cpu().numpy()
        np.add.at(found.sums, unit, nats if found.examples.task == "lm" else right)
        np.add.at(found.counts, unit, np.ones(len(nats)))
        if watch is not None:
            found.nats[start + index] = nats.sum()
            found.expected_nats[start + index] = float(-(log_probs.exp() * log_probs).sum().double())
            found.num_scored[start + index] = len(nats)


class _Watch:
    """Hooks on the layers' inputs."""

    def __init__(
        self, model: nn.Module, examples: Examples, found: Gathered, device: torch.device, max_hessians: int, seed: int
    ) -> None:
        self.found = found
        row = examples.collator([examples.dataset[int(found.rows[0])]])
        inputs, num_others = _distinct_inputs(model, {k: v.to(device) for k, v in row.items() if k != "labels"})
        if not inputs:
            raise UsageError(f"{type(model).__name__} has no Linear layer whose input is a row of tokens to look at")
        if num_others:
            found.notes.append(f"{num_others} layers do not see a row for each token (experts, pooling): not looked at")
        num_folds = max(1, found.num_folds)
        kept = _with_hessian({name: module for name, (module, _) in inputs.items()}, max_hessians, num_folds)
        if left_out := max(0, min(max_hessians, len(inputs)) - len(kept)):
            found.notes.append(f"{left_out} layers too wide to try a solver on: {num_folds} X^T X of it are too large")
        length = max(4, SKETCH // len(inputs))
        rng = np.random.default_rng(seed)
        self.modules: dict[str, nn.Module] = {}
        self.maps: dict[str, tuple[Tensor, Tensor]] = {}
        for name, (module, width) in inputs.items():
            self.modules[name] = module
            size = min(length, width)
            # where the sketch is as long as the row it is the row itself
            places = np.arange(width) if size == width else rng.integers(size, size=width)
            signs = rng.choice([-1.0, 1.0], size=width) / width**0.5
            self.maps[name] = (torch.as_tensor(places, device=device), torch.as_tensor(signs, device=device))
            found.layers[name] = LayerInputs(
                name,
                weight_of(module),
                torch.zeros(num_folds, width, dtype=torch.float64, device=device),
                torch.zeros(num_folds, dtype=torch.float64, device=device),
                torch.zeros(num_folds, width, width, device=device) if name in kept else None,
                torch.zeros(len(found.rows), size, dtype=torch.float64, device=device),
            )

    @contextmanager
    def on(self, mask: Tensor, start: int) -> Iterator[None]:
        """While this is open, the model runs rows `start` and following, of which `mask` [B, T] says what counts."""
        folds = self.found.folds[start : start + len(mask)]

        def hook_for(name: str) -> Any:
            return lambda _module, args: self._add(name, args[0], mask, start, folds)

        handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, x_BTN: Tensor, mask: Tensor, start: int, folds: NDArray[np.int64]) -> None:
        layer = self.found.layers[name]
        x = x_BTN.float()
        counted = mask.to(x.dtype)
        squares = torch.einsum("btn,bt->bn", x.square(), counted).double()
        lengths = counted.sum(1).double()
        where = torch.as_tensor(folds, device=x.device)
        layer.squares.index_add_(0, where, squares)
        layer.num_inputs.index_add_(0, where, lengths)
        mean = squares / lengths[:, None]
        logs = (mean + _FLOOR * mean.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny).log()
        places, signs = self.maps[name]
        layer.sketch[start : start + len(x)] = 0.0  # a layer that runs twice in a pass is told by its last run
        layer.sketch[start : start + len(x)].index_add_(1, places, logs * signs)
        if layer.hessian is not None:
            for fold in np.unique(folds):
                rows = x[where == int(fold)][mask[where == int(fold)].bool()]
                layer.hessian[int(fold)].addmm_(rows.t(), rows)

    def check(self) -> None:
        """Raises: UntrustedInput where a layer's input was not finite."""
        for layer in self.found.layers.values():
            if not bool(torch.isfinite(layer.squares).all()):
                raise UntrustedInput(f"{layer.name}: its input is not finite on {self.found.examples.source}")


def weight_of(module: nn.Module) -> Tensor:
    """The weight as rows of outputs [O, N]; transformers' Conv1D stores it the other way round."""
    weight: Any = module.weight
    return weight.detach().t() if isinstance(module, Conv1D) else weight.detach()


def _distinct_inputs(model: nn.Module, batch: dict[str, Tensor]) -> tuple[dict[str, tuple[nn.Module, int]], int]:
    """Layers in the blocks in the order they run, one for each tensor that goes in, with its width.

    Only those whose input has a row for each token; how many others there are (experts, layers behind pooling).
    """
    candidates = {
        f"{prefix}.{name}" if prefix else name: module
        for prefix, block in blocks(model)
        for name, module in modules_of(block, (nn.Linear, Conv1D))
    }
    found: dict[str, tuple[nn.Module, int]] = {}
    others: set[str] = set()
    last: list[Tensor] = []

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if x.shape[:-1] != batch["attention_mask"].shape:
                others.add(name)
            elif not last or x is not last[-1]:
                last[:] = [x]
                found.setdefault(name, (module, x.shape[-1]))

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in candidates.items()]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found, len(others)


def _with_hessian(modules: dict[str, nn.Module], count: int, num_folds: int) -> set[str]:
    """`count` names evenly spread over the model, as far as their X^T X have room."""
    names = list(modules)
    chosen = sorted({round(i) for i in np.linspace(0, len(names) - 1, min(count, len(names)))}) if count else []
    room = MAX_BYTES
    kept = set()
    for index in chosen:
        size = 4 * num_folds * weight_of(modules[names[index]]).shape[1] ** 2
        if size <= room:
            room -= size
            kept.add(names[index])
    return kept
