"""Questions about a text, in SQuAD's JSON form (1.1), as windows that a model for extractive answers reads.

A text longer than a window is read in several that overlap by `stride` tokens; each has the whole question. What an
answer may be taken from are the tokens of the text, known by their place in it (characters).
Sources: Rajpurkar et al. 2016, arXiv:1606.05250; windows as in Devlin et al. 2019, arXiv:1810.04805, section 4.2.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantailor.data.batching import PadCollator, RecordDataset
from quantailor.data.columns import checked_string
from quantailor.data.encode import padding_token
from quantailor.data.examples import Examples
from quantailor.errors import UntrustedInput, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_QUESTION = 64  # tokens, as in BERT's own preparation
MAX_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Question:
    """What is asked of `context`, and the texts that count as right."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Window:
    """One row of tokens: which question it is of (its index), and for each token its characters in the text, or None
    where it is none of the text's."""

    question: int
    places: tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True, eq=False)
class QAExamples(Examples):
    """`questions`, and the `windows` that the rows of `dataset` are of, in that order."""

    questions: tuple[Question, ...] = ()
    windows_of: tuple[Window, ...] = ()

    def take(self, limit: int) -> QAExamples:
        """The first `limit` questions. Raises: UsageError for a `limit` below 1."""
        if limit < 1:
            raise UsageError(f"limit={limit} leaves no questions; use 1 or more, or None for all")
        kept = [index for index, window in enumerate(self.windows_of) if window.question < limit]
        assert isinstance(self.dataset, RecordDataset)
        return dataclasses.replace(
            self,
            dataset=RecordDataset([self.dataset.rows[index] for index in kept]),
            questions=self.questions[:limit],
            windows_of=tuple(self.windows_of[index] for index in kept),
        )


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a file in SQuAD's form. Raises: UntrustedInput naming what is wrong with it."""
    if not path.is_file():
        raise UntrustedInput(f"{path} is no file; name a .json in SQuAD's form")
    if path.stat().st_size > MAX_BYTES:
        raise UntrustedInput(f"{path} is over {MAX_BYTES:,} bytes; cut it up")
    try:
        document = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UntrustedInput(f"{path} is no readable JSON: {error}; mend it") from None
    questions: list[Question] = []
    for number, article in enumerate(_list(document, "data", path, "the document"), 1):
        for place, paragraph in enumerate(_list(article, "paragraphs", path, f"article {number}"), 1):
            where = f"article {number}, paragraph {place}"
            for asked in _list(paragraph, "qas", path, where):
                questions.append(_question(asked, paragraph.get("context"), len(questions) + 1, path))
                if limit is not None and len(questions) >= limit:
                    return questions
    if not questions:
        raise UntrustedInput(f"{path} holds no question; it needs data / paragraphs / qas, as SQuAD has them")
    return questions


def _list(value: Any, key: str, path: Path, where: str) -> list[Any]:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise UntrustedInput(f"{path}: {where} has no list {key!r}; it must be in SQuAD's form")
    return found


def _question(asked: Any, context: Any, number: int, path: Path) -> Question:
    if not isinstance(asked, dict):
        raise UntrustedInput(f"{path}: question {number} is no object; mend it")
    text = checked_string(asked.get("question"), "question", number, str(path))
    context = checked_string(context, "context", number, str(path))
    answers = tuple(
        checked_string(answer.get("text") if isinstance(answer, dict) else None, "text", number, str(path))
        for answer in _list(asked, "answers", path, f"question {number}")
    )
    if not answers:
        raise UntrustedInput(
            f"{path}: question {number} has no answer; SQuAD 2.0's unanswerable questions are not scored: remove them"
        )
    return Question(str(asked.get("id", number)), text, context, answers)


def load_questions(
    data: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int = 384,
    stride: int = 128,
    limit: int | None = None,
) -> QAExamples:
    """Read and cut: windows of at most `context` tokens, neighbours of a text sharing `stride` of its tokens, or
    half of a window where that is less.

    Raises: UntrustedInput for a file that cannot be used; UsageError for a tokenizer that does not say where its tokens
    lie, or a `context` that leaves no room behind the question.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit} leaves no questions; use 1 or more, or None for all")
    if not tokenizer.is_fast:
        raise UsageError("this tokenizer does not tell where its tokens lie in a text; use one with a tokenizer.json")
    questions = read_questions(Path(data), limit)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    rows: list[dict[str, Any]] = []
    windows: list[Window] = []
    num_cut = 0
    for index, asked in enumerate(questions):
        text, was_cut = _cut(asked.question, tokenizer, min(MAX_QUESTION, (context - special) // 2))
        num_cut += was_cut
        room = context - special - len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if room < 2:
            raise UsageError(f"context={context} leaves no room for a text behind the question; raise it")
        encoded = tokenizer(
            text,
            asked.context,
            truncation="only_second",
            max_length=context,
            stride=min(stride, room // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for number in range(len(encoded["input_ids"])):
            names = [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in encoded]
            rows.append({**{name: encoded[name][number] for name in names}, "labels": index})
            of_text = (side == 1 for side in encoded.sequence_ids(number))
            places = zip(of_text, encoded["offset_mapping"][number])
            windows.append(Window(index, tuple((int(a), int(b)) if inside else None for inside, (a, b) in places)))
    pad_token_id, note = padding_token(tokenizer)
    notes = [note] if note else []
    notes += [f"{num_cut} question(s) cut to {MAX_QUESTION} tokens"] if num_cut else []
    return QAExamples(
        task="qa",
        dataset=RecordDataset(rows),
        collator=PadCollator(pad_token_id),
        source=str(data),
        notes=tuple(notes),
        questions=tuple(questions),
        windows_of=tuple(windows),
    )


def _cut(question: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[str, bool]:
    """The question less the spaces before it, at most `limit` tokens of it; and whether something was cut."""
    text = question.lstrip()
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return (text, False) if len(places) <= limit else (text[: places[limit - 1][1]], True)
