import copy
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from quantailor.data.loading import load_examples
from quantailor.errors import UsageError
from quantailor.evaluate import bootstrap, metrics
from quantailor.evaluate.classification import evaluate_classification

PAIRS = [
    {"sentence1": "a" * (number % 7 + 1), "sentence2": "good"[: number % 4 + 1], "label": number % 2}
    for number in range(41)
]


@pytest.fixture
def model(tiny_bert):
    return AutoModelForSequenceClassification.from_pretrained(tiny_bert)


@pytest.fixture
def other(model):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return changed


@pytest.fixture
def examples(tiny_bert):
    return load_examples(PAIRS, AutoTokenizer.from_pretrained(tiny_bert))


@torch.no_grad()
def log_probs_by_definition(model, examples):
    """float64 [rows, classes], one row at a time, without padding."""
    model = copy.deepcopy(model).double().eval()
    rows = [{n: torch.tensor([v]) for n, v in row.items() if n != "labels"} for row in examples.dataset.rows]
    return torch.cat([model(**row).logits for row in rows]).log_softmax(-1).numpy()


@pytest.mark.parametrize("batch_size", [1, 8, 1000])
def test_every_figure_matches_its_definition(model, other, examples, batch_size):
    ours, theirs = (log_probs_by_definition(m, examples) for m in (other, model))
    labels = np.array([row["label"] for row in PAIRS])
    predictions = ours.argmax(1)
    assert 0 < predictions.mean() < 1  # both classes occur, or the test shows little
    result = evaluate_classification(other, examples, batch_size=batch_size, reference=model)
    assert result.predictions.tolist() == predictions.tolist() and result.labels.tolist() == labels.tolist()
    assert result.accuracy == result.value == np.mean(predictions == labels)
    assert result.f1 == metrics.f1(predictions, labels, 2)
    assert result.matthews == metrics.matthews(predictions, labels)
    assert result.mean_loss == pytest.approx(-ours[np.arange(41), labels].mean(), rel=1e-4)
    assert result.agreement == np.mean(predictions == theirs.argmax(1))
    assert result.kl == pytest.approx((np.exp(theirs) * (theirs - ours)).sum(1).mean(), rel=1e-3, abs=1e-7)
    assert result.interval == bootstrap.interval(predictions == labels, np.ones(41), bootstrap.mean)
    assert result.higher_is_better and result.metric == "accuracy" and result.num_rows == 41
    np.testing.assert_allclose(result.log_probs.numpy(), ours, atol=1e-4)


def test_a_result_stands_in_for_the_reference_model(model, other, examples):
    live = evaluate_classification(other, examples, reference=model)
    kept = evaluate_classification(other, examples, reference=evaluate_classification(model, examples))
    assert (kept.agreement, kept.kl) == (live.agreement, live.kl)
    with pytest.raises(UsageError, match="measured on other data"):
        evaluate_classification(other, examples.take(5), reference=live)


def test_modes_are_restored_and_progress_counts_rows(model, examples):
    model.train()
    model.bert.encoder.eval()
    before = {name: module.training for name, module in model.named_modules()}
    seen = []
    twice = [
        evaluate_classification(model, examples, batch_size=16, progress=lambda done, total: seen.append((done, total)))
        for _ in range(2)
    ]
    assert twice[0].mean_loss == twice[1].mean_loss  # no dropout
    assert seen[:3] == [(16, 41), (32, 41), (41, 41)]
    assert {name: module.training for name, module in model.named_modules()} == before


def test_broken_logits_are_wrong_and_counted(model, examples):
    with torch.no_grad():
        model.classifier.bias[0] = math.nan
    result = evaluate_classification(model, examples, reference=model)
    assert result.accuracy == 0.0 and set(result.predictions.tolist()) == {-1} and result.mean_loss == math.inf
    assert result.kl == math.inf and result.agreement == 0.0
    assert "41 of 41 rows got logits that are not finite" in result.notes
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["value"] == 0.0 and document["mean_loss"] is None


def test_the_json_document_is_complete(model, examples):
    document = json.loads(json.dumps(evaluate_classification(model, examples).to_json(), allow_nan=False))
    assert document["metric"] == "accuracy" and len(document["interval"]) == 2
    assert {"value", "f1", "matthews", "mean_loss", "num_rows", "agreement", "fingerprint"} <= set(document)


def test_a_model_with_too_few_classes_or_no_classes_is_refused(model, examples, tiny_bert, tiny_lm):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    three = load_examples([{"text": "a", "label": 2}, {"text": "b", "label": 0}], tokenizer)
    with pytest.raises(UsageError, match="the model has 2 classes, the data has 3"):
        evaluate_classification(model, three)
    with pytest.raises(UsageError, match="load a classifier"):
        evaluate_classification(model.bert, examples)
    with pytest.raises(UsageError, match="load it with task='classification'"):
        evaluate_classification(model, load_examples(["text"], AutoTokenizer.from_pretrained(tiny_lm)))
    with pytest.raises(UsageError, match="batch_size=0"):
        evaluate_classification(model, examples, batch_size=0)
