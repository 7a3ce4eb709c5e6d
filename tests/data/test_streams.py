import pytest
import torch
from transformers import AutoTokenizer

from quantailor.data.sources import read_records
from quantailor.data.streams import lm_windows
from quantailor.errors import UntrustedInput, UsageError


@pytest.fixture(scope="module")
def tokenizer(tiny_lm):
    return AutoTokenizer.from_pretrained(tiny_lm)


def stream_by_definition(documents, tokenizer):
    """(token, document) pairs of the joined documents."""
    pairs = []
    for number, text in enumerate(documents):
        pairs.append((tokenizer.bos_token_id, number))
        pairs += [(token, number) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return pairs


@pytest.mark.parametrize("max_tokens", [None, 7, 21, 30, 10_000])
@pytest.mark.parametrize("context", [2, 3, 7, 20, 21, 22, 1000])
def test_windows_are_the_stream_cut_up(tokenizer, context, max_tokens):
    documents = ["The cat sat.", "x", "A longer story, with 你好 in it and more words than the first."] * 3
    pairs = stream_by_definition(documents, tokenizer)[:max_tokens]
    windows = lm_windows(documents, tokenizer, context=context, max_tokens=max_tokens)
    length = min(context, len(pairs))
    kept = pairs[: len(pairs) // length * length]
    assert windows.input_ids.tolist() == [[t for t, _ in kept[i : i + length]] for i in range(0, len(kept), length)]
    assert windows.document_ids.flatten().tolist() == [number for _, number in kept]
    assert windows.input_ids.dtype == windows.document_ids.dtype == torch.int64
    assert windows.num_documents == len({number for _, number in kept})
    assert windows.num_dropped_tokens == len(pairs) - len(kept)
    assert windows.context == length
    assert windows.bos
    assert len(windows) == len(kept) // length


def test_blank_documents_leave_no_trace(tokenizer):
    some = lm_windows(["one", "", "two", " \n"], tokenizer, context=4)
    assert torch.equal(some.input_ids, lm_windows(["one", "two"], tokenizer, context=4).input_ids)
    assert some.num_documents == 2


def test_the_start_token_comes_once_if_there_is_one(tokenizer, tiny_bert):
    assert lm_windows(["the cat"], tokenizer, context=50).input_ids.tolist() == [tokenizer("the cat")["input_ids"]]
    without = lm_windows(["the cat"], AutoTokenizer.from_pretrained(tiny_bert), context=50)
    assert not without.bos
    assert without.input_ids.shape == (1, 6)  # six letters, without [CLS] and [SEP]


def test_reading_stops_at_max_tokens(tokenizer):
    def documents():
        yield from ["once upon a time"] * 300
        raise AssertionError("read on")

    assert lm_windows(documents(), tokenizer, context=8, max_tokens=16).input_ids.shape == (2, 8)


def test_the_first_windows_alone(tokenizer):
    windows = lm_windows(["one two three", "four", "five six"], tokenizer, context=5)
    first = windows.first(1)
    assert first.input_ids.tolist() == windows.input_ids[:1].tolist()
    assert first.num_documents == 1


def test_too_little_is_refused(tokenizer):
    with pytest.raises(UntrustedInput, match=r"0 token\(s\)"):
        lm_windows([" "], tokenizer, context=4)
    with pytest.raises(UsageError, match="context=1 leaves no token"):
        lm_windows(["text"], tokenizer, context=1)
    with pytest.raises(UsageError, match="max_tokens=1 leaves no token"):
        lm_windows(["text"], tokenizer, context=4, max_tokens=1)


@pytest.mark.parametrize(("model", "num_scored"), [("stories260k", 165_495), ("tinystories-llama-4m", 92_310)])
def test_the_published_number_of_tokens(data_dir, model, num_scored):
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "models" / model)
    documents = [record["text"] for record in read_records(data_dir / "text/tinystories/valid.txt")]
    windows = lm_windows(documents, tokenizer, context=256)
    assert windows.input_ids[:, 1:].numel() == num_scored
    assert windows.num_documents == 356
