"""What each architecture's tensors are called in GGUF, and how llama.cpp wants their rows ordered.

llama.cpp turns neighbouring elements of a head together (x0 with x1), transformers elements half a head apart (x0 with
x_{d/2}). So the rows of q and k of a Llama are interleaved on the way out: new row 2i is old row i, new row 2i + 1 is
old row i + d/2, head by head. A row keeps its integers and scales. Qwen's are left: llama.cpp turns those as
transformers does.

Source: the rope types in llama.cpp's llama-model.cpp, and the tensor list of docs/gguf.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.#.input_layernorm": "blk.#.attn_norm",
    "model.layers.#.post_attention_layernorm": "blk.#.ffn_norm",
    "model.layers.#.self_attn.q_proj": "blk.#.attn_q",
    "model.layers.#.self_attn.k_proj": "blk.#.attn_k",
    "model.layers.#.self_attn.v_proj": "blk.#.attn_v",
    "model.layers.#.self_attn.o_proj": "blk.#.attn_output",
    "model.layers.#.mlp.gate_proj": "blk.#.ffn_gate",
    "model.layers.#.mlp.up_proj": "blk.#.ffn_up",
    "model.layers.#.mlp.down_proj": "blk.#.ffn_down",
}
_QWEN3 = _LLAMA | {
    "model.layers.#.self_attn.q_norm": "blk.#.attn_q_norm",
    "model.layers.#.self_attn.k_norm": "blk.#.attn_k_norm",
}
_GPT2 = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "transformer.h.#.ln_1": "blk.#.attn_norm",
    "transformer.h.#.ln_2": "blk.#.ffn_norm",
    "transformer.h.#.attn.c_attn": "blk.#.attn_qkv",
    "transformer.h.#.attn.c_proj": "blk.#.attn_output",
    "transformer.h.#.mlp.c_fc": "blk.#.ffn_up",
    "transformer.h.#.mlp.c_proj": "blk.#.ffn_down",
}


@dataclass(frozen=True)
class Architecture:
    """`name`: what GGUF and transformers' model_type call it, which is the same for all of these. `modules`: module of
    transformers -> stem in GGUF, # a block's number; `interleaved`: stems whose rows are reordered; `transposed`: stems
    that transformers stores as [N, O] (Conv1D)."""

    name: str
    modules: Mapping[str, str]
    interleaved: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()
    stems: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.stems.update({stem: module for module, stem in self.modules.items()})

    def stem(self, module: str) -> str | None:
        """`model.layers.3.mlp.up_proj` -> `blk.3.ffn_up`; None if this architecture has no such module."""
        number, pattern = _numbered(module)
        found = self.modules.get(pattern)
        return None if found is None else found.replace("#", number)

    def module(self, stem: str) -> str | None:
        """The inverse."""
        number, pattern = _numbered(stem)
        found = self.stems.get(pattern)
        return None if found is None else found.replace("#", number)

    def kind(self, stem: str) -> str:
        """`blk.3.ffn_up` -> `ffn_up`."""
        return stem.rpartition(".")[2]


ARCHITECTURES = {
    "llama": Architecture("llama", _LLAMA, interleaved=frozenset(("attn_q", "attn_k"))),
    "qwen2": Architecture("qwen2", _LLAMA),
    "qwen3": Architecture("qwen3", _QWEN3),
    "gpt2": Architecture("gpt2", _GPT2, transposed=frozenset(("attn_qkv", "attn_output", "ffn_up", "ffn_down"))),
}


def _numbered(name: str) -> tuple[str, str]:
    match = re.search(r"(?<=\.)(0|[1-9]\d{0,4})(?=\.)", name)
    return ("", name) if match is None else (match[0], f"{name[: match.start()]}#{name[match.end() :]}")


def interleave(rows: Tensor, num_heads: int) -> Tensor:
    """Rows [heads * d, ...] in transformers' order -> in llama.cpp's.

    >>> interleave(torch.arange(8), num_heads=2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return rows.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def deinterleave(rows: Tensor, num_heads: int) -> Tensor:
    """The inverse of `interleave`.

    >>> deinterleave(interleave(torch.arange(24), 3), 3).tolist() == list(range(24))
    True
    """
    return rows.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def is_zero(tensor: Tensor) -> bool:
    """Whether nothing but zeros is in it: padding must be that."""
    return not bool(torch.count_nonzero(tensor))
