import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from quantailor.data.loading import load_examples
from quantailor.errors import UsageError
from quantailor.evaluate.run import evaluate, reference_for

TEXTS = [f"Story {number} is about {number * number} cats and a dog." for number in range(30)]


@pytest.fixture(params=["lm", "classification"])
def case(request, tiny_lm, tiny_bert):
    """(model, examples) of each task."""
    if request.param == "lm":
        examples = load_examples(TEXTS, AutoTokenizer.from_pretrained(tiny_lm), context=16)
        return AutoModelForCausalLM.from_pretrained(tiny_lm), examples
    records = [{"text": text, "label": number % 2} for number, text in enumerate(TEXTS)]
    examples = load_examples(records, AutoTokenizer.from_pretrained(tiny_bert), context=64)
    return AutoModelForSequenceClassification.from_pretrained(tiny_bert), examples


@pytest.mark.parametrize("limit", [None, 3, 999])
def test_the_task_chooses_the_measurement(case, limit):
    model, examples = case
    result = evaluate(model, examples, limit=limit)
    assert result.metric == {"lm": "perplexity", "classification": "accuracy"}[examples.task]
    assert result.fingerprint == examples.take(limit or 999).fingerprint
    reference = reference_for(model, examples, limit)
    assert evaluate(model, examples, reference, limit).value == result.value
    again = evaluate(model, examples, reference, limit, batch_size=2)
    assert (again.top1_agreement if examples.task == "lm" else again.agreement) == 1.0
    assert evaluate(model, examples, model, limit, batch_size=2).value == pytest.approx(result.value)


def test_a_reference_of_the_other_task_is_refused(tiny_lm, tiny_bert):
    lm = AutoModelForCausalLM.from_pretrained(tiny_lm)
    text = load_examples(TEXTS, AutoTokenizer.from_pretrained(tiny_lm), context=16)
    bert = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    rows = load_examples([{"text": "a", "label": 1}], AutoTokenizer.from_pretrained(tiny_bert))
    with pytest.raises(UsageError, match="of a classifier"):
        evaluate(lm, text, reference_for(bert, rows))
    with pytest.raises(UsageError, match="of a language model"):
        evaluate(bert, rows, reference_for(lm, text))


def test_importing_is_lean():
    imports = "import sys, quantailor.data.loading, quantailor.evaluate.run"
    code = f"{imports}; print({{'transformers', 'datasets'}} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
