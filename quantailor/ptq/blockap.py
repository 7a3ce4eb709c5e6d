"""Block-AP: train the weights and scales of a whole block on its output error, with the quantization in the loop.

    w_hat = s * (clip(round(u) + z, qmin, qmax) - z),   u = w / s_0 + V,   s = alpha * s_0
    L = mean (block_hat(x~) - block(x))^2,              Adam on V and alpha, cosine rates

dL/dV passes the rounding straight through and not the clip; dL/ds is the sum of dL/dw_hat times the integer (less z).
x~ comes from the quantized prefix, x from the float model. Unlike AutoRound's V, this one has no bound: a weight may
leave the two integers next to it. The start is a solver's integers, the best iterate over all calibration rows is kept.
Source: Chen et al. 2024, arXiv:2407.11062 (EfficientQAT), section 3.2. Different here: the start (there nearest
rounding); the weights move in units of their own step, so that one rate serves every layer; the zero point stays; s
serves de-quantizing only (V already moves the rounding), and the target is the float model's own path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantailor.ptq.block import BlockDescent, Rounding

# Of V, in steps of the grid, by bits: how far a weight may wander in all is this times half the number of steps. At
# 4 bits and more the start is good, and a rate that moves many weights to and fro ends worse than it.
LEARNING_RATES = {1: 0.003, 2: 0.003, 3: 0.003, 4: 0.001, 5: 0.001, 6: 0.0005, 7: 0.0005, 8: 0.0005}


@dataclass(frozen=True)
class BlockAP(BlockDescent):
    name = "blockap"
    steps: int = 300
    steps_at_2_bits: int = 600  # and below: there the start is bad, and more steps still pay
    learning_rate: float | None = None  # None: what LEARNING_RATES has for the layer's bits
    scale_share: float = 0.33  # alpha's rate, of V's
    betas: tuple[float, float] = (0.9, 0.99)

    def num_steps(self, rounding: list[Rounding]) -> int:
        """`steps`, or more where a layer has 2 bits or fewer."""
        few = any(r.spec.grid.bits <= 2 for r in rounding)
        return max(self.steps, self.steps_at_2_bits) if few else self.steps

    def stepper(self, rounding: list[Rounding], steps: int) -> Callable[[int], None]:
        """Adam; both rates fall from their value to 0 on half a cosine."""
        groups, rates = [], []
        for r in rounding:
            rate = self.learning_rate or LEARNING_RATES[r.spec.grid.bits]
            groups += [{"params": [r.v]}, {"params": [r.alpha]}]
            rates += [rate, self.scale_share * rate]
        optimizer = torch.optim.Adam(groups, betas=self.betas)

        def take_step(step: int) -> None:
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
            optimizer.step()
            with torch.no_grad():
                for r in rounding:
                    r.alpha.clamp_(min=0.1)  # a scale keeps its sign, and stays a scale

        return take_step
