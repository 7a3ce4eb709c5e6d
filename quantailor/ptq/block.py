"""What learns the integers of a block's layers together: the parts that AutoRound and Block-AP share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.nn.fake_quant import set_rounded
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.numerics import grids
from quantailor.numerics.grouping import from_groups, to_groups
from quantailor.ptq import distributed
from quantailor.ptq.method import Masks, Method, Report, Runs, Solution
from quantailor.ptq.qronos import Qronos
from quantailor.ptq.statistics import Statistics
from quantailor.spec import NF4, QuantSpec


@dataclass(frozen=True)
class BlockDescent:
    """Solves each layer by `start`, then moves integers and scales of a block's layers to lower the block's error.

    `steps` of descent, each on one batch of calibration rows; `looks`: how often the loss over all of them is taken.
    The best iterate is kept, the start included: on that data a block never ends worse than it began.
    `half`: products of a step in bfloat16 (None: where the hardware has them and no layer has more than 4 bits, whose
    own error is far larger than a product's rounding); losses that choose an iterate are always taken in float32.
    """

    name = "block descent"
    steps: int = 200
    looks: int = 4
    seed: int = 0
    half: bool | None = None
    start: Method = field(default_factory=Qronos)
    needs_hessian: bool = True
    needs_float_path: bool = True

    def solve(self, weight_ON: Tensor, statistics: Statistics | None, spec: QuantSpec) -> Solution:
        """The layer's start; `refine` then moves all of a block's layers together."""
        return self.start.solve(weight_ON, statistics, spec)

    def num_steps(self, rounding: list[Rounding]) -> int:
        """How many steps these layers get."""
        return self.steps

    def stepper(self, rounding: list[Rounding], steps: int) -> Callable[[int], None]:
        """What takes step 1 .. `steps`, once each parameter has its gradient."""
        raise NotImplementedError

    def refine(
        self, block: nn.Module, layers: dict[str, Any], runs: Runs, targets: Sequence[Tensor], masks: Masks
    ) -> dict[str, Report]:
        """Move the integers and scales of a block's fake-quantized `layers`, in place. Returns a report a layer.

        `runs[i]()` is the block's output on batch i of the quantized prefix, `targets[i]` the float model's;
        `masks[i]` [B, T] says which rows count.
        """
        movable = {n: m for n, m in layers.items() if not isinstance(m.weight_quantizer.spec.grid, NF4)}
        left = {n: {self.name: "left as it was: NF4 has no steps to round between"} for n in layers if n not in movable}
        if not movable:
            return left
        frozen = [(p, p.requires_grad) for p in block.parameters()]
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        before = {n: m.weight_quantizer for n, m in movable.items()}
        rounding = {n: Rounding(m) for n, m in movable.items()}
        for name, module in movable.items():
            module.weight_quantizer = rounding[name]
        try:
            start, best, step = self._descend(list(rounding.values()), runs, targets, masks)
        finally:
            for name, module in movable.items():
                module.weight_quantizer = before[name]
            for parameter, needed in frozen:
                parameter.requires_grad_(needed)
        for name, module in movable.items():
            if step:
                q, scale = rounding[name].result()
                module.weight_quantizer.set_scale(scale, module.weight_quantizer.zero_point)
                set_rounded(module, q)
        report = {"method": self.name, "block_loss": [start, best], "best_step": step}
        return left | {name: dict(report) for name in movable}

    def _descend(
        self, rounding: list[Rounding], runs: Runs, targets: Sequence[Tensor], masks: Masks
    ) -> tuple[float, float, int]:
        """(loss at the start, the best, its step); `rounding` ends at the best."""
        generator = torch.Generator().manual_seed(self.seed)
        start = best = total_loss(runs, targets, masks)
        best_step, kept = 0, [r.copy() for r in rounding]
        steps = self.num_steps(rounding)
        every = max(1, steps // self.looks)
        parameters = [p for r in rounding for p in (r.v, r.alpha)]
        take_step, half = self.stepper(rounding, steps), self._in_half(rounding)
        order: list[int] = []  # every batch once, then every batch again in another order
        for step in range(1, steps + 1):
            order = order or torch.randperm(len(runs), generator=generator).tolist()
            i = order.pop()
            with torch.enable_grad():
                with torch.autocast(rounding[0].w.device.type, torch.bfloat16, enabled=half):
                    output = runs[i]()
                loss = block_loss(output, targets[i], masks[i])
                # Zeros where the batch reached no such layer, as an expert.
                gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            distributed.mean_(gradients)
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
            take_step(step)
            if step % every == 0:
                now = total_loss(runs, targets, masks)
                if now < best:
                    best, best_step, kept = now, step, [r.copy() for r in rounding]
        for r, (v, alpha) in zip(rounding, kept):
            r.v.data.copy_(v)
            r.alpha.data.copy_(alpha)
        return start, best, best_step

    def _in_half(self, rounding: list[Rounding]) -> bool:
        if self.half is not None:
            return self.half
        if any(r.spec.grid.bits > 4 for r in rounding):
            return False
        if rounding[0].w.device.type == "cuda":
            return torch.cuda.is_bf16_supported()
        return torch.cpu._is_amx_tile_supported()


class Rounding(nn.Module):
    """Stands in for a layer's weight quantizer while its rounding is learned.

        w_hat = s * (clip(round(w / s_0 + V) + z, qmin, qmax) - z),   s = alpha * s_0

    Parameters: `v` in groups [O, G, g], in steps, 0 at the start; `alpha` [O, G, 1], 1 at the start.
    """

    # The layer then multiplies the tensors as they are: an integer product has no gradient for V.
    enabled = False

    def __init__(self, module: Any) -> None:
        super().__init__()
        quantizer: WeightQuantizer = module.weight_quantizer
        self.spec, self.in_features = quantizer.spec, quantizer.in_features
        self.base, self.zero_point = quantizer.scale.detach(), quantizer.zero_point
        self.w = to_groups(module.weight_ON.detach().float(), self.spec.group_size)
        self.v = nn.Parameter(torch.zeros_like(self.w))
        self.alpha = nn.Parameter(torch.ones_like(self.base))

    def forward(self, weight_ON: Tensor) -> Tensor:
        scale = self.base * self.alpha
        level = self._level(self.w / self.base, self.v)
        return from_groups(level * scale, self.in_features).to(weight_ON.dtype)

    def _level(self, steps: Tensor, v: Tensor) -> Tensor:
        """What an integer stands for, in steps; the gradient passes the rounding, not the clip."""
        qmin, qmax, offset = grids.limits(self.spec.grid)
        x = steps - offset + v
        rounded = x + (torch.round(x) - x).detach()
        return (rounded + self.zero_point).clamp(qmin, qmax) - self.zero_point + offset

    def copy(self) -> tuple[Tensor, Tensor]:
        return self.v.detach().clone(), self.alpha.detach().clone()

    @torch.no_grad()
    def result(self) -> tuple[Tensor, Tensor]:
        """(integers [O, N], scale [O, G, 1])."""
        offset = grids.limits(self.spec.grid)[2]
        integers = self._level(self.w / self.base, self.v) + self.zero_point - offset
        kind = torch.uint8 if grids.limits(self.spec.grid)[1] > 127 else torch.int8
        return from_groups(integers.round().to(kind), self.in_features), self.base * self.alpha


def block_loss(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared difference over the rows that count."""
    error = (output.float() - target.float()).square()
    if mask is not None and mask.shape == error.shape[: mask.dim()]:
        error = error[mask.bool()]
    return error.mean()


@torch.no_grad()
def total_loss(runs: Runs, targets: Sequence[Tensor], masks: Masks) -> float:
    """Mean of `block_loss` over all batches, and over all processes."""
    losses = [block_loss(run(), target, mask) for run, target, mask in zip(runs, targets, masks)]
    mean = torch.stack(losses).double().mean()
    distributed.mean_([mean])
    return float(mean)
