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

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantailor.ptq.block import BlockDescent, Rounding


@dataclass(frozen=True)
class AutoRound(BlockDescent):
    name = "autoround"
    alpha: tuple[float, float] = (0.5, 1.5)

    def stepper(self, rounding: list[Rounding], steps: int) -> Callable[[int], None]:
        """Sign descent; the rate falls from 1 / steps to 0."""

        @torch.no_grad()
        def take_step(step: int) -> None:
            rate = (1 - (step - 1) / steps) / steps
            for r in rounding:
                assert r.v.grad is not None and r.alpha.grad is not None
                r.v.sub_(rate * r.v.grad.sign()).clamp_(-0.5, 0.5)
                r.alpha.sub_(rate * r.alpha.grad.sign()).clamp_(*self.alpha)

        return take_step
