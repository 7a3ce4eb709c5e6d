import pytest
from transformers import AutoTokenizer

from quantailor.data.columns import find_columns
from quantailor.data.instructions import encode_instructions, plain_layout
from quantailor.errors import UntrustedInput

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
RECORD = {"instruction": "Add.", "input": "1 and 2", "output": "It is 3."}


@pytest.fixture
def tokenizer(tiny_lm):
    return AutoTokenizer.from_pretrained(tiny_lm)


def encoded(records, tokenizer, max_length=200):
    return encode_instructions(records, find_columns(records), tokenizer, max_length=max_length, source="my.jsonl")


def learnt(row, tokenizer):
    """(the text that is only read, the text that is learnt) of a row."""
    marked = list(zip(row["input_ids"], row["labels"]))
    assert all(label in (-100, token) for token, label in marked)
    read, learnt = ([token for token, label in marked if (label == -100) == want] for want in (True, False))
    assert row["input_ids"] == read + learnt and row["attention_mask"] == [1] * len(marked)
    return tokenizer.decode(read), tokenizer.decode(learnt)


def test_only_the_response_and_the_end_token_are_learnt(tokenizer):
    prompt = "<s>### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    (row,) = encoded([RECORD], tokenizer).rows
    assert learnt(row, tokenizer) == (prompt, "It is 3.</s>")


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Say it.", "input": "", "output": "It."},
        {"instruction": "Say it.", "input": None, "output": "It."},
        {"instruction": "Say it.", "response": "It."},
        {"prompt": "Say it.", "response": "It."},
        {"prompt": "Say it.", "completion": "It."},
        {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]},
    ],
)
def test_the_forms_of_a_record_mean_the_same(tokenizer, record):
    (row,) = encoded([record], tokenizer).rows
    assert learnt(row, tokenizer) == ("<s>### Instruction:\nSay it.\n\n### Response:\n", "It.</s>")


def test_a_conversation_keeps_its_turns(tokenizer):
    messages = [
        {"role": role, "content": content}
        for role, content in [("system", "Be brief."), ("user", "A?"), ("assistant", "B."), ("user", "C?")]
    ]
    prompt = (
        "### System:\nBe brief.\n\n### Instruction:\nA?\n\n### Response:\nB.\n\n### Instruction:\nC?\n\n### Response:\n"
    )
    assert plain_layout(messages) == prompt
    (row,) = encoded([{"messages": [*messages, {"role": "assistant", "content": "D."}]}], tokenizer).rows
    assert learnt(row, tokenizer) == (f"<s>{prompt}", "D.</s>")


def test_a_chat_template_lays_out_itself(tokenizer):
    tokenizer.chat_template = CHAT
    (row,) = encoded([RECORD], tokenizer).rows
    assert learnt(row, tokenizer) == ("<s>[user]Add.\n\n1 and 2</s>[assistant]", "It is 3.</s>")


def test_a_template_that_opens_a_response_with_more_than_it_keeps(tokenizer):
    tokenizer.chat_template = CHAT.replace("[assistant]{% endif", "[assistant]<think>{% endif")
    (row,) = encoded([RECORD], tokenizer).rows
    assert learnt(row, tokenizer) == ("<s>[user]Add.\n\n1 and 2</s>", "[assistant]It is 3.</s>")


def test_a_token_across_the_border_belongs_to_the_response(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (row,) = encoded([{"prompt": "say t", "response": "he end"}], tokenizer).rows
    assert learnt(row, tokenizer) == ("say", " the end")  # " the" is one token


def test_long_records_are_cut_or_left_out_and_counted(tokenizer):
    (whole,) = encoded([RECORD], tokenizer).rows
    num_prompt = whole["labels"].count(-100)
    for max_length in range(num_prompt - 2, len(whole["input_ids"]) + 2):
        result = encoded([RECORD], tokenizer, max_length)
        if max_length <= num_prompt:
            assert (result.rows, result.num_truncated, result.num_dropped) == ([], 0, 1)
        else:
            assert result.rows == [{name: column[:max_length] for name, column in whole.items()}]
            assert (result.num_truncated, result.num_dropped) == (int(max_length < len(whole["input_ids"])), 0)


def test_without_an_end_token_an_empty_response_teaches_nothing(tokenizer):
    tokenizer.eos_token = None
    assert encoded([{"prompt": "Say it.", "response": ""}], tokenizer).num_dropped == 1


USER, ASSISTANT = {"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": "A? B."}, "'messages' must be a list"),
        ({"messages": [USER]}, "'messages' must be a list of two or more"),
        ({"messages": [USER, "B."]}, "'messages' must be a list of two or more objects"),
        ({"messages": [USER, {"role": "tool", "content": "B."}]}, "role 'tool' is unknown"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "'content' is missing"),
        ({"messages": [USER, ASSISTANT, USER]}, "the last message is the user's"),
        ({"prompt": "A?", "response": 3}, "'response' is int"),
        ({"instruction": "A?", "input": 3, "output": "B."}, "'input' is int"),
    ],
)
def test_records_that_cannot_be_laid_out_are_named(tokenizer, record, message):
    good = {
        "messages": [USER, ASSISTANT],
        "prompt": "a",
        "response": "b",
        "instruction": "a",
        "input": "",
        "output": "",
    }
    with pytest.raises(UntrustedInput, match=r"my\.jsonl: record 2: ") as caught:
        encoded([{name: good[name] for name in record}, record], tokenizer)
    assert message in str(caught.value)


def test_a_template_that_refuses_or_rewrites_is_named(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no\n  system role') }}"
    with pytest.raises(UntrustedInput, match="record 1: the chat template refuses it: no system role"):
        encoded([RECORD], tokenizer)
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1].content }}"
    with pytest.raises(UntrustedInput, match="record 1: the chat template rewrites the prompt"):
        encoded([RECORD], tokenizer)
