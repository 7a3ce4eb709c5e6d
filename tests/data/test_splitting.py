import pytest
from transformers import AutoTokenizer

from quantailor.data.loading import load_examples, overlap, split
from quantailor.errors import UntrustedInput, UsageError


@pytest.fixture(scope="module")
def tokenizer(tiny_lm):
    return AutoTokenizer.from_pretrained(tiny_lm)


def texts(num, start=0):
    return [f"Story {number} is about {number * number} cats." for number in range(start, start + num)]


def documents(examples):
    """The token sequences of the documents in a stream, as a list of tuples."""
    found: dict[int, list[int]] = {}
    windows = examples.windows
    for token, number in zip(windows.input_ids.flatten().tolist(), windows.document_ids.flatten().tolist()):
        found.setdefault(number, []).append(token)
    return [tuple(tokens) for tokens in found.values()]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_documents_are_held_out_whole(tokenizer, fraction, seed):
    examples = load_examples(texts(60), tokenizer, context=16)
    rest, held = split(examples, fraction, seed)
    assert abs(held.num_tokens / examples.num_tokens - fraction) < 0.05
    assert abs(rest.num_tokens + held.num_tokens - examples.num_tokens) < 32
    before = documents(examples)
    assert all(document in before for document in documents(rest)[:-1] + documents(held)[:-1])  # the last may be cut
    assert overlap(rest, held) == overlap(held, rest) == 0
    assert held.windows.context == 16 and held.windows.bos
    assert split(examples, fraction, seed)[1].fingerprint == held.fingerprint
    assert split(examples, fraction, seed + 1)[1].fingerprint != held.fingerprint


def test_equal_documents_and_records_stay_together(tokenizer, tiny_bert):
    examples = load_examples(texts(30) * 2, tokenizer, context=16)
    assert overlap(*split(examples, 0.3)) == 0
    records = [{"text": text, "label": 0} for text in texts(30) * 2]
    rows = load_examples(records, AutoTokenizer.from_pretrained(tiny_bert))
    rest, held = split(rows, 0.3)
    assert overlap(rest, held) == 0 and len(rest) + len(held) == 60 and len(held) in (18, 20)
    assert rest.label_names == held.label_names == ("0", "1")


def test_the_end_of_a_single_text_is_held_out(tokenizer):
    examples = load_examples([" ".join(texts(50))], tokenizer, context=16)
    rest, held = split(examples, 0.2)
    stream = examples.windows.input_ids.flatten().tolist()
    assert stream[: rest.num_tokens] == rest.windows.input_ids.flatten().tolist()
    assert stream[round(len(stream) * 0.8) :][: held.num_tokens] == held.windows.input_ids.flatten().tolist()
    assert "held out the end of the text: 1 document(s)" in held.notes[-1]


def test_what_cannot_be_split_is_refused(tokenizer, tiny_bert):
    with pytest.raises(UsageError, match=r"fraction=1\.5"):
        split(load_examples(texts(9), tokenizer), 1.5)
    with pytest.raises(UntrustedInput, match="too few"):
        split(load_examples(["ab"], tokenizer), 0.1)
    one = load_examples([{"text": "same", "label": 1}] * 5, AutoTokenizer.from_pretrained(tiny_bert))
    with pytest.raises(UntrustedInput, match=r"1 different record\(s\)"):
        split(one, 0.5)


def test_overlap_counts_what_is_shared(tokenizer, tiny_bert):
    a = load_examples([*texts(20), "the end of a"], tokenizer, context=16)
    b = load_examples([*texts(12, start=15), "the end of b, somewhere else"], tokenizer, context=24)
    assert overlap(a, b) == 5  # stories 15 to 19, though the windows fall differently
    assert overlap(a, a) == a.windows.num_documents
    bert = AutoTokenizer.from_pretrained(tiny_bert)
    rows = [{"text": text, "label": 0} for text in texts(9)]
    changed = [{**rows[0], "label": 1}, *rows[1:4]]
    assert overlap(load_examples(rows, bert), load_examples(changed, bert)) == 3


def test_overlap_of_single_texts_compares_windows(tokenizer):
    text = " ".join(texts(30))
    whole = load_examples([text], tokenizer, context=16)
    assert overlap(load_examples([text], tokenizer, context=16, max_tokens=64), whole) == 4
    assert overlap(load_examples([" ".join(texts(30, start=500))], tokenizer, context=16), whole) == 0


def test_the_real_parts_of_tinystories_share_nothing(data_dir, stories260k):
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    parts = [load_examples(data_dir / f"text/tinystories/{part}.txt", tokenizer) for part in ("train", "valid")]
    assert overlap(*parts) == 0
