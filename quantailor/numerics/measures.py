"""How far two tensors are apart."""

import torch
from torch import Tensor


def relative_error(x_hat: Tensor, x: Tensor) -> float:
    """||x_hat - x|| / ||x||, in double precision; 0 if both are zero."""
    x, x_hat = x.double(), x_hat.double()
    norm = torch.linalg.vector_norm(x)
    difference = torch.linalg.vector_norm(x_hat - x)
    return float(difference / norm) if norm > 0 else float(difference)


def relative_max_difference(x_hat: Tensor, x: Tensor) -> float:
    """max |x_hat - x| / max |x|: the measure of parity. Infinite where one is not finite."""
    difference, largest = (x_hat.double() - x.double()).abs().max(), x.double().abs().max()
    value = float(difference / largest) if largest > 0 else float(difference)
    return value if value == value else float("inf")
