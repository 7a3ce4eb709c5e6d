"""Instruction records as token rows of which only the response is learnt and scored.

A tokenizer with a chat template lays a conversation out itself; without one it becomes

    ### Instruction:
    ...

    ### Input:
    ...

    ### Response:
    ...

with the sections of Alpaca (Taori et al. 2023), behind the start token and closed by the end token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from quantailor.data.columns import MESSAGES, Columns, checked_string, strings
from quantailor.data.encode import IGNORED, Encoded, encode, end_token, start_token
from quantailor.errors import UntrustedInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
HEADINGS = {"system": "### System:", "user": "### Instruction:", "assistant": "### Response:"}


def encode_instructions(
    records: Sequence[dict[str, Any]],
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    source: str = "the data",
) -> Encoded:
    """Rows of at most `max_length` tokens: prompt and response, the labels of the prompt being -100.

    A record whose prompt alone fills `max_length` leaves nothing to learn: it is dropped and counted. Of a conversation
    the last message, which must be the assistant's, is the response.
    Raises: UntrustedInput naming the record that cannot be laid out.
    """
    pairs = list(_laid_out(records, columns, tokenizer, source))
    opening, closing = ([], []) if tokenizer.chat_template else (start_token(tokenizer), end_token(tokenizer))
    prompts = encode((prompt for prompt, _ in pairs), tokenizer)
    wholes = encode((prompt + response for prompt, response in pairs), tokenizer)
    rows = []
    num_truncated = num_dropped = 0
    for prompt_ids, whole_ids in zip(prompts, wholes):
        ids = opening + whole_ids + closing
        num_prompt = len(opening) + _common_prefix(prompt_ids, whole_ids)
        if num_prompt >= min(len(ids), max_length):
            num_dropped += 1
            continue
        num_truncated += len(ids) > max_length
        ids = ids[:max_length]
        labels = [IGNORED] * num_prompt + ids[num_prompt:]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return Encoded(rows, num_truncated=num_truncated, num_dropped=num_dropped)


def plain_layout(messages: Sequence[Message]) -> str:
    """The text of a conversation for a tokenizer without a chat template, up to where the next response begins.

    >>> plain_layout([{"role": "user", "content": "Add.", "input": "1 and 2"}])
    '### Instruction:\\nAdd.\\n\\n### Input:\\n1 and 2\\n\\n### Response:\\n'
    """
    sections = []
    for message in messages:
        sections.append(f"{HEADINGS[message['role']]}\n{message['content']}\n\n")
        if message.get("input"):
            sections.append(f"### Input:\n{message['input']}\n\n")
    return "".join(sections) + HEADINGS["assistant"] + "\n"


def _common_prefix(prompt_ids: list[int], whole_ids: list[int]) -> int:
    """How many tokens the prompt has in both: a token that spans prompt and response belongs to the response."""
    for index, (a, b) in enumerate(zip(prompt_ids, whole_ids)):
        if a != b:
            return index
    return min(len(prompt_ids), len(whole_ids))


def _laid_out(
    records: Sequence[dict[str, Any]], columns: Columns, tokenizer: PreTrainedTokenizerBase, source: str
) -> Iterator[tuple[str, str]]:
    """(prompt, response) texts of each record."""
    for number, messages in enumerate(_conversations(records, columns, source), 1):
        if not tokenizer.chat_template:
            yield plain_layout(messages[:-1]), messages[-1]["content"]
            continue
        chat = [{"role": m["role"], "content": _content(m)} for m in messages]
        try:
            whole = str(tokenizer.apply_chat_template(chat, tokenize=False))
            prompt = str(tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True))
            if not whole.startswith(prompt):  # some open a response with more than a finished one keeps
                prompt = str(tokenizer.apply_chat_template(chat[:-1], tokenize=False))
        except Exception as error:  # the template is a program of the model's author and may raise anything
            reason = " ".join(str(error).split())[:200]
            raise UntrustedInput(f"{source}: record {number}: the chat template refuses it: {reason}") from error
        if not whole.startswith(prompt):
            raise UntrustedInput(
                f"{source}: record {number}: the chat template rewrites the prompt once a response follows, "
                "so the two cannot be told apart; use a tokenizer without a chat template"
            )
        yield prompt, whole[len(prompt) :]


def _content(message: Message) -> str:
    return "\n\n".join(filter(None, (message["content"], message.get("input"))))


def _conversations(records: Sequence[dict[str, Any]], columns: Columns, source: str) -> Iterator[list[Message]]:
    if columns.target is None:
        for number, record in enumerate(records, 1):
            yield _checked_messages(record.get(MESSAGES), number, source)
        return
    prompts = strings(records, columns.inputs[0], source=source)
    responses = strings(records, columns.target, source=source)
    for number, (record, prompt, response) in enumerate(zip(records, prompts, responses), 1):
        extra = [record.get(name) for name in columns.inputs[1:]]
        inputs = [checked_string(value, columns.inputs[1], number, source) for value in extra if value is not None]
        yield [
            {"role": "user", "content": prompt, "input": "".join(inputs)},
            {"role": "assistant", "content": response},
        ]


def _checked_messages(messages: Any, number: int, source: str) -> list[Message]:
    where = f"{source}: record {number}"
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(m, dict) for m in messages):
        raise UntrustedInput(f"{where}: 'messages' must be a list of two or more objects with role and content")
    checked = []
    for message in messages:
        if message.get("role") not in HEADINGS:
            raise UntrustedInput(f"{where}: role {message.get('role')!r} is unknown; use {', '.join(HEADINGS)}")
        checked.append(
            {"role": message["role"], "content": checked_string(message.get("content"), "content", number, source)}
        )
    if checked[-1]["role"] != "assistant":
        raise UntrustedInput(f"{where}: the last message is the {checked[-1]['role']}'s; end with the assistant's")
    return checked
