"""The flight recorder of a training run: looks at every layer each so many steps, and tells what it found.

Weights are looked at in a few rows each (sampled.py); inputs of layers and outputs of norms by hooks that hang there
only during a step that is recorded. Nothing is drawn at random and nothing of the model is changed, so weights are
those of a run that is not recorded.

    range        largest magnitude that entered the layer in this step
    input_clip   share of inputs beyond a static input scale's outermost level, in at most 64 tokens a call
    input_drift  log of a static input scale over what it was at the start
    gain         of a norm: root mean square of its weight;   output: largest magnitude that left it
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantailor.models.prepare import FAKE_QUANT
from quantailor.models.roles import is_norm
from quantailor.models.structure import modules_of
from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.qat.sampled import MEASURES, Sampled
from quantailor.spec import Int

LAYER_MEASURES = (*MEASURES, "range", "input_clip", "input_drift")
NORM_MEASURES = ("gain", "output")
_TOKENS = 64  # of an input that are held against a static scale, a call

Table = dict[str, list[float | None]]  # measure -> one number a layer; None where it has none


class Recorder:
    """`begin` before a step that is to be recorded, `end` after it. Layers: those with a grid; where none has one,
    linear layers, so that a float run can be held beside a quantized one."""

    def __init__(self, model: nn.Module) -> None:
        found = dict(modules_of(model, FAKE_QUANT)) or dict(modules_of(model, nn.Linear))
        self.layers: dict[str, Sampled] = {name: Sampled(layer) for name, layer in found.items()}
        self.norms: dict[str, Any] = {name: m for name, m in model.named_modules() if name and is_norm(m)}
        self._start = {name: _input_scale(s.layer) for name, s in self.layers.items()}
        self._seen: dict[tuple[str, str], Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._last: tuple[Tensor, Tensor] | None = None  # the input looked at last, and its range: q, k, v share one

    # ------------------------------------------------------------------------------------------------ a step

    def begin(self) -> None:
        """Before the forward pass."""
        self.forget()
        for sampled in self.layers.values():
            sampled.begin()
        for name, sampled in self.layers.items():
            if not isinstance(sampled.layer, nn.Embedding):  # which is given numbers of tokens
                self._handles.append(sampled.layer.register_forward_pre_hook(self._on_layer(name)))
        for name, norm in self.norms.items():
            self._handles.append(norm.register_forward_hook(self._on_norm(name)))

    def end(self) -> tuple[Table, Table]:
        """After the optimizer's step: (of layers, of norms), in the order of `layers` and `norms`."""
        rows = []
        for name, sampled in self.layers.items():
            row = sampled.end()
            row |= {m: self._seen[m, name] for m in ("range", "input_clip") if (m, name) in self._seen}
            scale, start = _input_scale(sampled.layer), self._start[name]
            if scale is not None and start is not None:
                row["input_drift"] = scale - start
            rows.append(row)
        norms = []
        for name, norm in self.norms.items():
            weight = norm.weight.detach().float()
            row = {"gain": torch.linalg.vector_norm(weight) / weight.numel() ** 0.5}
            norms.append(row | ({"output": self._seen["output", name]} if ("output", name) in self._seen else {}))
        self.forget()
        return _table(rows, LAYER_MEASURES), _table(norms, NORM_MEASURES)

    def forget(self) -> None:
        """Take the hooks away, and what they saw."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen, self._last = [], {}, None

    def levels(self) -> list[list[float] | None]:
        """Of each layer the distribution of its weights over the grid; None without one."""
        found = [sampled.levels() for sampled in self.layers.values()]
        return [None if shares is None else [round(v, 4) for v in shares.tolist()] for shares in found]

    # ------------------------------------------------------------------------------------------------ checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        kept: dict[str, Tensor] = {}
        for name, sampled in self.layers.items():
            if sampled.last is not None and sampled.direction is not None:
                kept |= {f"{name}.last": sampled.last, f"{name}.direction": sampled.direction}
        return kept

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The other way."""
        for name, sampled in self.layers.items():
            if sampled.last is not None:
                device = sampled.last.device
                sampled.last = tensors[f"{name}.last"].to(device)
                sampled.direction = tensors[f"{name}.direction"].to(device)

    # ------------------------------------------------------------------------------------------------ what hooks do

    def _on_layer(self, name: str) -> Any:
        quantizer = _static(self.layers[name].layer)

        @torch.no_grad()
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0].detach()
            if self._last is None or self._last[0] is not args[0]:
                self._last = (args[0], _magnitude(x))
            self._keep("range", name, self._last[1])
            if quantizer is not None and isinstance(quantizer.spec.grid, Int):
                tokens = x.flatten(0, -2)[:: max(1, x[..., 0].numel() // _TOKENS)]
                limit = quantizer.scale * (quantizer.spec.grid.qmax + 0.5)
                self._keep("input_clip", name, (tokens.abs() > limit).float().mean())

        return hook

    def _on_norm(self, name: str) -> Any:
        @torch.no_grad()
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                self._keep("output", name, _magnitude(output.detach()))

        return hook

    def _keep(self, measure: str, name: str, value: Tensor) -> None:
        """The largest of the step's calls."""
        before = self._seen.get((measure, name))
        self._seen[measure, name] = value if before is None else torch.maximum(before, value)


def _magnitude(x: Tensor) -> Tensor:
    """max |x|, without a copy of x."""
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high).float()


def _static(layer: Any) -> ActivationQuantizer | None:
    quantizer = getattr(layer, "input_quantizer", None)
    return quantizer if isinstance(quantizer, ActivationQuantizer) and not quantizer.spec.dynamic else None


def _input_scale(layer: Any) -> Tensor | None:
    """log of the static input scale."""
    quantizer = _static(layer)
    return None if quantizer is None else quantizer.log_scale.detach().reshape(()).clone()


def _table(rows: list[dict[str, Tensor]], measures: tuple[str, ...]) -> Table:
    """Columns of numbers, brought over from the device at once. A measure that no layer has is left out."""
    values = [value for row in rows for value in row.values()]
    if not values:
        return {}
    numbers = iter(torch.stack([v.float() for v in values]).tolist())
    told = [{name: next(numbers) for name in row} for row in rows]
    return {m: [row.get(m) for row in told] for m in measures if any(m in row for row in told)}
