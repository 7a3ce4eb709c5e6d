"""The words of a report in each language: a JSON file a language, the same keys and the same {places} in each.

`languages/NAME.json` holds `words`, and `sentences`: patterns of what quantailor itself writes into receipts in English
(a pattern must match all of it), with what is shown instead. Whatever else came with the data is shown as it is.
"""

from __future__ import annotations

import json
import re
import string
from functools import cache
from pathlib import Path
from typing import Any

from quantailor.errors import UsageError
from quantailor.pages.document import Said, Text

LANGUAGES = {"en": "en", "zh": "zh-Hans"}  # ours -> as HTML names it
_FOLDER = Path(__file__).parent / "languages"
_AMOUNT = re.compile(r"[+−±]?[\d.,]+ (?:%|[kMGTP]?B|s|min|h|d|ms)")
_LONGEST = 500  # characters of a sentence that is looked at


class Words:
    """`words(text)`: a `Said` in this language; a string as it is, or translated if quantailor itself wrote it.

    Raises: UsageError for another language.
    """

    def __init__(self, language: str) -> None:
        if language not in LANGUAGES:
            raise UsageError(f"language {language!r} is none of {', '.join(LANGUAGES)}")
        self.language = language
        self.table: dict[str, str] = told(language)["words"]
        self.sentences = [(re.compile(s["english"]), s["shown"]) for s in told(language)["sentences"]]

    def __call__(self, text: Text) -> str:
        if isinstance(text, str):
            return self._known(text)
        values = {name: self(v) if isinstance(v, Said) else unbroken(str(v)) for name, v in text.values.items()}
        return self.table[text.key].format(**values)

    def _known(self, text: str) -> str:
        if len(text) > _LONGEST:
            return text
        for pattern, shown in self.sentences:
            if match := pattern.fullmatch(text):
                return match.expand(shown)
        return text


def unbroken(text: str) -> str:
    """A number keeps its unit on its line; anything else is as it was.

    >>> unbroken("9.74 %") == "9.74\\u00a0%", unbroken("a 5 %")
    (True, 'a 5 %')
    """
    return text.replace(" ", "\u00a0") if _AMOUNT.fullmatch(text) else text


@cache
def told(language: str) -> dict[str, Any]:
    """What the file of a language holds."""
    found: dict[str, Any] = json.loads((_FOLDER / f"{language}.json").read_text(encoding="utf-8"))
    return found


def places(template: str) -> set[str]:
    """The names in a template's braces.

    >>> sorted(places("{a} of {b}"))
    ['a', 'b']
    """
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}
