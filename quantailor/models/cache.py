"""A cache of keys and values in int8, laid out once: a scale a head and place, largest / 127.

A quarter of the bytes that attention reads for each token at long contexts, at an error of at most half a 127th of a
row's largest value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from quantailor.errors import UsageError


class Int8Layer(StaticLayer):
    """Of one block. `keys`, `values` int8 [B, K, L, D]; `key_scales`, `value_scales` float32 [B, K, L]."""

    keys: Tensor
    values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = (torch.zeros_like(t, dtype=torch.int8) for t in (self.keys, self.values))
        shape = self.keys.shape[:-1]
        self.key_scales, self.value_scales = (torch.zeros(shape, device=self.device) for _ in range(2))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """The new ones are rounded and kept; what is handed out is what was kept, as floats [B, K, L, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places = torch.arange(key_states.shape[-2], device=self.device) + self.cumulative_length
        self.cumulative_length.add_(key_states.shape[-2])
        held = []
        for new, kept, scales in (
            (key_states, self.keys, self.key_scales),
            (value_states, self.values, self.value_scales),
        ):
            largest = new.float().abs().amax(-1)
            inverse = torch.where(largest > 0, 127.0 / largest, torch.zeros_like(largest))
            kept.index_copy_(2, places, torch.round(new.float() * inverse.unsqueeze(-1)).to(torch.int8))
            scales.index_copy_(2, places, largest / 127.0)
            held.append((kept * scales.unsqueeze(-1)).to(self.dtype))
        return held[0], held[1]


def int8_cache(config: Any, places: int) -> StaticCache:
    """For `places` tokens. Raises: UsageError for a model whose attention looks through a window."""
    cache = StaticCache(config=config, max_cache_len=places)
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        raise UsageError("an 8-bit cache holds whole contexts, and this model's attention looks through a window")
    cache.layers = [Int8Layer(max_cache_len=places) for _ in cache.layers]
    return cache
