"""What happens to weights after the optimizer's step: the pull of CAGE, and the freezing of those that oscillate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from quantailor.models.prepare import FAKE_QUANT
from quantailor.models.structure import modules_of
from quantailor.numerics import cage
from quantailor.numerics.oscillation import Oscillation
from quantailor.qat.settings import Settings

_OFTEN = 0.005  # a frequency worth telling of


class Stabilizer(TrainerCallback):
    """Acts on every weight that trains and has a grid. Whole weights only: sharded ones are refused by `train`."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.settings = settings
        self.layers: dict[str, Any] = {}
        seen: set[int] = set()
        for name, layer in modules_of(model, FAKE_QUANT):
            trains = layer.weight.requires_grad and layer.weight_quantizer is not None
            if trains and id(layer.weight) not in seen:
                seen.add(id(layer.weight))
                self.layers[name] = layer
        self.tracked: dict[str, Oscillation] = {}
        if settings.freeze_oscillating is not None:
            for name, layer in self.layers.items():
                self.tracked[name] = Oscillation.start(layer.weight_quantizer.integers(layer.weight_ON))

    @torch.no_grad()
    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        if self.settings.cage:
            pull = cage.strength(self.settings.cage, state.global_step, state.max_steps)
            rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            for layer in self.layers.values():
                cage.pull_(layer.weight, layer.fake_weight(), rate[id(layer.weight)] * pull)
        for name, tracked in self.tracked.items():
            layer = self.layers[name]
            assert self.settings.freeze_oscillating is not None
            tracked.update(layer.weight_quantizer.integers(layer.weight_ON), self.settings.freeze_oscillating)
            if tracked.frozen.any():
                on_grid = layer.weight_quantizer.dequantize(tracked.target.to(torch.int8))
                weight_ON = layer.weight_ON
                weight_ON.copy_(torch.where(tracked.frozen, on_grid.to(weight_ON.dtype), weight_ON))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {f"{name}.{field}": t for name, o in self.tracked.items() for field, t in o.tensors().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The other way."""
        for name, tracked in self.tracked.items():
            for field, now in tracked.tensors().items():
                setattr(tracked, field, tensors[f"{name}.{field}"].to(now.device))

    def notes(self) -> list[str]:
        """How many weights oscillate and how many were frozen."""
        if not self.tracked:
            return []
        total = sum(o.last.numel() for o in self.tracked.values())
        often = sum(int((o.frequency > _OFTEN).sum()) for o in self.tracked.values())
        frozen = sum(int(o.frozen.sum()) for o in self.tracked.values())
        return [
            f"{often / total:.2%} of the weights oscillate between integers (frequency above {_OFTEN}); "
            f"{frozen / total:.2%} were frozen"
        ]
