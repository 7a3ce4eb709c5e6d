import copy
import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from quantailor.data.loading import load_examples
from quantailor.errors import UsageError
from quantailor.evaluate.classification import evaluate_classification
from quantailor.evaluate.lm import LMResult, evaluate_lm
from quantailor.evaluate.result import Result, difference, jsonable

STORIES = [f"Story {number} is about {number * number} cats and a dog." for number in range(30)]


def test_a_difference_is_paired(tiny_lm):
    examples = load_examples(STORIES, AutoTokenizer.from_pretrained(tiny_lm), context=16)
    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.02)
    before: Result = evaluate_lm(model, examples)
    after: Result = evaluate_lm(other, examples)
    change, (low, high) = difference(before, after)
    assert change == pytest.approx(after.value - before.value)
    assert low < change < high
    assert high - low < (before.interval[1] - before.interval[0]) / 5
    assert difference(before, before) == (0.0, (0.0, 0.0))
    with pytest.raises(UsageError, match="are no pair"):
        difference(before, evaluate_lm(model, examples.take(3)))


def test_other_metrics_are_no_pair(tiny_lm):
    @dataclasses.dataclass(frozen=True, eq=False)
    class Renamed(LMResult):
        metric = "nats_per_token"

    examples = load_examples(STORIES, AutoTokenizer.from_pretrained(tiny_lm), context=16)
    result = evaluate_lm(AutoModelForCausalLM.from_pretrained(tiny_lm), examples)
    renamed = Renamed(**{field.name: getattr(result, field.name) for field in dataclasses.fields(result)})
    with pytest.raises(UsageError, match=r"perplexity on data .{8} and nats_per_token on .{8} are no pair"):
        difference(result, renamed)


def test_a_difference_of_accuracies(tiny_bert, tiny_lm):
    records = [{"text": text, "label": number % 2} for number, text in enumerate(STORIES)]
    examples = load_examples(records, AutoTokenizer.from_pretrained(tiny_bert), context=64)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    before = evaluate_classification(model, examples)
    with torch.no_grad():
        model.classifier.bias[:] = torch.tensor([9.0, 0.0]) if before.predictions[0] else torch.tensor([0.0, 9.0])
    change, (low, high) = difference(before, evaluate_classification(model, examples))
    assert change == evaluate_classification(model, examples).accuracy - before.accuracy
    assert low <= change <= high and low < high
    text = load_examples(STORIES, AutoTokenizer.from_pretrained(tiny_lm))
    with pytest.raises(UsageError, match="are no pair"):
        difference(before, evaluate_lm(AutoModelForCausalLM.from_pretrained(tiny_lm), text))


def test_json_knows_no_infinity():
    assert jsonable({"a": (1.5, math.nan), "b": [math.inf, {"c": "x"}], "d": None}) == {
        "a": [1.5, None],
        "b": [None, {"c": "x"}],
        "d": None,
    }
