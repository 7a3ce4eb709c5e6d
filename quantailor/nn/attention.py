"""An attention function for transformers' interface, in which scores, keys and values can be quantized.

    K_hat, V_hat = what a quantized cache holds;   S = Q K_hat^T * scaling [-> softcap] [+ position bias]
    S_hat        = score_point(S)                  before the mask is added
    O            = softmax(S_hat + mask) V_hat     softmax in float32

Without points it computes what the model's own eager function does, bit for bit (models/points.py proves it on each
model before it is used). The mask interface is registered with it: without, transformers hands out no mask at all, and
a decoder sees the future. Axes: B batch, H heads, Q queries, K keys, D features of a head.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from quantailor.errors import QuantailorError

IMPLEMENTATION = "quantailor"
_KNOWN = {"softcap", "position_bias"}  # options of eager functions that change what is computed here


class _Watch(threading.local):
    calls: list[tuple[nn.Module, frozenset[str]]] | None = None
    scores: list[tuple[Tensor, Tensor]] | None = None


_watch = _Watch()


@contextmanager
def watched() -> Iterator[list[tuple[nn.Module, frozenset[str]]]]:
    """Every module that calls the function in the block, with the names of its options, in order."""
    before, _watch.calls = _watch.calls, []
    try:
        yield _watch.calls
    finally:
        _watch.calls = before


@contextmanager
def kept_scores() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Of every call in the block, in order: S [B, H, Q, K] as softmax gets it but for the mask, with its gradient; and
    where the mask lets a query look, bool, broadcastable to it."""
    before, _watch.scores = _watch.scores, []
    try:
        yield _watch.scores
    finally:
        _watch.scores = before


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Shapes: `query` [B, H, Q, D], `key`, `value` [B, H / groups, K, D], `attention_mask` float, broadcastable to
    [B, H, Q, K], 0 where a key is seen. Returns [B, Q, H, D] and the probabilities [B, H, Q, K]."""
    if _watch.calls is not None:
        _watch.calls.append((module, frozenset(name for name, v in options.items() if v is not None)))
    for name in ("key_point", "value_point", "score_point"):
        if (point := getattr(module, name, None)) is not None:
            point.used = True
    if (point := getattr(module, "key_point", None)) is not None:
        key = point(key)
    if (point := getattr(module, "value_point", None)) is not None:
        value = point(value)
    key, value = (_for_all_heads(x, query.shape[1]) for x in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    mask = attention_mask
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, torch.finfo(scores.dtype).min)
    if (point := getattr(module, "score_point", None)) is not None:
        scores = point(scores, None if mask is None else mask > torch.finfo(mask.dtype).min / 2)
    if _watch.scores is not None:
        seen = torch.ones_like(scores[:, :1], dtype=torch.bool)
        _watch.scores.append((scores, seen if mask is None else seen & (mask > torch.finfo(mask.dtype).min / 2)))
    if mask is not None:
        scores = scores + mask
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32 if scores.dtype.itemsize < 8 else None)
    probabilities = probabilities.to(query.dtype)
    dropped = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2).contiguous(), dropped


def _for_all_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values [B, H / groups, K, D] of grouped heads, repeated to [B, H, K, D]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def check_used(module: nn.Module, _args: Any, output: Any) -> None:
    """The hook of attention modules with points. Raises: QuantailorError where their function was not this one."""
    for name in ("key_point", "value_point", "score_point"):
        point = getattr(module, name, None)
        if point is not None and not getattr(point, "used", False):
            raise QuantailorError(
                f"a {type(module).__name__} with quantized scores, keys or values ran without them: the attention "
                f"implementation was changed; call model.set_attn_implementation({IMPLEMENTATION!r})"
            )
        if point is not None:
            point.used = False


def register() -> None:
    """Make transformers know the function and its mask; a second call does nothing."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
