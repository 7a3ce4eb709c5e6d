import copy
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from quantailor.data.loading import load_examples
from quantailor.errors import UntrustedInput, UsageError
from quantailor.evaluate import bootstrap
from quantailor.evaluate.lm import Reference, evaluate_lm

STORIES = [f"Story {number} is about {number * number} cats and a dog." for number in range(30)]
INSTRUCTIONS = [{"prompt": f"Say {number}. " * (number % 5 + 1), "response": f"{number}!"} for number in range(9)]


@pytest.fixture(scope="module")
def tokenizer(tiny_lm):
    return AutoTokenizer.from_pretrained(tiny_lm)


@pytest.fixture
def model(tiny_lm):
    return AutoModelForCausalLM.from_pretrained(tiny_lm)


@pytest.fixture
def other(model):
    """The same model, a little off."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return changed


@pytest.fixture(params=["documents", "one text", "records"])
def examples(request, tokenizer):
    if request.param == "records":
        return load_examples(INSTRUCTIONS, tokenizer)
    return load_examples(STORIES if request.param == "documents" else [" ".join(STORIES)], tokenizer, context=16)


@torch.no_grad()
def by_definition(model, reference, examples):
    """Token by token: (unit, NLL, KL, same top token) of everything that is scored."""
    found = []
    windows = examples.windows
    exact = [copy.deepcopy(each).double().eval() for each in (model, reference)]
    for index in range(len(examples)):
        row = examples.dataset[index]
        ids = torch.as_tensor(row["input_ids"])[None]  # one row, without padding
        ours, theirs = (each(input_ids=ids).logits[0].log_softmax(-1) for each in exact)
        for position in range(1, len(row["input_ids"])):
            target = int(row["labels"][position])
            if target == -100:
                continue
            p, q = theirs[position - 1], ours[position - 1]
            many = windows is not None and windows.num_documents >= 20
            unit = int(windows.document_ids[index, position]) if many else index
            found.append((unit, -float(q[target]), float((p.exp() * (p - q)).sum()), bool(p.argmax() == q.argmax())))
    return found


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_every_figure_matches_its_definition(model, other, examples, batch_size):
    units, nll, kl, same = zip(*by_definition(other, model, examples))
    result = evaluate_lm(other, examples, batch_size=batch_size, reference=model)
    assert result.num_tokens == result.compared_tokens == len(nll)
    assert result.nats_per_token == pytest.approx(np.mean(nll), rel=1e-5)
    assert result.perplexity == result.value == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)
    assert result.kl == pytest.approx(np.mean(kl), rel=1e-3) and result.kl > 1e-4
    assert result.top1_agreement == np.mean(same) < 1
    assert result.counts.tolist() == np.bincount(units, minlength=len(result.counts)).tolist()
    np.testing.assert_allclose(result.sums, np.bincount(units, nll, minlength=len(result.sums)), rtol=1e-5)
    assert result.interval == bootstrap.interval(result.sums, result.counts, bootstrap.perplexity)
    assert result.interval[0] < result.value < result.interval[1]
    assert result.kl_interval[0] < result.kl < result.kl_interval[1]
    assert not result.higher_is_better and result.metric == "perplexity"


def test_what_was_measured_is_said(model, tokenizer):
    documents = evaluate_lm(model, load_examples(STORIES, tokenizer, context=16))
    assert (documents.unit, documents.num_documents, documents.context, documents.stride) == ("document", 30, 16, 16)
    assert documents.bos is True and documents.notes == () and documents.source == "the data"
    text = evaluate_lm(model, load_examples([" ".join(STORIES)], tokenizer, context=16))
    assert text.unit == "window" and "1 document(s) are too few" in text.notes[0]
    records = evaluate_lm(model, load_examples(INSTRUCTIONS, tokenizer))
    assert records.unit == "record" and records.bos is None
    assert str(documents).startswith("perplexity ") and str(documents).endswith("context 16, start tokens")


def test_windows_can_be_measured_without_examples(model, tokenizer):
    examples = load_examples(STORIES, tokenizer, context=16)
    assert evaluate_lm(model, examples.windows).perplexity == evaluate_lm(model, examples).perplexity
    assert evaluate_lm(model, examples.windows).fingerprint == examples.fingerprint


def test_a_model_agrees_with_itself(model, examples):
    result = evaluate_lm(model, examples, reference=model)
    assert result.kl < 1e-6 and result.top1_agreement == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_reference_stands_in_for_the_model(model, other, examples, dtype):
    live = evaluate_lm(other, examples, reference=model)
    reference = Reference.of(model, examples, dtype=dtype)
    kept = evaluate_lm(other, examples, reference=reference)
    assert kept.compared_tokens == live.compared_tokens
    assert kept.top1_agreement == live.top1_agreement
    assert kept.kl == pytest.approx(live.kl, rel=1e-4 if dtype == torch.float16 else 1e-6)
    assert reference.result.perplexity == evaluate_lm(model, examples).perplexity


@pytest.mark.parametrize("limits", [{"max_tokens": 100}, {"max_bytes": 100 * 303 * 2}])
def test_a_reference_is_bounded_and_says_so(model, other, examples, limits):
    rows = by_definition(other, model, examples)
    reference = Reference.of(model, examples, **limits)
    result = evaluate_lm(other, examples, reference=reference)
    scored = sum(len(kept) for kept in reference.log_probs.values())
    if len(rows) <= 100:  # the few records are kept whole
        assert scored == result.compared_tokens == len(rows)
        return
    assert 85 <= scored == result.compared_tokens <= 100 < result.num_tokens
    assert f"over {scored:,} of {len(rows):,} tokens" in result.notes[-1]
    chosen = sorted(reference.log_probs)
    assert chosen != list(range(len(chosen)))  # of all the data, not its beginning
    assert chosen == sorted(Reference.of(other, examples, **limits).log_probs)
    each = examples.windows.context - 1
    expected = [rows[row * each + i][2] for row in chosen for i in range(each)]
    assert result.kl == pytest.approx(np.mean(expected), rel=1e-3)


@pytest.mark.parametrize("max_tokens", range(7, 40))
def test_a_reference_of_uneven_rows_is_bounded_too(model, tokenizer, max_tokens):
    records = [{"prompt": "Say it.", "response": "so " * (number * number % 7)} for number in range(9)]
    kept = Reference.of(model, load_examples(records, tokenizer), max_tokens=max_tokens).log_probs.values()
    assert max_tokens - 6 < sum(len(each) for each in kept) <= max_tokens  # not one row more would fit


def test_a_reference_of_other_data_or_another_vocabulary_is_refused(model, tokenizer, examples):
    with pytest.raises(UsageError, match="made on other data"):
        evaluate_lm(model, load_examples(["Else. " * 50], tokenizer), reference=Reference.of(model, examples))
    with pytest.raises(UsageError, match="less than one row; raise max_tokens=3"):
        Reference.of(model, load_examples(STORIES, tokenizer, context=16), max_tokens=3)
    bigger = copy.deepcopy(model)
    bigger.resize_token_embeddings(310)
    with pytest.raises(UsageError, match="303 and 310 tokens"):
        evaluate_lm(model, examples, reference=bigger)


def test_modes_are_restored_and_training_goes_on(model, examples):
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    evaluate_lm(model, examples, reference=model)
    assert {name: module.training for name, module in model.named_modules()} == before
    batch = next(examples.batches(4))
    model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="stop"):
        evaluate_lm(model, examples, progress=lambda done, total: (_ for _ in ()).throw(RuntimeError("stop")))
    assert {name: module.training for name, module in model.named_modules()} == before


def test_dropout_is_off(model, examples):
    model.train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    assert evaluate_lm(model, examples).perplexity == evaluate_lm(model, examples).perplexity


def test_progress_counts_rows(model, examples):
    seen = []
    evaluate_lm(model, examples, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(min(done + 4, len(examples)), len(examples)) for done in range(0, len(examples), 4)]


class Broken(torch.nn.Module):
    """A model without parameters whose logits are `value` for one token of the vocabulary."""

    def __init__(self, value, token=7):
        super().__init__()
        self.value, self.token = value, token

    def forward(self, input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, 303)
        logits[..., self.token] = self.value
        return type("Output", (), {"logits": logits})()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_are_infinitely_bad(model, examples, value):
    result = evaluate_lm(Broken(value), examples, reference=model)
    assert result.perplexity == result.kl == math.inf and result.top1_agreement == 0.0
    assert evaluate_lm(model, examples, reference=Broken(value)).kl == math.inf
    assert evaluate_lm(Broken(value), examples, reference=Broken(value)).top1_agreement == 0.0
    assert f"{result.num_tokens:,} of {result.num_tokens:,} tokens got no finite probability" in result.notes
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["value"] is None and document["kl"] is None and document["metric"] == "perplexity"


def test_a_token_ruled_out_by_both_adds_nothing(examples):
    result = evaluate_lm(Broken(-math.inf, token=0), examples, reference=Broken(-math.inf, token=0))
    assert result.kl == 0.0 and result.perplexity == pytest.approx(302)


def test_the_json_document_is_complete(model, examples):
    document = json.loads(json.dumps(evaluate_lm(model, examples, reference=model).to_json(), allow_nan=False))
    assert {"metric", "value", "interval", "nats_per_token", "num_tokens", "context", "stride", "bos"} <= set(document)
    assert len(document["interval"]) == 2


def test_what_cannot_be_measured_is_refused(model, tokenizer, tiny_bert, examples):
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    with pytest.raises(UsageError, match="perplexity needs a causal LM"):
        evaluate_lm(classifier, load_examples(["ab cd"], AutoTokenizer.from_pretrained(tiny_bert)))
    labelled = load_examples([{"text": "a", "label": 1}], tokenizer)
    with pytest.raises(UsageError, match="load it with task='lm'"):
        evaluate_lm(model, labelled)
    with pytest.raises(UsageError, match="batch_size=0"):
        evaluate_lm(model, examples, batch_size=0)


def test_rows_without_a_scored_token_are_refused(model, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.chat_template = "{{ messages[-1].content if messages[-1].role == 'assistant' else '' }}"
    examples = load_examples([{"prompt": "a", "response": "b"}], tokenizer)
    with pytest.raises(UntrustedInput, match="no token to score"):
        evaluate_lm(model, examples)


@pytest.mark.parametrize(
    ("name", "perplexity", "nats"), [("stories260k", 4.640, 1.5347), ("tinystories-llama-4m", 14.234, 2.6556)]
)
def test_the_published_perplexities(data_dir, name, perplexity, nats):
    folder = data_dir / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = load_examples(data_dir / "text/tinystories/valid.txt", tokenizer, context=256)
    result = evaluate_lm(AutoModelForCausalLM.from_pretrained(folder), examples, batch_size=8)
    assert result.perplexity == pytest.approx(perplexity, abs=5e-4)
    assert result.nats_per_token == pytest.approx(nats, abs=5e-5)
    assert result.unit == "document" and result.num_documents == 356
