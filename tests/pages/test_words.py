"""Every language says the same things, with the same places for figures, and nothing that no page says."""

import re
from pathlib import Path

import pytest

import quantailor.pages
from quantailor.errors import UsageError
from quantailor.pages.document import say
from quantailor.pages.words import LANGUAGES, Words, places, told

FOLDER = Path(quantailor.pages.__file__).parent
ENGLISH, CHINESE = told("en")["words"], told("zh")["words"]
# Keys that are put together while a page is made: what stands before the brace.
PUT_TOGETHER = re.compile(r'say\(\s*f"([a-z_]+\.)\{|\bt\("([a-z_]+\.)" ~')


def sources():
    files = [*FOLDER.glob("*.py"), *FOLDER.glob("templates/*.j2"), FOLDER.parent / "verbs" / "reporting.py"]
    return "\n".join(p.read_text() for p in [*files, FOLDER.parent / "verbs" / "distributions.py"])


def test_the_languages_have_the_same_keys_and_places():
    assert list(ENGLISH) == list(CHINESE)
    for key, text in ENGLISH.items():
        assert places(text) == places(CHINESE[key]), key
        assert text.strip() and CHINESE[key].strip(), key


def test_every_key_that_is_said_is_there_and_every_key_is_said():
    text = sources()
    said = set(re.findall(r'(?:say|\bt)\(\s*"([a-z0-9_]+(?:\.[a-z0-9_]+)?)"', text))
    said |= {f"section.{id}" for id in re.findall(r'section\(\s*"([a-z]+)"', text)}
    loose = set(re.findall(r'"([a-z_]+\.[a-z0-9_]+)"', text))  # keys kept in tuples and conditions
    beginnings = {a or b for a, b in PUT_TOGETHER.findall(text)}
    assert said <= set(ENGLISH), said - set(ENGLISH)
    unused = {k for k in ENGLISH if k not in said | loose and not k.startswith(tuple(beginnings))}
    assert unused == set()


def test_chinese_is_chinese():
    foreign = {k for k, v in CHINESE.items() if not re.search(r"[\u4e00-\u9fff]", v)}
    assert foreign == {"page.title"}


def test_values_are_never_read_as_templates():
    hostile = "{0} {key} {a.__class__} %s"
    for language in LANGUAGES:
        assert hostile in Words(language)(say("score.nats", value=hostile))
        assert Words(language)(hostile) == hostile


def test_nested_words_are_said_in_the_same_language():
    nested = say("recovery.control", text=say("recovery", share="40 %"), share="30 %")
    shown = Words("zh")(nested)
    assert "40\u00a0%" in shown and "训练挽回" in shown, "a number and its unit stay on one line"


def test_sentences_of_receipts_are_translated_and_others_are_left():
    chinese = Words("zh")
    assert chinese("in a repeated block") == "位于重复块中"
    assert chinese("rtn lost 3.10%, over 2.00%") == "rtn 损失 3.10%，超过 2.00%"
    assert chinese("gptq lost 3.10%, over 2.00%: 40 steps of QAT from there").endswith("40 步 QAT")
    assert chinese("a sentence of somebody else's") == "a sentence of somebody else's"
    assert Words("en")("in a repeated block") == "in a repeated block"


def test_an_unknown_language_is_named():
    with pytest.raises(UsageError, match="language 'de' is none of en, zh"):
        Words("de")
