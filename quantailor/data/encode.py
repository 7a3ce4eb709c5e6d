"""Text to token ids, and the few facts about a tokenizer that the rest of `data/` asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's cross-entropy and every Hugging Face model leave out
TEXTS_AT_ONCE = 256  # a fast tokenizer works on these in parallel; more would only delay an early stop


@dataclass(frozen=True)
class Encoded:
    """Token rows: `input_ids`, `attention_mask`, `labels`, for some `token_type_ids`; and what cutting them cost."""

    rows: list[dict[str, Any]]
    num_truncated: int = 0
    num_dropped: int = 0


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The token ids of each text, without special tokens. Lazy: stop early, and the rest is never encoded."""
    remaining = iter(texts)
    while chunk := list(islice(remaining, TEXTS_AT_ONCE)):
        # verbose=False: texts longer than the model are cut later, so the warning about them would be wrong
        yield from tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def start_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that open a document: the start token, or nothing where the tokenizer has none."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def end_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that close a document: the end token, or nothing where the tokenizer has none."""
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def padding_token(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str | None]:
    """The id to pad with, and a note where the tokenizer names none. Padding is masked, so any id serves."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id), None
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id), "the tokenizer has no padding token: padded with its end token"
    return 0, "the tokenizer has neither a padding nor an end token: padded with token 0"
