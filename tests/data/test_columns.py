import pytest

from quantailor.data.columns import Columns, find_columns, strings
from quantailor.errors import UntrustedInput, UsageError

PLAIN = Columns("text", ("text",))
CASES = [  # columns, what they are without a task, as lm, as classification (None: refused)
    ("text", PLAIN, PLAIN, None),
    ("text label", Columns("classification", ("text",), "label"), PLAIN, Columns("classification", ("text",), "label")),
    ("sentence label", Columns("classification", ("sentence",), "label"), None, ...),
    ("idx sentence1 sentence2 label", Columns("classification", ("sentence1", "sentence2"), "label"), None, ...),
    ("question sentence label", Columns("classification", ("question", "sentence"), "label"), None, ...),
    ("premise hypothesis label", Columns("classification", ("premise", "hypothesis"), "label"), None, ...),
    ("question1 question2 label", Columns("classification", ("question1", "question2"), "label"), None, ...),
    ("instruction input output", Columns("instruction", ("instruction", "input"), "output"), ..., None),
    ("instruction output text", Columns("instruction", ("instruction",), "output"), ..., None),
    ("instruction context response", Columns("instruction", ("instruction", "context"), "response"), ..., None),
    ("prompt response", Columns("instruction", ("prompt",), "response"), ..., None),
    ("prompt completion", Columns("instruction", ("prompt",), "completion"), ..., None),
    ("messages", Columns("instruction", ("messages",)), ..., None),
    ("sentence1 sentence2 score", None, None, None),
    ("label", None, None, None),
]


@pytest.mark.parametrize(("names", "free", "lm", "classification"), CASES)
def test_columns_are_told_from_their_names(names, free, lm, classification):
    record = dict.fromkeys(names.split(), "x")
    for task, expected in ((None, free), ("lm", lm), ("classification", classification)):
        if expected is None:
            with pytest.raises(UntrustedInput) as caught:
                find_columns([record], task, source="my.jsonl")
            message = str(caught.value)
            assert message.startswith("my.jsonl has ") and "\n" not in message
            assert all(repr(name) in message for name in record)
        else:
            assert find_columns([record], task) == (free if expected is ... else expected)


def test_the_message_names_what_is_needed():
    with pytest.raises(UntrustedInput, match="task 'classification' needs label, and text, sentence"):
        find_columns([{"text": "a", "score": 1.0}], "classification")
    with pytest.raises(UsageError, match="task='qa' is unknown"):
        find_columns([{"text": "a"}], "qa")


def test_strings_names_the_record_that_is_wrong():
    assert strings([{"text": "a"}, {"text": ""}], "text") == ["a", ""]
    for value, message in ((None, "record 2: 'text' is missing"), (3, "'text' is int, not a string")):
        with pytest.raises(UntrustedInput, match=message):
            strings([{"text": "a"}, {"text": value}], "text", source="f")
    with pytest.raises(UntrustedInput, match="no valid Unicode at character 2"):
        strings([{"text": "a\ud800"}], "text")
    with pytest.raises(UntrustedInput, match="record 1: 'text' is missing"):
        strings([{"other": "a"}], "text")
