"""Attention scores before softmax, as differentiable tensors, of any model that goes through transformers' interface.

Models answer `output_attentions` with probabilities, after softmax. Distillation of scores needs what lies before it,
so for the length of a block the model's attention is the function of nn/attention.py, which computes what the eager
one does and hands its scores out. B rows, H heads, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from quantailor.errors import UsageError
from quantailor.nn.attention import IMPLEMENTATION, kept_scores, register, watched


@dataclass
class Scores:
    """Of one forward pass, a layer each, as they ran: `scores` [B, H, T, T], `seen` bool [B, 1, T, T]."""

    scores: list[Tensor] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)


@contextmanager
def keeping_scores(model: Any) -> Iterator[Scores]:
    """Around one forward pass of `model`: what is given is filled when the block ends. Its own attention is back then.

    Raises: UsageError where the model's attention does not go through the interface, or has options of its own that
    change scores in ways that are not known here.
    """
    inner = getattr(model, "module", model)  # as DistributedDataParallel wraps it
    register()
    before, found = inner.config._attn_implementation, Scores()
    inner.config._attn_implementation = IMPLEMENTATION
    try:
        with watched() as calls, kept_scores() as kept:
            yield found
    finally:
        inner.config._attn_implementation = before
    if not kept:
        raise UsageError(
            f"{type(inner).__name__} does its attention without transformers' interface, which shows probabilities "
            "alone; leave attention_weight out"
        )
    if odd := {name for _, options in calls for name in options} & {"s_aux", "alibi", "sinks"}:
        raise UsageError(f"{type(inner).__name__} has {min(odd)} in its attention; leave attention_weight out")
    found.scores += [scores for scores, _ in kept]
    found.seen += [seen for _, seen in kept]
