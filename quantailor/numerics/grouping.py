"""Runs of a row that share a scale, and what happens at a row's ragged end.

Axes: O = out_features, N = in_features, g = group size, G = ceil(N / g) groups a row.
A last group that is shorter is padded with zeros while it is being worked on: zero lies on every integer grid, moves
no maximum and has no error, so the padding changes nothing, and it is cut off again.
"""

import torch.nn.functional as F
from torch import Tensor


def num_groups(length: int, group_size: int | None) -> int:
    """G; 1 where `group_size` is None (one group: the whole row)."""
    return 1 if group_size is None else -(-length // group_size)


def to_groups(x_ON: Tensor, group_size: int | None) -> Tensor:
    """[O, N] -> [O, G, g], the last group padded with zeros. A view where nothing is padded."""
    length = x_ON.shape[-1]
    if group_size is None or group_size >= length:
        return x_ON.unsqueeze(-2)
    if missing := -length % group_size:
        x_ON = F.pad(x_ON, (0, missing))
    return x_ON.unflatten(-1, (-1, group_size))


def from_groups(x_OGg: Tensor, length: int) -> Tensor:
    """[O, G, g] -> [O, N], padding cut off."""
    return x_OGg.flatten(-2)[..., :length]


def per_element(x_OG: Tensor, length: int, group_size: int | None) -> Tensor:
    """[O, G] -> [O, N]: each group's value at each of its elements."""
    if group_size is None or group_size >= length:
        return x_OG.expand(-1, length)
    return x_OG.repeat_interleave(group_size, dim=-1)[..., :length]
