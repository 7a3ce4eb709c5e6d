"""What calibration draws from data: each row once, the same for the same seed, and no padding in its statistics."""

import pytest
import torch
from transformers import AutoTokenizer

from quantailor import api
from quantailor.data.batching import LMDataset, PadCollator, drawn_rows
from quantailor.data.examples import Examples
from quantailor.data.loading import load_examples
from quantailor.data.streams import LMWindows
from quantailor.errors import UsageError


@pytest.fixture(scope="module")
def tokenizer(tiny_lm):
    return AutoTokenizer.from_pretrained(tiny_lm)


@pytest.fixture(scope="module")
def alpaca(data_dir, tokenizer):
    return load_examples(data_dir / "tasks/alpaca/train.json", tokenizer, context=256, limit=60)


def rows_in(batches):
    """The tokens of each row, without padding."""
    return [
        tuple(ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"])
    ]


@pytest.mark.parametrize("samples", [1, 16, 17, 40])
def test_rows_are_drawn_once_by_the_seed(alpaca, samples):
    batches, notes = alpaca.calibration_batches(samples, seed=3)
    rows = rows_in(batches)
    everything = [tuple(row["input_ids"]) for row in alpaca.dataset.rows]
    assert rows == [everything[i] for i in drawn_rows(len(alpaca), samples, 3)] and notes == []
    assert len(rows) == len(set(rows)) == samples
    assert rows == rows_in(alpaca.batches(16, shuffle=True, seed=3, limit=samples))
    assert rows_in(alpaca.calibration_batches(samples, seed=3, batch_size=5)[0]) == rows
    assert rows_in(alpaca.calibration_batches(40, seed=3)[0])[:samples] == rows, "more rows begin with the same"
    assert rows_in(alpaca.calibration_batches(samples, seed=4)[0]) != rows


def test_rows_are_never_repeated_to_make_up_the_number(alpaca):
    batches, notes = alpaca.calibration_batches(5000)
    assert sorted(rows_in(batches)) == sorted(tuple(row["input_ids"]) for row in alpaca.dataset.rows)
    assert notes == [f"5,000 rows were asked for, {alpaca.source} has {len(alpaca)}: each is used once"]
    with pytest.raises(UsageError, match="limit=0 leaves nothing to do"):
        alpaca.calibration_batches(0)


def test_rows_that_say_the_same_are_told(tokenizer):
    records = [{"prompt": f"Say {i % 4}.", "response": "Yes."} for i in range(9)]
    assert load_examples(records, tokenizer).calibration_batches(9)[1] == [
        "5 of 9 rows repeat another, token for token"
    ]
    windows = load_examples(["the same again"] * 8, tokenizer, context=4)
    assert "rows repeat another" in windows.calibration_batches(len(windows))[1][0]


def test_5000_rows_are_drawn_within_32_mb():
    ids = torch.arange(6000 * 256).remainder(997).view(6000, 256)
    stream = LMWindows(ids, torch.zeros_like(ids), num_documents=1, context=256, bos=False)
    batches, _ = Examples("lm", LMDataset(stream), PadCollator(0), "text").calibration_batches(5000)
    assert sum(len(batch["input_ids"]) for batch in batches) == 5000
    assert sum(t.untyped_storage().nbytes() for b in batches for t in b.values()) == 3 * 8 * 5000 * 256


def test_real_instructions_are_laid_out_as_alpaca_and_cut(data_dir, tokenizer):
    record = {"instruction": "Name a colour.", "input": "", "output": "Red."}
    (row,) = load_examples([record], tokenizer).dataset.rows
    assert tokenizer.decode(row["input_ids"]) == "<s>### Instruction:\nName a colour.\n\n### Response:\nRed.</s>"
    examples = load_examples(data_dir / "tasks/alpaca/train.json", tokenizer, context=128, limit=200)
    lengths = [len(row["input_ids"]) for row in examples.dataset.rows]
    assert max(lengths) == 128 and min(lengths) < 128
    cut, left_out = examples.notes
    whole = load_examples(data_dir / "tasks/alpaca/train.json", tokenizer, context=4096, limit=200)
    prompts = [row["labels"].count(-100) for row in whole.dataset.rows]
    kept = [row for row, prompt in zip(whole.dataset.rows, prompts) if prompt < 128]
    assert [row["input_ids"] for row in examples.dataset.rows] == [row["input_ids"][:128] for row in kept]
    num_cut = sum(len(row["input_ids"]) > 128 for row in kept)
    assert cut == f"{num_cut} of {len(kept)} records cut to 128 tokens"
    assert left_out == f"{200 - len(lengths)} record(s) left out: no response within 128 tokens"


def test_padding_counts_in_no_statistic(tiny_lm, alpaca):
    """Every layer sees as many rows as there are tokens, and batches of one row, without padding, give the same."""
    model = api.load(tiny_lm)
    quantized = api.quantize(model, "w4a16-g32", data=alpaca, samples=21, method="gptq")
    batches, _ = alpaca.calibration_batches(21)
    num_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert num_tokens < sum(batch["input_ids"].numel() for batch in batches), "some of it is padding"
    rows = {report["rows"] for report in quantized.state.layers.values() if "rows" in report}
    assert rows == {num_tokens}
