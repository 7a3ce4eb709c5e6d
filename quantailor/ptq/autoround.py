"""AutoRound: learn the rounding of a whole block by sign descent on its output error.

    w_hat = s * (clip(round(w / s + V) + z, qmin, qmax) - z),   s = alpha * s_0,   V in [-1/2, 1/2]
    V <- V - lr sign(dL/dV),  alpha likewise;   L = mean (block_hat(x~) - block(x))^2,   lr from 1/steps to 0

x~ comes from the quantized prefix and x from the float model, so errors of the past are corrected as well. It starts
from the integers of another method, inside whose cells the weights lie, and keeps the best iterate by the loss over all
calibration data, the start included: a block never ends worse on that data than it began.
Source: Cheng et al. 2023, arXiv:2309.05516, Eq. 3-5, Algorithm 1. Different here: the start; alpha may exceed 1, since
s_0 is a searched range and not the largest magnitude.
"""

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
from quantailor.ptq.method import Method, Solution
from quantailor.ptq.qronos import Qronos
from quantailor.ptq.statistics import Statistics
from quantailor.spec import NF4, QuantSpec


@dataclass(frozen=True)
class AutoRound:
    steps: int = 200
    looks: int = 4  # how often the loss over all data is taken for the best iterate
    alpha: tuple[float, float] = (0.5, 1.5)
    seed: int = 0
    start: Method = field(default_factory=Qronos)
    needs_hessian: bool = True
    needs_float_path: bool = True

    def solve(self, weight_ON: Tensor, statistics: Statistics | None, spec: QuantSpec) -> Solution:
        """The layer's start; `refine` then moves all of a block's layers together."""
        return self.start.solve(weight_ON, statistics, spec)

    def refine(
        self,
        block: nn.Module,
        layers: dict[str, Any],
        runs: Sequence[Callable[[], Tensor]],
        targets: Sequence[Tensor],
        masks: Sequence[Tensor | None],
    ) -> dict[str, dict[str, Any]]:
        """Move the integers and scales of a block's fake-quantized `layers`, in place. Returns a report a layer.

        `runs[i]()` is the block's output on batch i of the quantized prefix, `targets[i]` the float model's;
        `masks[i]` [B, T] says which rows count.
        """
        movable = {n: m for n, m in layers.items() if not isinstance(m.weight_quantizer.spec.grid, NF4)}
        if not movable:
            return {n: {"autoround": "left as it was: NF4 has no steps to round between"} for n in layers}
        frozen = [(p, p.requires_grad) for p in block.parameters()]
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        before = {n: m.weight_quantizer for n, m in movable.items()}
        rounding = {n: _Rounding(m, self.alpha) for n, m in movable.items()}
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
        report = {"method": "autoround", "block_loss": [start, best], "best_step": step}
        return {name: dict(report) for name in movable}

    def _descend(
        self,
        rounding: list[_Rounding],
        runs: Sequence[Callable[[], Tensor]],
        targets: Sequence[Tensor],
        masks: Sequence[Tensor | None],
    ) -> tuple[float, float, int]:
        """(loss at the start, the best, its step); `rounding` ends at the best."""
        generator = torch.Generator().manual_seed(self.seed)
        start = best = _total(runs, targets, masks)
        best_step, kept = 0, [r.copy() for r in rounding]
        every = max(1, self.steps // self.looks)
        for step in range(1, self.steps + 1):
            rate = (1 - (step - 1) / self.steps) / self.steps
            i = int(torch.randint(len(runs), (1,), generator=generator))
            with torch.enable_grad():
                loss = _loss(runs[i](), targets[i], masks[i])
                # Zeros where the batch reached no such layer, as an expert.
                gradients = torch.autograd.grad(
                    loss, [p for r in rounding for p in (r.v, r.alpha)], materialize_grads=True
                )
            for r, (grad_v, grad_alpha) in zip(rounding, zip(gradients[::2], gradients[1::2])):
                r.move(rate, grad_v, grad_alpha)
            if step % every == 0:
                loss_now = _total(runs, targets, masks)
                if loss_now < best:
                    best, best_step, kept = loss_now, step, [r.copy() for r in rounding]
        for r, (v, alpha) in zip(rounding, kept):
            r.v.data.copy_(v)
            r.alpha.data.copy_(alpha)
        return start, best, best_step


class _Rounding(nn.Module):
    """Stands in for a layer's weight quantizer while its rounding is learned."""

    # The layer then multiplies the tensors as they are: an integer product has no gradient for V.
    enabled = False

    def __init__(self, module: Any, limits: tuple[float, float]) -> None:
        super().__init__()
        quantizer: WeightQuantizer = module.weight_quantizer
        self.spec, self.in_features, self.limits = quantizer.spec, quantizer.in_features, limits
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

    def move(self, rate: float, grad_v: Tensor, grad_alpha: Tensor) -> None:
        with torch.no_grad():
            self.v.sub_(rate * grad_v.sign()).clamp_(-0.5, 0.5)
            self.alpha.sub_(rate * grad_alpha.sign()).clamp_(*self.limits)

    def copy(self) -> tuple[Tensor, Tensor]:
        return self.v.detach().clone(), self.alpha.detach().clone()

    @torch.no_grad()
    def result(self) -> tuple[Tensor, Tensor]:
        """(integers [O, N], scale [O, G, 1])."""
        offset = grids.limits(self.spec.grid)[2]
        integers = self._level(self.w / self.base, self.v) + self.zero_point - offset
        kind = torch.uint8 if grids.limits(self.spec.grid)[1] > 127 else torch.int8
        return from_groups(integers.round().to(kind), self.in_features), self.base * self.alpha


def _loss(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    error = (output.float() - target.float()).square()
    if mask is not None and mask.shape == error.shape[: mask.dim()]:
        error = error[mask.bool()]
    return error.mean()


def _total(runs: Sequence[Callable[[], Tensor]], targets: Sequence[Tensor], masks: Sequence[Tensor | None]) -> float:
    with torch.no_grad():
        losses = [float(_loss(run(), target, mask)) for run, target, mask in zip(runs, targets, masks)]
    return sum(losses) / len(losses)
