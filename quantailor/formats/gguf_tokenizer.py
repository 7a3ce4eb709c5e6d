"""A fast tokenizer as GGUF metadata, and back: byte-level BPE (`gpt2`) and SentencePiece's BPE (`llama`).

llama.cpp splits byte-level text by rules it has by name (`tokenizer.ggml.pre`), and merges SentencePiece's pieces by a
score a piece where tokenizers has a rank a pair. Either is written only where both give the same tokens; else the
reason is told. Source: docs/gguf.md and llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quantailor.errors import UntrustedInput, UsageError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Name in GGUF -> (the split before byte-level BPE, whether whole words skip the merges). gpt-2: ByteLevel's own split.
_SPLITS: dict[str, tuple[str | None, bool]] = {
    "gpt-2": (None, False),
    "llama-bpe": (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, True),
    "qwen2": (_CONTRACTIONS + r"\p{N}" + _REST, False),
}
_SPACE = "\u2581"
_BYTES = {f"<0x{value:02X}>" for value in range(256)}
_SPECIAL = ("bos", "eos", "unk", "pad")
_GGUF_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_MAX_WORK = 200_000_000  # characters looked at to find merges: a vocabulary of 10^5 pieces takes some 10^7


def to_metadata(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    """(the `tokenizer.*` keys, notes). Tokens that only the model knows are filled in as unused.

    Raises: UsageError for a tokenizer that llama.cpp would split otherwise, saying in what.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("it is no fast tokenizer")
    data = json.loads(backend.to_str())
    model, notes = data["model"], []
    if model["type"] != "BPE":
        raise _refused(f"it is of type {model['type']}, and BPE is written")
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        raise _refused("its BPE has dropout, a prefix or a suffix of subwords")
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokens, types = _tokens(data, vocab_size)
    if any(entry["normalized"] is False and not entry["special"] for entry in data["added_tokens"]):
        notes.append("added tokens that are no control tokens are written as user-defined: llama.cpp finds them first")
    if model["byte_fallback"]:
        prefix = _space_prefix(data)
        scores = _scores(tokens, types, merges)
        own: dict[str, Any] = {
            "model": "llama",
            "pre": "default",
            "tokens": tokens,
            "scores": scores,
            "token_type": types,
        }
        own |= {"add_space_prefix": prefix}
    else:
        pre, more = _pre(data)
        notes += more
        own = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types}
        own |= {"merges": [" ".join(pair) for pair in merges]}
    metadata: dict[str, Any] = {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    for name in _SPECIAL:
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            metadata[f"tokenizer.ggml.{_GGUF_SPECIAL[name]}_token_id"] = int(number)
    starts, ends = _around(tokenizer)
    metadata |= {"tokenizer.ggml.add_bos_token": starts, "tokenizer.ggml.add_eos_token": ends}
    if isinstance(tokenizer.chat_template, str):
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata, notes


def _refused(why: str) -> UsageError:
    return UsageError(f"GGUF cannot hold this tokenizer: {why}; write without one (tokens only) or save the model")


def _tokens(data: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of each token, by number."""
    model = data["model"]
    known = {number: text for text, number in model["vocab"].items()}
    types = {n: BYTE if model["byte_fallback"] and text in _BYTES else NORMAL for n, text in known.items()}
    for entry in data["added_tokens"]:
        known[entry["id"]] = entry["content"]
        types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
        if model["byte_fallback"] and entry["content"] == model["unk_token"]:
            types[entry["id"]] = UNKNOWN
    if max(known) >= vocab_size:
        raise _refused(f"it has token {max(known)}, and the model knows {vocab_size}")
    tokens = [known.get(n, f"[PAD{n}]") for n in range(vocab_size)]
    if len(set(tokens)) != len(tokens):
        raise _refused("two of its tokens have the same text")
    return tokens, [types.get(n, UNUSED) for n in range(vocab_size)]


def _pre(data: dict[str, Any]) -> tuple[str, list[str]]:
    """The name of a byte-level BPE's split, and notes."""
    notes = []
    normalizer = data["normalizer"]
    if normalizer is not None:
        if normalizer["type"] != "NFC":
            raise _refused(f"it normalizes text by {normalizer['type']}, which llama.cpp's BPE does not")
        notes.append("the tokenizer composes accents first (NFC), llama.cpp does not: give it composed text")
    given = data["pre_tokenizer"] or {"type": "none"}
    parts = given["pretokenizers"] if given["type"] == "Sequence" else [given]
    last = parts[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(parts) > 2:
        raise _refused(f"it splits text by {given['type']} and not as byte-level BPE without a space in front")
    split: str | None = None
    if len(parts) == 2:
        first = parts[0]
        plain = first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"]
        split = first["pattern"].get("Regex") if plain else first["type"]
    for name, known in _SPLITS.items():
        if known == (split, bool(data["model"]["ignore_merges"])) and last["use_regex"] == (split is None):
            return name, notes
    raise _refused(f"it splits text by {str(split)[:60]!r}, for which llama.cpp has no name among {', '.join(_SPLITS)}")


def _space_prefix(data: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before the text."""
    normalizer, pre = data["normalizer"], data["pre_tokenizer"]
    parts = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if parts in ([{"type": "Prepend", "prepend": _SPACE}, replace], [replace]) and pre is None:
        return len(parts) == 2
    if not parts and pre and pre["type"] == "Metaspace" and pre["replacement"] == _SPACE and not pre["split"]:
        return bool(pre["prepend_scheme"] != "never")
    raise _refused("it has byte fallback but does not mark spaces as SentencePiece does")


def _scores(tokens: Sequence[str], types: Sequence[int], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """A score a piece, falling in the order in which merges make them.

    Raises: UsageError unless the order of pieces says as much as the ranks of pairs: the pairs that make one piece
    follow each other, and whatever two pieces make a third is a merge.
    """
    order = [a + b for a, b in merges]
    firsts = list(dict.fromkeys(order))
    if len(firsts) != 1 + sum(a != b for a, b in pairwise(order)) and order:
        raise _refused("the merges that make one piece do not follow each other, which scores cannot tell")
    pieces = {text for text, kind in zip(tokens, types) if kind == NORMAL}
    if set(_splits(pieces)) != set(merges):
        raise _refused("not every two pieces that make a third are merged, which scores cannot tell")
    score = {piece: -1.0 - rank for rank, piece in enumerate(firsts)}
    return [score.get(text, 0.0) if kind == NORMAL else 0.0 for text, kind in zip(tokens, types)]


def _splits(pieces: set[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece."""
    cuts = ((p[:i], p[i:]) for p in pieces for i in range(1, len(p)))
    return [(a, b) for a, b in cuts if a in pieces and b in pieces]


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts its start token before a text, and its end token after it."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for starts in (False, True):
        for ends in (False, True):
            if whole == [bos] * starts + plain + [eos] * ends:
                return starts, ends
    raise _refused(f"it puts other tokens around a text than its start {bos} and its end {eos}")


def from_metadata(metadata: Mapping[str, Any], vocab_size: int) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a file; None where it says it has none.

    Raises: UntrustedInput for one that is not read here, or that contradicts itself.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "no_vocab", "none"):
        return None
    if kind not in ("gpt2", "llama"):
        raise UntrustedInput(f"its tokenizer is {str(kind)[:40]!r}; gpt2 and llama are read")
    tokens, types = _read_tokens(metadata, vocab_size)
    vocab = {text: number for number, text in enumerate(tokens)}
    try:
        core = _byte_level(metadata, vocab) if kind == "gpt2" else _sentencepiece(metadata, tokens, types, vocab)
        for text, type_ in zip(tokens, types):
            if type_ in (CONTROL, UNKNOWN) and text:
                core.add_special_tokens([AddedToken(text, special=True, normalized=False)])
            elif type_ == USER_DEFINED and text:
                core.add_tokens([AddedToken(text, normalized=False)])
        if core.get_vocab_size() != len(tokens):
            raise UntrustedInput("its tokens do not keep their numbers")
    except UntrustedInput:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        first = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UntrustedInput(f"its tokenizer cannot be built ({first})") from error
    special = {name: _read_special(metadata, name, tokens) for name in _SPECIAL}
    around = [
        _flag(metadata, f"add_{name}_token", default=kind == "llama" and name == "bos") for name in ("bos", "eos")
    ]
    start, end = (special[n] if flag else None for n, flag in zip(("bos", "eos"), around))
    if start or end:
        template = " ".join(filter(None, (start, "$A", end)))
        pair = " ".join(filter(None, (start, "$A", end, start, "$B", end)))
        used = [(text, vocab[text]) for text in dict.fromkeys(filter(None, (start, end)))]
        core.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=used)
    named = {f"{name}_token": text for name, text in special.items() if text is not None}
    result = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **named)
    template_text = metadata.get("tokenizer.chat_template")
    if isinstance(template_text, str):
        result.chat_template = template_text
    return result


def _read_tokens(metadata: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or len(tokens) != vocab_size:
        count = len(tokens) if isinstance(tokens, list) else "no"
        raise UntrustedInput(f"it has {count} tokens and an embedding of {vocab_size}")
    if len(set(tokens)) != len(tokens):
        raise UntrustedInput("two of its tokens have the same text")
    if types is None:
        return tokens, [NORMAL] * len(tokens)
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        raise UntrustedInput("it has not one type for each token")
    if types.size and not (types.min() >= 0 and types.max() <= BYTE):
        raise UntrustedInput(f"it has a token of type {types.max()}; 0 to {BYTE} exist")
    return tokens, types.tolist()


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int]) -> Tokenizer:
    name, lines = metadata.get("tokenizer.ggml.pre", "gpt-2"), metadata.get("tokenizer.ggml.merges", [])
    if name not in _SPLITS:
        raise UntrustedInput(f"its text is split by {str(name)[:40]!r}; read are {', '.join(_SPLITS)}")
    split, ignore_merges = _SPLITS[name]
    if not isinstance(lines, list) or any(type(line) is not str for line in lines):
        raise UntrustedInput("its merges are no list of text")
    merges = []
    for line in lines:
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not all(part in vocab for part in (*pair, "".join(pair))):
            raise UntrustedInput(f"its merge {line[:40]!r} is not of two tokens that make a third")
        merges.append((pair[0], pair[1]))
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    core.pre_tokenizer = (
        level if split is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level])
    )
    core.decoder = decoders.ByteLevel()
    return core


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], vocab: dict[str, int]
) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or len(scores) != len(tokens):
        raise UntrustedInput("it has not one score for each token")
    if not bool(np.isfinite(scores).all()):
        raise UntrustedInput("a score of its tokens is NaN or Inf")
    pieces = {text for text, kind in zip(tokens, types) if kind == NORMAL}
    if sum(len(piece) ** 2 for piece in pieces) > _MAX_WORK:
        raise UntrustedInput("its tokens are too long to look for merges in them")
    unknown = next((text for text, kind in zip(tokens, types) if kind == UNKNOWN), None)
    number = metadata.get("tokenizer.ggml.unknown_token_id")
    if unknown is None and type(number) is int and 0 <= number < len(tokens):
        unknown = tokens[number]
    if not all(name in vocab for name in _BYTES) and unknown is None:
        raise UntrustedInput("it has neither all bytes nor a token for what is unknown")
    order = {piece: (-float(scores[vocab[piece]]), vocab[piece]) for piece in pieces}
    merges = sorted(_splits(pieces), key=lambda pair: (order[pair[0] + pair[1]], order[pair[0]], order[pair[1]]))
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    prefix = _flag(metadata, "add_space_prefix", default=True)
    marks = [normalizers.Prepend(_SPACE)] if prefix else []
    core.normalizer = normalizers.Sequence([*marks, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    core.decoder = decoders.Sequence(parts)
    return core


def _read_special(metadata: Mapping[str, Any], name: str, tokens: list[str]) -> str | None:
    key = f"tokenizer.ggml.{_GGUF_SPECIAL[name]}_token_id"
    number = metadata.get(key)
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise UntrustedInput(f"its {key} is {str(number)[:40]}, none of {len(tokens)} tokens")
    return tokens[number] or None


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if type(value) is not bool:
        raise UntrustedInput(f"its tokenizer.ggml.{name} is {str(value)[:40]}, not true or false")
    return value
