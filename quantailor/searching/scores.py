"""Attention probabilities with few bits, in any attention that uses torch's own functions: to see what that costs.

A row of probabilities p >= 0 gets the levels 0 .. 2^b - 1 times max(p) / (2^b - 1): zero stays zero, the largest stays
what it is. `torch.nn.functional.scaled_dot_product_attention` and a softmax over the last of four axes are watched
while the block runs; nothing is registered, and nothing outside of the block is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def fake_quantize_scores(p: Tensor, bits: int) -> Tensor:
    """[..., T] rows of probabilities on 2^bits levels each.

    >>> fake_quantize_scores(torch.tensor([0.6, 0.3, 0.1]), bits=2)
    tensor([0.6000, 0.4000, 0.0000])
    """
    step = p.amax(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny) / (2**bits - 1)
    return (p / step).round() * step


class QuantizedScores(TorchFunctionMode):
    """Counts in `seen` how many attentions it changed."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.seen = bits, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.seen += 1
            return self._attention(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in (F.softmax, torch.softmax, Tensor.softmax) and result.dim() == 4:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if axis in (-1, 3):
                self.seen += 1
                return fake_quantize_scores(result, self.bits)
        return result

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The definition that torch documents for this function, with the probabilities on their levels."""
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        logits = query @ key.transpose(-2, -1) * (scale if scale is not None else 1 / math.sqrt(query.shape[-1]))
        if is_causal:
            allowed = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
            logits = logits.masked_fill(~allowed, -math.inf)
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
        p = logits.float().softmax(-1).nan_to_num(0.0).to(query.dtype)  # a row that may see nothing gives nothing
        return fake_quantize_scores(p, self.bits) @ value


@contextmanager
def quantized_scores(block: nn.Module, bits: int) -> Iterator[QuantizedScores]:
    """While `block` runs, its attention probabilities have `bits` bits."""
    mode = QuantizedScores(bits)

    def enter(*_: Any) -> None:
        mode.__enter__()

    def leave(*_: Any) -> None:
        mode.__exit__(None, None, None)

    handles = [block.register_forward_pre_hook(enter), block.register_forward_hook(leave, always_call=True)]
    try:
        yield mode
    finally:
        for handle in handles:
            handle.remove()
