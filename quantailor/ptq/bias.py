"""Bias correction: take back the shift that quantization leaves in the mean of each layer's output.

    b <- b + E[y_float] - E[y_quantized]

layer by layer in the order they run, the quantized side computed with the layers before already corrected. What moves
the mean is not this layer's weight alone but everything before it, quantized activations and clipping included.
Only a bias that is there is moved: to add one would change the architecture that is stored.

Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2 and the empirical form of its appendix D; means are over the
calibration rows that count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.observers.ranges import rows_that_count
from quantailor.ptq.method import Masks, Report, Runs

_KEY = "bias_correction"


@dataclass(frozen=True)
class BiasCorrection:
    needs_hessian: bool = False
    needs_float_path: bool = True

    @torch.no_grad()
    def finish(
        self, block: nn.Module, twin: nn.Module, layers: Mapping[str, Any], runs: Runs, float_runs: Runs, masks: Masks
    ) -> dict[str, Report]:
        """Move the biases of a block's `layers` in place; `twin` is the block in the float model.

        Reports the largest shift taken back, as a share of the root mean square of the float output, or why none was.
        """
        inside = {id(module): name for name, module in block.named_modules()}
        twins = {name: twin.get_submodule(inside[id(module)]) for name, module in layers.items()}
        targets, order = _means(twins, float_runs, masks)
        reports: dict[str, Report] = {}
        for unit in order:
            movable = {name: layers[name] for name in unit if layers[name].bias is not None}
            found = _means(movable, runs, masks)[0] if movable else {}
            for name in unit:
                reports[name] = {_KEY: _correct(layers[name], targets[name], found.get(name))}
        for name in layers:
            reports.setdefault(name, {_KEY: "left: no calibration data reached the layer"})
        return reports


def _correct(module: Any, target: _Mean, found: _Mean | None) -> float | str:
    if module.bias is None:
        return "left: the layer has no bias, and one more would change the stored architecture"
    if found is None or found.rows != target.rows:
        return "left: other rows reached the layer than in the float model"
    shift = target.sum / target.rows - found.sum / found.rows
    if not bool(torch.isfinite(shift).all()):
        return "left: its output is not finite on the calibration data"
    module.bias.add_(shift.to(module.bias.dtype))
    size = (target.square / (target.rows * len(shift))) ** 0.5
    return float(shift.abs().max()) / size if size else 0.0


@dataclass
class _Mean:
    """Sums over rows of an output [T, O]: by channel, and of all squares."""

    sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    square: float = 0.0
    rows: int = 0

    def add(self, y_TO: Tensor) -> None:
        y = y_TO.double()
        self.sum, self.square, self.rows = (
            self.sum + y.sum(0),
            self.square + float(y.square().sum()),
            self.rows + len(y),
        )


def _means(modules: Mapping[str, nn.Module], runs: Runs, masks: Masks) -> tuple[dict[str, _Mean], list[list[str]]]:
    """(the means of their outputs, their names in running order, those called with the very same tensor together)."""
    means: dict[str, _Mean] = {}
    order: list[list[str]] = []
    last: Any = None
    mask: Tensor | None = None

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            nonlocal last
            if name not in means:
                means[name] = _Mean()
                if order and args[0] is last:
                    order[-1].append(name)
                else:
                    order.append([name])
                last = args[0]
            by_channel = isinstance(module, nn.Conv2d)
            means[name].add(rows_that_count(y.movedim(1, -1) if by_channel else y, None if by_channel else mask))

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    try:
        for run, mask in zip(runs, masks):  # noqa: B007 (the hooks read it)
            run()
    finally:
        for handle in handles:
            handle.remove()
    return means, order
