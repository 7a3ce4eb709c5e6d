import itertools
import json

import pytest
from transformers import AutoTokenizer

from quantailor.data.squad import load_questions, read_questions
from quantailor.errors import UntrustedInput, UsageError

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on while the fox runs far away to its den."


def document(**changes):
    asked = {"id": "q1", "question": "who jumps?", "answers": [{"text": "fox", "answer_start": 16}], **changes}
    paragraph = {"context": TEXT, "qas": [asked, {**asked, "id": "q2", "question": "who sleeps?"}]}
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]}


@pytest.fixture
def written(tmp_path):
    def write(value):
        (tmp_path / "dev.json").write_text(value if isinstance(value, str) else json.dumps(value))
        return tmp_path / "dev.json"

    return write


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.mark.parametrize(("context", "stride"), [(40, 8), (40, 25), (64, 0), (64, 128), (256, 8)])
def test_windows_hold_the_whole_text_and_know_its_characters(written, tokenizer, context, stride):
    examples = load_questions(written(document()), tokenizer, context=context, stride=stride)
    assert [q.id for q in examples.questions] == ["q1", "q2"] and examples.task == "qa"
    for index, question in enumerate(examples.questions):
        rows = [(r, w) for r, w in zip(examples.dataset.rows, examples.windows_of) if w.question == index]
        covered = set()
        for row, window in rows:
            assert len(row["input_ids"]) == len(window.places) == len(row["token_type_ids"]) <= context
            decoded = tokenizer.convert_ids_to_tokens(row["input_ids"])
            asked = tokenizer.tokenize(question.question)
            assert decoded[1 : 1 + len(asked)] == asked, "each window has the whole question"
            for token, place in zip(decoded, window.places):
                if place is not None:
                    assert TEXT[place[0] : place[1]] == token.removeprefix("##")
                    covered |= set(range(*place))
        assert covered == {i for i, c in enumerate(TEXT) if c != " "}
        places = [[p for p in w.places if p] for _, w in rows]
        room = context - 3 - len(tokenizer.tokenize(question.question))
        for before, after in itertools.pairwise(places):  # neighbours share `stride` tokens, or half
            assert len({*before} & {*after}) == min(stride, room // 2)
        assert (len(rows) == 1) == (context == 256)


def test_a_limit_counts_questions(written, tokenizer):
    whole = load_questions(written(document()), tokenizer, context=40, stride=8)
    one = load_questions(written(document()), tokenizer, context=40, stride=8, limit=1)
    assert whole.take(1).fingerprint == one.fingerprint != whole.fingerprint
    assert whole.take(1).questions == one.questions and whole.take(5).fingerprint == whole.fingerprint
    for limit in (0, -1):
        with pytest.raises(UsageError, match="leaves no questions"):
            whole.take(limit)


def test_a_long_question_is_cut(written, tokenizer):
    examples = load_questions(written(document(question="  why " * 60)), tokenizer, context=200)
    assert "1 question(s) cut to 64 tokens" in examples.notes
    first = examples.dataset.rows[0]["input_ids"]
    assert first.index(tokenizer.sep_token_id) == 65


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("{", "no readable JSON"),
        ([], "no list 'data'"),
        ({"data": [3]}, "article 1 has no list 'paragraphs'"),
        ({"data": [{"paragraphs": [{}]}]}, "article 1, paragraph 1 has no list 'qas'"),
        ({"data": []}, "holds no question"),
        ({"data": [{"paragraphs": [{"qas": ["x"]}]}]}, "question 1 is no object"),
        ({"data": [{"paragraphs": [{"qas": [{"question": "x", "answers": []}]}]}]}, "'context' is missing"),
        (document(question=3), "'question' is int"),
        (document(answers=[]), "SQuAD 2.0"),
        (document(answers=[{"text": None}]), "'text' is missing"),
        (document(answers=["x"]), "'text' is missing"),
    ],
)
def test_a_file_of_another_form_is_refused(written, value, told):
    with pytest.raises(UntrustedInput, match=told):
        read_questions(written(value))


def test_xquad_is_read(data_dir):
    for language in ("en", "zh"):
        questions = read_questions(data_dir / "tasks" / f"xquad_{language}" / "dev.json")
        assert len(questions) == 826 and all(q.answers[0] in q.context for q in questions)
