"""How far one distribution is from another."""

import math

import torch
from torch import Tensor


def kl_divergence(reference: Tensor, log_probs: Tensor) -> Tensor:
    """KL(reference || model) in nats: sum_v p_ref(v) (log p_ref(v) - log p(v)).   two [*, vocab] -> [*]

    Both are log-probabilities. A token that the reference rules out (-inf) adds nothing, where the formula would say
    0 * -inf. Infinite where either side is not a distribution (nan), so a broken model is never close to anything.

    >>> kl_divergence(torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.75, 0.0]).log())
    tensor(0.1438)
    """
    probs = reference.exp()
    kl = torch.where(probs == 0, 0.0, probs * (reference - log_probs)).sum(-1)
    return torch.where(torch.isnan(kl), math.inf, kl)
