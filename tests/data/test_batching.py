import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantailor.data.batching import LengthGrouped, LMDataset, PadCollator, RecordDataset, batches
from quantailor.data.streams import lm_windows
from quantailor.errors import UsageError

ROWS = [
    {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]},
    {"input_ids": [8], "attention_mask": [1], "labels": [8]},
]


@pytest.fixture(scope="module")
def windows(tiny_lm):
    return lm_windows(["The cat sat on the mat."] * 20, AutoTokenizer.from_pretrained(tiny_lm), context=8)


def test_padding_is_masked_and_has_no_label():
    batch = PadCollator(pad_token_id=3)(ROWS)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 3, 3]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_single_labels_and_token_types():
    rows = [
        {"input_ids": [5, 6], "token_type_ids": [0, 1], "labels": 1},
        {"input_ids": [7], "token_type_ids": [1], "labels": 0},
    ]
    batch = PadCollator(pad_token_id=9)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6], [7, 9]],
        "token_type_ids": [[0, 1], [1, 0]],
        "attention_mask": [[1, 1], [1, 0]],
        "labels": [1, 0],
    }


def test_windows_as_rows(windows):
    dataset = LMDataset(windows)
    assert dataset.num_tokens == 8 * len(dataset)
    row = dataset[1]
    assert torch.equal(row["input_ids"], windows.input_ids[1]) and torch.equal(row["labels"], windows.input_ids[1])
    batch = PadCollator(0)([dataset[0], dataset[1]])
    assert torch.equal(batch["input_ids"], windows.input_ids[:2]) and batch["attention_mask"].all()


@pytest.mark.parametrize("limit", [None, 1, 3, 99])
@pytest.mark.parametrize("shuffle", [False, True])
def test_one_pass_gives_every_row_once(windows, shuffle, limit):
    dataset = LMDataset(windows)
    got = list(batches(dataset, PadCollator(0), 3, shuffle=shuffle, seed=1, limit=limit))
    rows = torch.cat([batch["input_ids"] for batch in got]).tolist()
    num_rows = min(limit or len(dataset), len(dataset))
    assert len(rows) == num_rows
    assert [len(batch["input_ids"]) for batch in got] == [min(3, num_rows - i) for i in range(0, num_rows, 3)]
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(1)) if shuffle else range(len(dataset))
    assert rows == [windows.input_ids[index].tolist() for index in list(order)[:num_rows]]


def test_bad_sizes_are_refused_before_the_first_batch(windows):
    with pytest.raises(UsageError, match="batch_size=0"):
        batches(LMDataset(windows), PadCollator(0), 0)
    with pytest.raises(UsageError, match="limit=-1"):
        batches(LMDataset(windows), PadCollator(0), 1, limit=-1)


def test_rows_are_checked():
    for row in ({"input_ids": [], "labels": 0}, {"input_ids": [1]}, {"labels": 0}):
        with pytest.raises(UsageError, match="row 1 has"):
            RecordDataset([ROWS[0], row])


def test_fingerprints_tell_tokens_and_labels_apart(windows):
    assert RecordDataset(ROWS).fingerprint() == RecordDataset([dict(row) for row in ROWS]).fingerprint()
    others = [ROWS[::-1], ROWS[:1], [ROWS[0], {**ROWS[1], "labels": [-100]}], [{**ROWS[0], "input_ids": [5, 6, 8]}]]
    assert len({RecordDataset(rows).fingerprint() for rows in [ROWS, *others]}) == 5
    assert LMDataset(windows).fingerprint() != LMDataset(windows.first(2)).fingerprint()


def test_padding_changes_no_loss(tiny_lm):
    """The loss of a batch is the mean over its labels, however much padding the batch has."""
    model = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    rows = [{"input_ids": list(range(5, 5 + length)), "labels": list(range(5, 5 + length))} for length in (3, 9, 30)]
    collate = PadCollator(0)
    with torch.no_grad():
        together = model(**collate(rows)).loss
        singly = sum(model(**collate([row])).loss * (len(row["labels"]) - 1) for row in rows) / (2 + 8 + 29)
    torch.testing.assert_close(together, singly)


def test_the_trainer_takes_both(tiny_lm, windows, tmp_path):
    from transformers import Trainer, TrainingArguments

    for dataset in (LMDataset(windows), RecordDataset(ROWS * 4)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        model = AutoModelForCausalLM.from_pretrained(tiny_lm)
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=PadCollator(0))
        assert trainer.train().training_loss > 0


def test_rows_of_one_length_share_a_batch():
    """Every row once; each full batch a run of the sorted lengths; another order in each pass and for each seed, and
    the same one again for the same."""
    lengths = torch.randint(3, 60, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthGrouped(lengths, 8, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(1003)) and len(sampler) == 1003 and list(sampler) == first
    batches = [first[i : i + 8] for i in range(0, 1003, 8)]
    assert len(batches[-1]) == 1003 % 8 and {len(batch) for batch in batches[:-1]} == {8}
    longest = [max(lengths[row] for row in batch) for batch in batches]
    padded = sum(8 * most for most in longest) / sum(lengths)
    assert padded < 1.1  # 1.75 in a random order
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
    assert abs(sum(longest[:40]) / 40 - sum(longest) / len(longest)) < 10  # no way from long to short
    sampler.set_epoch(1)
    assert list(sampler) != first and list(sampler) == list(LengthGrouped(lengths, 8, seed=2))
    assert list(LengthGrouped([], 8, seed=0)) == [] and sorted(LengthGrouped([5, 3], 8, seed=0)) == [0, 1]
