"""The best iterate so far, and the way back to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Score = tuple[float, ...]  # lower is better, compared left to right; NaN counts as worst


class Best:
    """Keeps a copy of everything that trains, at the step with the lowest score.

    Copies live on the CPU, in the parameters' own dtype: once the size of the trained weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.score: Score | None = None
        self.step = -1
        self.start: dict[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}

    def offer(self, step: int, score: Score) -> bool:
        """Keep the model as it is now if `score` is the best yet. The first offer is the start."""
        score = tuple(float("inf") if value != value else value for value in score)
        better = self.score is None or score < self.score
        if better:
            self.score, self.step = score, step
            self.state = self._copy()
            if not self.start:
                self.start = self.state
        return better

    def restore(self) -> None:
        """Put the best iterate back."""
        self._put(self.state)

    def restore_start(self) -> None:
        """Put the first offer back."""
        self._put(self.start)

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _put(self, state: dict[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, value in state.items():
            parameters[name].copy_(value)
