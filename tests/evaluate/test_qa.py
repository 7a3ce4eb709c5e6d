import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

from quantailor import api
from quantailor.data.squad import load_questions
from quantailor.errors import UsageError
from quantailor.evaluate.qa import best_span, evaluate_qa
from tests.cli.shell import shell


def span_by_definition(start, end, inside, longest):
    best = (-math.inf, 0, 0)
    for i in range(len(start)):
        for j in range(i, min(i + longest, len(start))):
            if inside[i] and inside[j] and float(start[i] + end[j]) > best[0]:
                best = (float(start[i] + end[j]), i, j)
    return best


@pytest.mark.parametrize("seed", range(20))
def test_the_best_span_is_the_best_of_all(seed):
    torch.manual_seed(seed)
    length = int(torch.randint(1, 50, ()))
    start, end, inside = torch.randn(length), torch.randn(length), torch.rand(length) < 0.7
    start[torch.rand(length) < 0.05] = math.nan
    sound = inside & start.isfinite()
    for longest in (1, 7, 30):
        found, expected = best_span(start, end, inside, longest), span_by_definition(start, end, inside, longest)
        if not sound.any():
            assert found[0] == -math.inf
        elif math.isfinite(expected[0]):
            assert found == expected or found[0] == pytest.approx(expected[0])


class Pointing(nn.Module):
    """Points at the token of the text that begins at the character `at`, wherever the window shows it."""

    def __init__(self, examples, at):
        super().__init__()
        self.examples, self.at, self.row = examples, at, 0
        self.p = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, **_):
        logits = torch.zeros(input_ids.shape)
        for line, ids in zip(logits, input_ids.tolist()):
            for row, window in zip(self.examples.dataset.rows, self.examples.windows_of):
                if row["input_ids"] == ids[: len(row["input_ids"])]:
                    line[: len(window.places)] = torch.tensor(
                        [5.0 * bool(p and p[0] == self.at) for p in window.places]
                    )
        return SimpleNamespace(start_logits=logits, end_logits=logits)


@pytest.fixture
def file(tmp_path):
    text = "one two six. " * 12
    at = len("one two six. ") * 9 + 8  # in the last windows only
    asked = [{"id": "a", "question": "which?", "answers": [{"text": "six", "answer_start": at}, {"text": "nine"}]}]
    asked += [{"id": "b", "question": "what?", "answers": [{"text": "seven", "answer_start": 0}]}]
    path = tmp_path / "dev.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": text, "qas": asked}]}]}))
    return path, at


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_come_from_whichever_window_shows_them(file, tiny_bert, batch_size):
    path, at = file
    examples = load_questions(path, AutoTokenizer.from_pretrained(tiny_bert), context=40, stride=10)
    assert len(examples) > 6
    result = evaluate_qa(Pointing(examples, at), examples, batch_size=batch_size)
    assert result.answers == ("s", "s")  # one token, which in this vocabulary is one letter
    assert (result.f1, result.exact_match, result.num_questions) == (0.0, 0.0, 2)
    assert evaluate_qa(Pointing(examples, at), examples, reference=result).agreement == 1.0


def test_a_model_without_spans_or_a_reference_of_other_questions_is_refused(file, tiny_bert):
    path, at = file
    examples = load_questions(path, AutoTokenizer.from_pretrained(tiny_bert), context=40, stride=10)
    result = evaluate_qa(Pointing(examples, at), examples)
    with pytest.raises(UsageError, match="other data"):
        evaluate_qa(Pointing(examples, at), examples.take(1), reference=result)
    with pytest.raises(UsageError, match="no start and end logits"):
        evaluate_qa(api.load(tiny_bert).model, examples)


@pytest.fixture(scope="module")
def answerer(tiny_bert, tmp_path_factory):
    """A BERT for answers with random weights."""
    folder = tmp_path_factory.mktemp("answerer")
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(tiny_bert)
    BertForQuestionAnswering(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w3a16-asym"])
def test_a_model_for_answers_is_quantized_saved_checked_and_measured(answerer, tmp_path, file, scheme):
    quantized = api.quantize(answerer, scheme, method="rtn")
    api.save(quantized, tmp_path / "out")
    assert api.check(tmp_path / "out").equal
    ran = shell("eval", tmp_path / "out", "--data", file[0], "--task", "qa", "--reference", answerer, "--json")
    assert ran.status == 0, ran.err
    told = ran.document
    assert told["metric"] == "f1" and told["num_questions"] == 2 and 0 <= told["agreement"] <= 1
    assert told["value"] == api.evaluate(tmp_path / "out", file[0]).value


def test_calibration_takes_questions_too(answerer, file):
    assert api.quantize(answerer, "w4a16-g16", method="gptq", data=file[0], samples=4).state is not None


def test_training_on_questions_is_refused(answerer, file):
    for verb in (
        lambda: api.train(answerer, file[0], scheme="w8a16"),
        lambda: api.sensitivity(answerer, file[0]),
        lambda: api.fit(answerer, file[0], "w8a16", answerer.parent / "never"),
    ):
        with pytest.raises(UsageError, match="can be quantized, evaluated, checked and exported"):
            verb()


def test_xquad_runs_through_a_real_tokenizer(minilm, data_dir, tmp_path):
    """Random weights: no answer is right but by chance; what is tested is the way, windows and all."""
    config = BertConfig.from_pretrained(minilm, num_hidden_layers=1)
    torch.manual_seed(0)
    BertForQuestionAnswering(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path)
    for language in ("en", "zh"):
        data = data_dir / "tasks" / f"xquad_{language}" / "dev.json"
        result = api.evaluate(tmp_path, data, limit=12, context=128)
        texts = [q.context for q in load_questions(data, AutoTokenizer.from_pretrained(minilm), limit=12).questions]
        assert result.num_windows > 12 and all(a and a in t for a, t in zip(result.answers, texts))
