import json

import pytest
import torch
from transformers import AutoTokenizer

from quantailor.data.loading import load_examples
from quantailor.errors import UntrustedInput, UsageError

STORIES = ["The cat sat on the mat.", "A dog ran by.", "Then all was quiet."]
INSTRUCTIONS = [
    {"instruction": "Add.", "input": "1, 2", "output": "3"},
    {"instruction": "Go.", "input": "", "output": "No"},
]
LABELLED = [{"text": "so good", "label": 1}, {"text": "so very, very bad", "label": 0}]


@pytest.fixture
def tokenizer(tiny_lm):
    return AutoTokenizer.from_pretrained(tiny_lm)


@pytest.fixture
def bert(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


def test_text(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES))
    examples = load_examples(path, tokenizer, context=8)
    assert examples.task == "lm" and examples.windows.num_documents == 3 and examples.num_labels == 0
    assert examples.num_tokens == 8 * len(examples) == examples.windows.input_ids.numel()
    assert examples.source == str(path)
    assert examples.notes == (
        f"the last {examples.windows.num_dropped_tokens} tokens fill no window of 8 and were left out",
    )
    in_memory = load_examples(STORIES, tokenizer, context=8)
    assert in_memory.fingerprint == examples.fingerprint and in_memory.source == "the data"
    assert load_examples(STORIES, tokenizer, context=8, max_tokens=8).num_tokens == 8
    assert load_examples(STORIES, tokenizer, context=8, limit=2).fingerprint != examples.fingerprint


def test_instructions(tokenizer):
    examples = load_examples(INSTRUCTIONS, tokenizer)
    assert examples.task == "lm" and examples.windows is None and len(examples) == 2
    (batch,) = examples.batches(4)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert examples.num_tokens == int(batch["attention_mask"].sum())
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_classification(bert):
    examples = load_examples(LABELLED, bert)
    assert examples.task == "classification" and examples.label_names == ("0", "1") and examples.num_labels == 2
    (batch,) = examples.batches(4)
    assert batch["labels"].tolist() == [1, 0] and set(batch) >= {"input_ids", "attention_mask", "token_type_ids"}


def test_the_task_decides_between_columns(bert, tokenizer):
    assert load_examples(LABELLED, tokenizer, "lm").windows.num_documents == 2
    with pytest.raises(UntrustedInput, match="task 'classification' needs"):
        load_examples(STORIES, bert, "classification")


def test_class_names_come_from_a_file_or_the_caller(bert, tmp_path):
    path = tmp_path / "dev.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in LABELLED))
    assert load_examples(path, bert).label_names == ("0", "1")
    (tmp_path / "labels.json").write_text('["bad", "good", "mixed"]')
    examples = load_examples(path, bert)
    assert examples.label_names == ("bad", "good", "mixed")
    assert examples.notes[-1] == f"class names from {tmp_path / 'labels.json'}"
    assert load_examples(path, bert, label_names=["no", "yes"]).label_names == ("no", "yes")


def test_nothing_is_done_silently(tokenizer, bert):
    def notes(*args, **options):
        return " | ".join(load_examples(*args, **options).notes)

    assert "9 records were asked for, the data has 3" in notes(STORIES, tokenizer, limit=9)
    assert "1 blank document(s) skipped" in notes([*STORIES, " "], tokenizer)
    assert "one window, shorter than 256" in notes(STORIES, tokenizer)
    assert "context=300 is above the 256 tokens" in notes(STORIES, tokenizer, context=300)
    assert "1 of 2 records cut to 9 tokens" in notes(LABELLED, bert, context=9)
    long = [{**INSTRUCTIONS[0], "instruction": "very " * 90}]
    assert "1 record(s) left out: no response within 99 tokens" in notes(INSTRUCTIONS + long, tokenizer, context=99)
    tokenizer.pad_token = None
    assert "padded with its end token" in notes(INSTRUCTIONS, tokenizer)
    assert load_examples(INSTRUCTIONS, tokenizer).collator.pad_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert "padded with token 0" in notes(INSTRUCTIONS, tokenizer)


def test_the_first_rows_alone(tokenizer, bert):
    windows = load_examples(STORIES, tokenizer, context=4)
    assert torch.equal(windows.take(2).windows.input_ids, windows.windows.input_ids[:2])
    assert windows.take(10**6) is windows
    rows = load_examples(LABELLED, bert).take(1)
    assert len(rows) == 1 and rows.label_names == ("0", "1")
    with pytest.raises(UsageError, match="limit=0"):
        windows.take(0)


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (STORIES, {"context": 1}, UsageError, "context=1"),
        (STORIES, {"limit": 0}, UsageError, "limit=0"),
        (STORIES, {"dataset_split": "train"}, UsageError, "dataset_split='train'"),
        (STORIES, {"label_names": ["a", "b"]}, UsageError, "label_names has no use for text records"),
        (INSTRUCTIONS, {"max_tokens": 9}, UsageError, "max_tokens=9 counts tokens of plain text"),
        (INSTRUCTIONS, {"context": 2}, UntrustedInput, "no record has a response within 2 tokens"),
        ([], {}, UntrustedInput, "not empty"),
        ([3], {}, UntrustedInput, "a list of texts or of dicts"),
        (["a\ud800"], {}, UntrustedInput, "no valid Unicode"),
    ],
)
def test_what_cannot_be_used_is_refused(tokenizer, data, options, error, message):
    with pytest.raises(error) as caught:
        load_examples(data, tokenizer, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "num_rows", "num_labels"),
    [("sst2/dev.jsonl", 872, 2), ("banking77/dev.jsonl", 1540, 77), ("chnsenticorp_hotel/dev.jsonl", 1000, 2)],
)
def test_the_real_tasks(data_dir, minilm, file, num_rows, num_labels):
    examples = load_examples(data_dir / "tasks" / file, AutoTokenizer.from_pretrained(minilm), context=64)
    assert (len(examples), examples.num_labels) == (num_rows, num_labels)


def test_the_real_instructions(data_dir, stories260k):
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    examples = load_examples(data_dir / "tasks/alpaca/train.json", tokenizer, context=512, limit=300)
    assert len(examples) + sum(int(note.split()[0]) for note in examples.notes if "left out" in note) == 300
