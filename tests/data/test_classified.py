import pytest
from transformers import AutoTokenizer

from quantailor.data.classified import checked_names, encode_classified, label_ids, names_beside
from quantailor.data.columns import find_columns
from quantailor.errors import UntrustedInput, UsageError


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


def labelled(*values):
    return [{"label": value} for value in values]


@pytest.mark.parametrize(
    ("values", "names", "ids", "found"),
    [
        ([1, 0, 1], None, [1, 0, 1], ("0", "1")),
        ([0, 0], None, [0, 0], ("0", "1")),  # one class would mean regression to a Hugging Face model
        ([3, 0], None, [3, 0], ("0", "1", "2", "3")),
        (["1", "0", " 2"], None, [1, 0, 2], ("0", "1", "2")),
        ([1.0, 0.0], None, [1, 0], ("0", "1")),
        ([True, False], None, [1, 0], ("0", "1")),
        (["neg", "pos", "neg"], None, [0, 1, 0], ("neg", "pos")),
        (["neg", "pos", "neg"], ("pos", "neg"), [1, 0, 1], ("pos", "neg")),
        ([1, 0], ("a", "b", "c"), [1, 0], ("a", "b", "c")),
    ],
)
def test_labels_become_numbers(values, names, ids, found):
    assert label_ids(labelled(*values), "label", names) == (ids, found)


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ([0, None], None, "record 2: label missing is no class"),
        ([0, -1], None, "record 2: label -1 is no class"),
        ([0, 2.5], None, "label 2.5 is no class"),
        ([0, ""], None, "label '' is no class"),
        ([0, [1]], None, r"label \[1\] is no class"),
        ([0, 10**9], None, "label 1000000000 is no class"),
        ([0, float("nan")], None, "label nan is no class"),
        ([0, 2], ("a", "b"), r"record 2: label 2 is none of the 2 classes \(a, b\)"),
        (["a", "c"], ("a", "b"), "label 'c' is none of the 2 classes"),
    ],
)
def test_labels_that_are_none_are_named(values, names, message):
    with pytest.raises(UntrustedInput, match=message):
        label_ids(labelled(*values), "label", names)


def test_rows_are_the_tokenizers_own(tokenizer):
    records = [{"sentence1": "ab", "sentence2": "c", "label": 1}, {"sentence1": "d", "sentence2": "efg", "label": 0}]
    encoded = encode_classified(records, find_columns(records), [1, 0], tokenizer, max_length=50)
    assert encoded.rows == [{**tokenizer("ab", "c"), "labels": 1}, {**tokenizer("d", "efg"), "labels": 0}]
    assert set(encoded.rows[0]) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert encoded.num_truncated == 0


def test_long_rows_are_cut_and_counted(tokenizer):
    records = [{"text": "abc", "label": 0}, {"text": "abcdefgh", "label": 1}]
    encoded = encode_classified(records, find_columns(records), [0, 1], tokenizer, max_length=6)
    assert encoded.num_truncated == 1
    assert [row["input_ids"] for row in encoded.rows] == [tokenizer(text)["input_ids"] for text in ("abc", "abcd")]


def test_a_row_without_tokens_is_named(tiny_lm):
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    records = [{"text": "", "label": 0}]
    with pytest.raises(UntrustedInput, match="record 1 has no token"):
        encode_classified(records, find_columns(records), [0], _without_start(tokenizer), max_length=6)


def _without_start(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return tokenizer


def test_names_beside_a_file(tmp_path):
    data = tmp_path / "train.jsonl"
    assert names_beside(data) is None
    (tmp_path / "labels.json").write_text('["b", "a"]')
    assert names_beside(data) == ("b", "a")
    for wrong, message in (("[", "no readable JSON"), ('{"0": "a"}', "must hold a list"), ('["a", "a"]', "different")):
        (tmp_path / "labels.json").write_text(wrong)
        with pytest.raises(UntrustedInput, match=message):
            names_beside(data)


def test_given_names_are_checked():
    assert checked_names(["no", "yes"]) == ("no", "yes")
    for names in ([], ["one"], ["a", "b", "a"]):
        with pytest.raises(UsageError, match="two or more different names"):
            checked_names(names)
