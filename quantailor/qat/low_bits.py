"""Training at 1 and 1.58 bits as its papers do it: BitNet b1.58, XNOR-Net, BinaryConnect; and quantization that comes
in by and by, so that a warm start does not jump.

    bitnet          ternary weights, gamma = mean |w| at each forward, straight-through       arXiv:2402.17764
    xnor            binary weights, alpha = mean |w| at each forward, XNOR-Net's gradient     arXiv:1603.05279
    binaryconnect   binary weights at fixed levels +-H, straight-through, and after each step the float weights are
                    clipped to [-H, H] (the paper's H = 1, in units of the layer)             arXiv:1511.00363
    blend           x + lambda * (Q(x) - x) for weights and inputs, lambda = min(step / (blend * steps), 1); 0.5 is
                    lambda = min(2 step / steps, 1)

The first three are stand-ins for a layer's `WeightQuantizer` (qat/quantizers.py) or act after a step. What is
evaluated and kept is always the quantized model itself, with lambda = 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from quantailor.models.prepare import FAKE_QUANT
from quantailor.models.structure import modules_of
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.numerics import low_bits
from quantailor.numerics.grouping import from_groups, to_groups
from quantailor.qat.settings import Settings
from quantailor.qat.twins import taking_over
from quantailor.spec import Binary, PerTensor, Ternary


class FollowsWeight(WeightQuantizer):
    """A grid whose scale is the mean magnitude of the weight as it is now. Subclasses say how a gradient passes.

    `of` also moves the original's grid there, so that the two agree while the weight stays; `settle` does it again.
    """

    own_gradient = True
    source: tuple[nn.Parameter]  # in a tuple: it stays the layer's parameter alone

    @classmethod
    def of(cls, original: WeightQuantizer, weight: nn.Parameter) -> FollowsWeight:
        new: FollowsWeight = taking_over(cls, original)
        new.source = (weight,)
        new.settle(original)
        return new

    def settle(self, original: WeightQuantizer) -> None:
        """Put the original's grid where this one is now."""
        original.set_scale(self.scale, torch.zeros_like(self.zero_point))

    @property
    def scale(self) -> Tensor:
        """[O, G, 1] of the weight as it is, without a gradient."""
        grid = self.spec.grid
        assert isinstance(grid, Ternary | Binary)
        return low_bits.magnitude_scale(self._groups(self.source[0].detach().flatten(1)), self._count(), grid)

    def forward(self, weight_ON: Tensor) -> Tensor:
        if not self.enabled:
            return weight_ON
        return self._on_grid(weight_ON, self.scale)

    def rows(self, weight_ON: Tensor, index: Tensor) -> Tensor:
        if not self.enabled:
            return weight_ON[index]
        flat, scale = index.flatten(), self.scale
        part = self._on_grid(weight_ON[flat], scale if scale.shape[0] == 1 else scale[flat])
        return part.unflatten(0, index.shape)

    def _on_grid(self, rows: Tensor, scale: Tensor) -> Tensor:
        w_hat = self._quantized(to_groups(rows.float(), self.spec.group_size), scale)
        return from_groups(w_hat, self.in_features).to(rows.dtype)

    def _quantized(self, w: Tensor, scale: Tensor) -> Tensor:
        raise NotImplementedError

    def _groups(self, weight_ON: Tensor) -> Tensor:
        """[O, G, g], or all as one group [1, 1, O * N] where one scale serves the tensor."""
        whole = isinstance(self.spec.granularity, PerTensor)
        return to_groups((weight_ON.reshape(1, -1) if whole else weight_ON).float(), self.spec.group_size)

    def _count(self) -> Tensor | int:
        """Elements that share a scale: a number, or [G, 1] where the last group is shorter."""
        if isinstance(self.spec.granularity, PerTensor):
            return self.in_features * self.out_features
        ones = torch.ones(1, self.in_features, device=self.source[0].device)
        return to_groups(ones, self.spec.group_size)[0].sum(-1, keepdim=True)


class BitNetWeight(FollowsWeight):
    """Ternary, absmean."""

    def _quantized(self, w: Tensor, scale: Tensor) -> Tensor:
        return low_bits.ternary(w, scale)


class XNORWeight(FollowsWeight):
    """Binary, mean magnitude."""

    def _quantized(self, w: Tensor, scale: Tensor) -> Tensor:
        return low_bits.xnor(w, scale, self._count())


# gradient -> (its stand-in, the grid it is for, how a scheme names that)
FOLLOWS: dict[str, tuple[type[FollowsWeight], type, str]] = {
    "bitnet": (BitNetWeight, Ternary, "w1.58a8"),
    "xnor": (XNORWeight, Binary, "w1a1"),
}


class Clip(TrainerCallback):
    """BinaryConnect, algorithm 1, step 3: float weights stay between their levels."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[Any] = [m for _, m in modules_of(model, FAKE_QUANT) if has_grid(m, Binary)]

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        for layer in self.layers:
            if layer.weight.requires_grad:
                self.clip_(layer)

    @staticmethod
    @torch.no_grad()
    def clip_(layer: Any) -> None:
        """In place. Shapes: a weight of any shape, seen as [O, N]."""
        quantizer, weight_ON = layer.weight_quantizer, layer.weight_ON
        level = quantizer.scale / 2
        w = to_groups(weight_ON.float(), quantizer.spec.group_size)
        weight_ON.copy_(from_groups(torch.minimum(torch.maximum(w, -level), level), quantizer.in_features))


class Blend(TrainerCallback):
    """Sets the layers' `share`, lambda, before each step; the step's number is all it depends on."""

    def __init__(self, model: nn.Module, blend: float) -> None:
        self.layers: list[Any] = [m for _, m in modules_of(model, FAKE_QUANT)]
        self.blend = blend

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.put(blended(state.global_step, state.max_steps, self.blend))

    def put(self, share: float) -> None:
        for layer in self.layers:
            layer.share = share


def blended(step: int, steps: int, blend: float) -> float:
    """lambda at a step, counted from 0: how far weights and inputs are on their way to the grid."""
    return 1.0 if blend == 0 else min(step / (blend * steps), 1.0)


def has_grid(layer: Any, kind: type) -> bool:
    """Whether a layer's weight is on a grid of this kind."""
    return layer.weight_quantizer is not None and isinstance(layer.weight_quantizer.spec.grid, kind)


@contextmanager
def acting(model: nn.Module, settings: Settings) -> Iterator[list[TrainerCallback]]:
    """What acts beside the Trainer's steps for these settings; afterwards every layer is wholly on its grid again."""
    found: list[TrainerCallback] = [Clip(model)] if settings.gradient == "binaryconnect" else []
    if not settings.blend:
        yield found
        return
    blend = Blend(model, settings.blend)
    try:
        yield [*found, blend]
    finally:
        blend.put(1.0)
