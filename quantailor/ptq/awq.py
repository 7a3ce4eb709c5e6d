"""AWQ: scale up the weights that meet large inputs, so that rounding hurts them least.

    W X = (W diag(s)) (diag(s)^-1 X),     s_j = mean |x_j|^alpha / sqrt(max_k s_k * min_k s_k),     alpha in 0 .. 1

A weight's rounding error is its group's step, whatever its size: multiplied by s > 1 before and divided after, the
error of a salient column shrinks by s as long as the step does not grow. The division is folded into what feeds the
layer, for all of its readers together; alpha is searched on a grid of 20 by the error of their outputs with weights on
their grid (inputs too, where the scheme has one). How that is scored, accepted and folded is shared with SmoothQuant.

The paper's second half, the search of a clip range by the output error of each group, is `ptq/clip.py`: it rounds where
the chain names no other solver. One that follows (`awq+gptq`) has a range search of its own, which serves it better.

Source: Lin et al. 2023, arXiv:2306.00978, Eq. 4-5; the normalization is that of the code released with it.
Different here: the error is that of the layers, not of their block, and grouped-query values are scaled as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.models.feeds import Feed
from quantailor.ptq.clip import Clip
from quantailor.ptq.method import Masks, Method, Report, Runs
from quantailor.ptq.smoothquant import Reader, centred, mean_inputs, rescale


def awq_factors(x_mean_C: Tensor, alpha: float) -> Tensor:
    """Eq. 5, normalized, [C]; 1 for a channel that was never active."""
    used = x_mean_C > 0
    s = x_mean_C.double().pow(alpha)
    live = s[used] if bool(used.any()) else torch.ones_like(s)
    return centred(s, used, (live.max() * live.min()).sqrt())


@dataclass(frozen=True)
class AWQ:
    alphas: tuple[float, ...] = tuple(i / 20 for i in range(20))
    rows: int = 512  # of each layer's input that alphas are scored on; means are taken over all
    needs_hessian: bool = False
    needs_float_path: bool = False
    rounds_by: Method = field(default_factory=Clip)  # where no other part of the chain finds the integers

    def on_block(self, block: nn.Module, layers: Mapping[str, Any], runs: Runs, masks: Masks) -> dict[str, Report]:
        """Fold what helps into the block, in place. Returns a report a layer: what was folded where, or why not."""

        def candidates(readers: Sequence[Reader], feed: Feed) -> Iterator[tuple[float, Tensor]]:
            x_mean = mean_inputs(readers, feed)
            for alpha in self.alphas:
                yield alpha, awq_factors(x_mean, alpha)

        return rescale("awq", block, layers, runs, masks, self.rows, lambda _: None, candidates)
