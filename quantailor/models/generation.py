"""Greedy text, token by token: by native blocks and nothing of transformers' loop where the model allows it.

That loop and what a model's forward does around its blocks cost some 7 ms a token where this was measured, a sixth of
the whole at 1.1 B parameters. A `Decoder` does what they do for one token of one text: embedding, blocks, norm, head.
It is proved against the model's own forward before it is used. Everything else, a model with blocks of its own making
or a generation config that asks for more than greedy search, goes through transformers' `generate`, and the reason is
told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.generation.streamers import BaseStreamer

from quantailor.errors import UsageError
from quantailor.models.cache import int8_cache
from quantailor.models.decoding import ALIKE, FastBlock, NotNative
from quantailor.models.structure import blocks

# What a generation config may hold without changing a greedy search.
_HARMLESS = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "max_length", "max_new_tokens"}
_HARMLESS |= {"do_sample", "temperature", "top_p", "top_k", "_from_model_config", "use_cache", "cache_implementation"}
_HARMLESS |= {"output_attentions", "output_hidden_states", "return_dict_in_generate"}


class Decoder:
    """A serving model's next logits for one token of one text.

    Raises: NotNative where a block is not native, or the model does more around its blocks than can be seen here.
    """

    def __init__(self, model: nn.Module) -> None:
        taken = [vars(block).get("forward") for _, block in blocks(model)]
        self.blocks = [block for block in taken if isinstance(block, FastBlock)]
        if len(self.blocks) < len(taken):
            raise NotNative("not all of its blocks are native")
        body: Any = getattr(model, "model", None)
        parts: list[Any] = [getattr(body, name, None) for name in ("embed_tokens", "rotary_emb", "norm")]
        parts.append(getattr(model, "lm_head", None))
        if any(part is None for part in parts):
            raise NotNative("around its blocks it is not built like Llama")
        self.embedding, self.rotary, self.norm, self.head = parts
        self._prove(model)

    def turns(self, places: int) -> tuple[Tensor, Tensor]:
        """cos and sin of every position, float32 [L, D]."""
        cos, sin = self.rotary(torch.zeros(1, 1, 1), position_ids=torch.arange(places)[None])
        return cos[0].contiguous(), sin[0].contiguous()

    def __call__(
        self, token: int, position: int, cache: StaticCache, turns: tuple[Tensor, Tensor], visible: Tensor
    ) -> Tensor:
        """Logits [V] after `token` at `position`; `cache` holds what came before, and this token afterwards. `visible`:
        bool [L], all true."""
        x = self.embedding(torch.tensor([token])).reshape(-1).float().clone()
        for block in self.blocks:
            layer: Any = cache.layers[block.index]
            block.step(x, turns[0][position], turns[1][position], layer, position, visible)
            layer.cumulative_length.fill_(position + 1)
        logits: Tensor = self.head(self.norm(x[None]))[0]
        return logits

    def _prove(self, model: Any) -> None:
        """Raises: NotNative unless a third and a fourth token's logits are those of the model's own forward."""
        size = int(model.config.vocab_size)
        ids = [1 % size, size // 2, size // 3, size - 1]
        mine, own = (StaticCache(config=model.config, max_cache_len=4) for _ in range(2))
        for cache in (mine, own):
            model(input_ids=torch.tensor([ids[:2]]), past_key_values=cache, logits_to_keep=1)
        turns, visible = self.turns(4), torch.ones(4, dtype=torch.bool)
        for position in (2, 3):
            expected = model(input_ids=torch.tensor([[ids[position]]]), past_key_values=own).logits[0, -1]
            found = self(ids[position], position, mine, turns, visible)
            if not (found - expected).abs().max() <= ALIKE * expected.abs().max():
                raise NotNative("around its blocks it does more than Llama does")


def decoder_of(model: nn.Module) -> tuple[Decoder | None, str]:
    """(A decoder, "") or (None, why tokens go through transformers' `generate`). For a model that serves."""
    config = getattr(model, "generation_config", None)
    more = sorted(set(config.to_diff_dict()) - _HARMLESS) if config is not None else []
    if more:
        return None, f"its generation config has {more[0]}"
    try:
        return Decoder(model), ""
    except NotNative as reason:
        return None, str(reason)


def told(why: str) -> str:
    """What decodes, given the second of what `decoder_of` gives."""
    return f"through transformers' own loop: {why}" if why else "one native call a block and token"


def continued(
    model: Any,
    ids: Tensor,
    new_tokens: int,
    streamer: BaseStreamer | None = None,
    *,
    decoder: Decoder | None = None,
    cache_bits: int | None = None,
    laid_out: bool = True,
    ends: bool = True,
    pad: int = 0,
) -> Tensor:
    """`ids` [1, T] and up to `new_tokens` more, the likeliest each time, until an end token where `ends`. [1, T + n].

    Without a decoder by transformers' `generate`. Keys and values stand in a cache laid out once, where `laid_out`; in
    int8 with `cache_bits` 8. Raises: UsageError for other bits.
    """
    if cache_bits not in (None, 8):
        raise UsageError(f"cache_bits={cache_bits}: keys and values are kept in 8 bits, or as they are (leave it out)")
    places = ids.shape[1] + new_tokens
    if decoder is None:
        cache: dict[str, Any] = {"cache_implementation": "static"} if laid_out else {}
        if cache_bits:
            cache = {"past_key_values": int8_cache(model.config, places)}
        found: Tensor = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=None if ends else new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad,
            streamer=streamer,
            disable_compile=True,  # on a GPU a laid-out cache has transformers compile, for minutes, which pays late
            **cache,
        )
        return found
    held = int8_cache(model.config, places) if cache_bits else StaticCache(config=model.config, max_cache_len=places)
    stops = _ends(model) if ends else set()
    say: Callable[[Tensor], None] = streamer.put if streamer is not None else lambda _: None
    turns, visible, tokens = decoder.turns(places), torch.ones(places, dtype=torch.bool), ids[0].tolist()
    say(ids)
    logits = model(input_ids=ids, past_key_values=held, logits_to_keep=1).logits[0, -1]
    while True:
        tokens.append(int(logits.argmax()))
        say(torch.tensor(tokens[-1:]))
        if tokens[-1] in stops or len(tokens) == places:
            break
        logits = decoder(tokens[-1], len(tokens) - 1, held, turns, visible)
    if streamer is not None:
        streamer.end()
    return torch.tensor([tokens])


def _ends(model: Any) -> set[int]:
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set() if given is None else {given} if isinstance(given, int) else set(given)
