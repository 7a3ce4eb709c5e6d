"""CAGE: after the optimizer's step each weight is pulled towards its grid point.

    w <- w - rate * strength * (w - Q(w)),   strength = 0 for the first `silence` of the run, then rising to lambda

The straight-through gradient is that of the loss at Q(w); the pull makes w and Q(w) the same in the end, so that the
gradient becomes the true one. Source: Tabesh et al. 2025, arXiv:2510.18784, section 3 (decoupled form).
"""

import torch
from torch import Tensor


def strength(largest: float, step: int, steps: int, silence: float = 0.0) -> float:
    """lambda at `step` (from 0) of `steps`: 0 up to `silence` of the run, then linear, `largest` at its end.

    >>> [strength(8.0, step, 4, silence=0.5) for step in range(5)]
    [0.0, 0.0, 0.0, 4.0, 8.0]
    """
    begin = silence * steps
    return largest * max(0.0, (step - begin) / (steps - begin)) if steps > begin else 0.0


@torch.no_grad()
def pull_(weight: Tensor, on_grid: Tensor, share: float) -> None:
    """Move `weight` in place by `share` (rate * strength) of its way to `on_grid`; never beyond it. Shapes alike."""
    weight.sub_((weight - on_grid) * min(share, 1.0))
