"""Tokenizers out and back: the same tokens for the same text, or a reason."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from quantailor.errors import UntrustedInput, UsageError
from quantailor.formats.gguf_tokenizer import from_metadata, to_metadata

TEXTS = ["", "a", " a", "Hello, world!  Two spaces\n\nand 12345 élan ☃ <s> it's", "\t tabs\r\n", "▁ marks", "<0x41>"]


def stored(metadata):
    """As the reader gives it: numbers as arrays."""
    return {
        k: np.array(v) if isinstance(v, list) and v and not isinstance(v[0], str) else v for k, v in metadata.items()
    }


def edited(tokenizer, change):
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    change(data)
    core = Tokenizer.from_str(json.dumps(data))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def byte_level(tiny_lm):
    return AutoTokenizer.from_pretrained(tiny_lm)


@pytest.mark.parametrize("which", ["tiny_lm", "tinystories_4m", "stories260k"])
def test_what_comes_back_gives_the_same_tokens(which, request):
    folder = request.getfixturevalue(which)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    metadata, notes = to_metadata(tokenizer, len(tokenizer))
    again = from_metadata(stored(metadata), len(tokenizer))
    assert notes == []
    assert metadata["tokenizer.ggml.model"] == ("llama" if which == "stories260k" else "gpt2")
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"], text
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert again.decode(ids) == tokenizer.decode(ids)
    assert (again.bos_token_id, again.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_sentencepiece_scores_fall_with_the_rank(stories260k):
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    metadata, _ = to_metadata(tokenizer, 512)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    made = [scores[tokens.index("".join(pair))] for pair in merges]
    assert made == sorted(made, reverse=True) and len(set(made)) == len({"".join(pair) for pair in merges})
    types = metadata["tokenizer.ggml.token_type"]
    assert types[:3] == [2, 3, 3] and types[3:259] == [6] * 256 and set(types[259:]) == {1}
    assert metadata["tokenizer.ggml.add_space_prefix"] is True and metadata["tokenizer.ggml.add_bos_token"] is True


def test_tokens_that_only_the_model_knows_are_unused(byte_level):
    metadata, _ = to_metadata(byte_level, 310)
    assert metadata["tokenizer.ggml.tokens"][303:] == [f"[PAD{n}]" for n in range(303, 310)]
    assert metadata["tokenizer.ggml.token_type"][300:] == [1, 1, 1] + [5] * 7
    assert from_metadata(stored(metadata), 310)("the cat")["input_ids"] == byte_level("the cat")["input_ids"]


def put(*path, value):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END = {"SpecialToken": {"id": "</s>", "type_id": 0}}


def split(regex):
    first = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [first, {**BYTES, "use_regex": False}]}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (put("pre_tokenizer", value={**BYTES, "add_prefix_space": True}), "without a space in front"),
        (put("pre_tokenizer", value={"type": "Whitespace"}), "Whitespace"),
        (put("pre_tokenizer", value=split(r"\w+")), "no name"),
        (put("pre_tokenizer", value=split(LLAMA3)), "no name"),  # its merges are not ignored for whole words
        (put("normalizer", value={"type": "Lowercase"}), "Lowercase"),
        (put("model", "byte_fallback", value=True), "SentencePiece"),
        (put("model", "end_of_word_suffix", value="</w>"), "suffix"),
        (
            put("post_processor", "single", value=[END, {"Sequence": {"id": "A", "type_id": 0}}]),
            "other tokens around",
        ),
    ],
)
def test_what_llama_cpp_would_split_otherwise_is_refused(byte_level, change, why):
    def both(data):
        change(data)
        if data["post_processor"]:
            data["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}

    with pytest.raises(UsageError, match=why):
        to_metadata(edited(byte_level, both), 303)


def test_known_splits_are_named_and_come_back(byte_level):
    for regex, ignore, name in ((LLAMA3, True, "llama-bpe"), (LLAMA3.replace("{1,3}", ""), False, "qwen2")):

        def change(data, regex=regex, ignore=ignore):
            data["pre_tokenizer"], data["model"]["ignore_merges"] = split(regex), ignore

        tokenizer = edited(byte_level, change)
        metadata, _ = to_metadata(tokenizer, 303)
        assert metadata["tokenizer.ggml.pre"] == name
        again = from_metadata(stored(metadata), 303)
        assert all(again(text)["input_ids"] == tokenizer(text)["input_ids"] for text in TEXTS)


def test_scores_that_could_not_tell_the_merges_are_refused(stories260k):
    tokenizer = AutoTokenizer.from_pretrained(stories260k)

    def missing(data):
        data["model"]["merges"].pop(6)  # one of two pairs that make a piece

    def apart(data):
        data["model"]["merges"].append(data["model"]["merges"].pop(6))

    for change, why in ((missing, "not every two pieces"), (apart, "do not follow each other")):
        with pytest.raises(UsageError, match=why):
            to_metadata(edited(tokenizer, change), 512)


def test_more_tokens_than_the_model_are_refused(byte_level):
    with pytest.raises(UsageError, match="token 302, and the model knows 300"):
        to_metadata(byte_level, 300)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("model", "bert", "'bert'; gpt2 and llama"),
        ("model", 3, "gpt2 and llama"),
        ("tokens", ["a"], "1 tokens and an embedding of 303"),
        ("tokens", "abc", "no tokens"),
        ("tokens", ["a"] * 303, "the same text"),
        ("token_type", np.zeros(4, np.int32), "one type for each"),
        ("token_type", np.full(303, 9, np.int32), "type 9"),
        ("token_type", np.zeros(303, np.float32), "one type for each"),
        ("merges", ["a"], "'a' is not of two"),
        ("merges", ["a b c"], "is not of two"),
        ("merges", ["a qqq"], "is not of two"),
        ("merges", np.arange(3), "no list of text"),
        ("pre", "klingon", "'klingon'"),
        ("bos_token_id", 303, "bos_token_id is 303"),
        ("bos_token_id", -1, "bos_token_id is -1"),
        ("add_bos_token", 1, "not true or false"),
    ],
)
def test_what_contradicts_itself_is_refused(byte_level, key, value, why):
    metadata, _ = to_metadata(byte_level, 303)
    with pytest.raises(UntrustedInput, match=why):
        from_metadata({**stored(metadata), f"tokenizer.ggml.{key}": value}, 303)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("scores", None, "one score"),
        ("scores", np.full(512, np.nan, np.float32), "NaN"),
        ("tokens", ["x" * 20_000, *map(str, range(511))], "too long"),
    ],
)
def test_a_bad_sentencepiece_is_refused(stories260k, key, value, why):
    metadata, _ = to_metadata(AutoTokenizer.from_pretrained(stories260k), 512)
    metadata = {**stored(metadata), f"tokenizer.ggml.{key}": value}
    if key == "tokens":
        metadata["tokenizer.ggml.token_type"] = np.ones(512, np.int32)
    with pytest.raises(UntrustedInput, match=why):
        from_metadata(metadata, 512)


def test_no_vocabulary_is_no_tokenizer():
    assert from_metadata({"tokenizer.ggml.model": "no_vocab"}, 4) is None and from_metadata({}, 4) is None
