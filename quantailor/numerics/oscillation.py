"""Weights that jump between two integers: how often each does, and what to freeze it at.

    o_t = 1 where q_t != q_(t-1) and the jump goes the other way than the last one,  else 0
    f_t = m * o_t + (1 - m) * f_(t-1)            frequency of oscillation
    a_t = m * q_t + (1 - m) * a_(t-1)            average integer
    a weight with f_t > threshold is frozen at round(a_t), for good

Source: Nagel et al. 2022, arXiv:2203.11086, Eq. 4 and Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

MOMENTUM = 0.02  # the paper takes 0.01 for runs of many epochs


def jumps(q: Tensor, last: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """(the direction that each integer went since `last`, int8; whether that is the other way than `direction`, Eq. 4).

    >>> jumps(torch.tensor([1, 2, 3]), torch.tensor([2, 2, 2]), torch.tensor([1, 1, 1], dtype=torch.int8))
    (tensor([-1,  0,  1], dtype=torch.int8), tensor([ True, False, False]))
    """
    sign = torch.sign(q.short() - last.short()).to(torch.int8)
    return sign, (sign != 0) & (sign == -direction)


@dataclass
class Oscillation:
    """What is known of the integers of one weight [O, N]; 11 bytes each."""

    last: Tensor  # int16
    direction: Tensor  # int8: -1, 0 (never moved), 1
    frequency: Tensor  # float32
    average: Tensor  # float32
    frozen: Tensor  # bool

    @staticmethod
    def start(q: Tensor) -> Oscillation:
        """Nothing has moved yet."""
        return Oscillation(
            q.short(),
            torch.zeros_like(q, dtype=torch.int8),
            torch.zeros_like(q, dtype=torch.float32),
            q.float(),
            torch.zeros_like(q, dtype=torch.bool),
        )

    @torch.no_grad()
    def update(self, q: Tensor, threshold: float, momentum: float = MOMENTUM) -> None:
        """Take in the integers after a step. Frozen weights stay as they were when they were frozen."""
        sign, oscillates = jumps(q, self.last, self.direction)
        free = ~self.frozen
        self.frequency = torch.where(free, self.frequency.lerp(oscillates.float(), momentum), self.frequency)
        self.average = torch.where(free, self.average.lerp(q.float(), momentum), self.average)
        self.direction = torch.where(sign != 0, sign, self.direction)
        newly = free & (self.frequency > threshold)
        self.average = torch.where(newly, torch.round(self.average), self.average)
        self.frozen = self.frozen | newly
        self.last = torch.where(self.frozen, self.average.short(), q.short())

    @property
    def target(self) -> Tensor:
        """The integers that frozen weights are to have, int16 [O, N]; elsewhere the last ones."""
        return self.last

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
