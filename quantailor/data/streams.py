"""A language model's text: documents joined into one stream of tokens, cut into windows of equal length."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantailor.data.encode import encode, start_token
from quantailor.errors import UntrustedInput, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class LMWindows:
    """Rows of a token stream. Every token but a window's first one can be scored: the first has nothing before it.

    `input_ids`, `document_ids` int64 [num_windows, context]: the tokens, and which document each is from (from 0,
    in stream order). `bos` says whether each document opens with a start token, `num_dropped_tokens` how many tokens
    at the end filled no window.
    """

    input_ids: Tensor
    document_ids: Tensor
    num_documents: int
    context: int
    bos: bool
    num_dropped_tokens: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    def first(self, num_windows: int) -> LMWindows:
        """The first windows alone."""
        kept = self.document_ids[:num_windows]
        return dataclasses.replace(
            self, input_ids=self.input_ids[:num_windows], document_ids=kept, num_documents=int(kept.max()) + 1
        )


def lm_windows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, context: int, max_tokens: int | None = None
) -> LMWindows:
    """Encode each document behind its start token (if the tokenizer has one), join them, cut windows of `context`.

    The incomplete last window is dropped, unless it is the only one: then it stays, shorter than `context`. With
    `max_tokens`, documents are read only until that many tokens are there. Blank documents are skipped.
    Raises: UsageError for a `context` or `max_tokens` below 2; UntrustedInput for text of fewer than 2 tokens.
    """
    if context < 2:
        raise UsageError(f"context={context} leaves no token to predict; use 2 or more")
    if max_tokens is not None and max_tokens < 2:
        raise UsageError(f"max_tokens={max_tokens} leaves no token to predict; use 2 or more, or None for all")
    start = start_token(tokenizer)
    tokens: list[int] = []
    lengths: list[int] = []
    for ids in encode((text for text in documents if text.strip()), tokenizer):
        lengths.append(len(start) + len(ids))
        tokens += start + ids
        if max_tokens is not None and len(tokens) >= max_tokens:
            break
    document_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    stream = torch.tensor(tokens, dtype=torch.int64)
    return cut(stream[:max_tokens], document_ids[:max_tokens], context=context, bos=bool(start))


def cut(stream: Tensor, document_ids: Tensor, *, context: int, bos: bool) -> LMWindows:
    """Windows of a stream that is already encoded: `stream`, `document_ids` int64 [num_tokens].

    Documents are numbered anew, from 0. Raises: UntrustedInput for fewer than 2 tokens.
    """
    if len(stream) < 2:
        raise UntrustedInput(f"the text has {len(stream)} token(s), and nothing can be predicted from it; add text")
    length = min(context, len(stream))
    kept = len(stream) // length * length
    _, numbers = torch.unique_consecutive(document_ids[:kept], return_inverse=True)
    return LMWindows(
        input_ids=stream[:kept].view(-1, length).clone(),
        document_ids=numbers.view(-1, length),
        num_documents=int(numbers[-1]) + 1,
        context=length,
        bos=bos,
        num_dropped_tokens=len(stream) - kept,
    )
