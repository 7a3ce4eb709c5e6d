"""A report as one HTML file: nothing is fetched, nothing is sent, and nothing that came with the data is markup.

The templates escape whatever they print, after `visible` has replaced what could reorder or hide text. The page's own
policy allows no network at all, and exactly one script and one style sheet, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from quantailor.errors import QuantailorError
from quantailor.pages import charts
from quantailor.pages.document import Block, Document, Heat, Sample, Text
from quantailor.pages.heat import heat_levels, heat_scale
from quantailor.pages.words import LANGUAGES, Words

MAX_BYTES = 500_000
GENERATOR = "quantailor report"
_TEMPLATES = Path(__file__).parent / "templates"
_LONGEST = 2000  # characters of one text; rows are cut further where a page gets too large
_DRAW = {
    "lines": charts.lines,
    "intervals": charts.intervals,
    "pareto": charts.pareto,
    "histogram": charts.histogram,
}
# Controls, what reorders or joins text without being seen, lone surrogates, and what is no character at all.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ud800-\udfff\ufdd0-\ufdef\ufeff\ufff0-\ufffb\ufffe\uffff\U000e0000-\U000e0fff]"
)


def page(document: Document, language: str = "en") -> str:
    """The whole file. Raises: UsageError for an unknown language; QuantailorError if it cannot be kept under 500 kB."""
    for rows, characters in ((400, _LONGEST), (120, 400), (40, 160), (12, 60)):
        text = _page(document, Words(language), rows, characters)
        if len(text.encode("utf-8")) < MAX_BYTES:
            return text
    raise QuantailorError(
        f"the report of {visible(document.subject, 80)} has {len(text.encode('utf-8')):,} bytes, and {MAX_BYTES:,} is "
        "the most; this is a bug"
    )


def _page(document: Document, words: Words, rows: int, characters: int) -> str:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _printed(value, characters),
    )
    style, script = _asset("page.css"), _asset("page.js")

    def said(text: Text) -> str:
        return words(text)

    def drawn(block: Block) -> charts.Drawing:
        return _DRAW[block.kind](block, words)  # type: ignore[operator]

    environment.filters |= {"say": said, "heat": heat_cells, "parted": parted, "ends": heat_ends, "shortened": cut}
    environment.globals |= {
        "t": lambda key, **values: words.table[key].format(**values),
        "drawn": drawn,
        "rows_of": lambda table: table.rows[:rows],
        "left_out": lambda table: max(0, len(table.rows) - rows),
        "is_drawn": lambda block: block.kind in _DRAW,
    }
    return environment.get_template("page.html.j2").render(
        document=document,
        language=LANGUAGES[words.language],
        generator=GENERATOR,
        style=Markup(style),  # ours, and fixed: their hashes stand in the policy
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _printed(value: Any, longest: int) -> Any:
    """What a template is about to print: strings made visible, markup of our own as it is."""
    return visible(value, longest) if isinstance(value, str) and not isinstance(value, Markup) else value


def visible(text: str, longest: int = _LONGEST) -> str:
    """`text` with nothing hidden in it: controls as pictures, reordering marks by their number, and not endless.

    >>> visible("a\\x00b\\u202ec"), visible("x" * 30, 10)
    ('a␀b⟨U+202E⟩c', 'xxxxxxx…xx')
    """
    return _INVISIBLE.sub(_picture, cut(text, longest))


def cut(text: str, longest: int) -> str:
    """`text` without its middle where it is longer than `longest` characters."""
    if len(text) <= longest:
        return text
    end = longest // 4
    return f"{text[: longest - 1 - end]}…{text[len(text) - end :]}"


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"⟨U+{code:04X}⟩"


def heat_cells(block: Heat) -> list[list[tuple[str, int | None, bool]]]:
    """(text, level or None, chosen) of each cell."""
    levels = heat_levels(block.values)
    figure = _figure_for(block)
    return [
        [("" if value is None else figure(value), levels[r][c], (r, c) in block.chosen) for c, value in enumerate(row)]
        for r, row in enumerate(block.values)
    ]


def heat_ends(block: Heat) -> tuple[str, str]:
    """What the first and the last colour stand for."""
    scale = heat_scale(block.values)
    return ("0", "0") if scale is None else (_figure_for(block)(scale.low), _figure_for(block)(scale.high))


def _figure_for(block: Heat) -> Callable[[float], str]:
    """How a heat map writes its numbers: whole ones as such."""
    whole = all(v is None or float(v).is_integer() for row in block.values for v in row)
    return (lambda value: f"{value:g}") if whole else _figure


def _figure(value: float) -> str:
    size = abs(value)
    if value == 0 or 0.001 <= size < 1000:
        return f"{value:.3f}" if size < 10 else f"{value:.1f}"
    return f"{value:.0e}".replace("e-0", "e−").replace("e-", "e−").replace("e+0", "e").replace("e+", "e")


def parted(sample: Sample) -> tuple[str, str, str]:
    """(what both texts begin with, the rest before, the rest after): parted at a word."""
    before, after = sample.before or "", sample.after
    length = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    if length < max(len(before), len(after)):
        space = max(after.rfind(" ", 0, length), after.rfind("\n", 0, length))
        length = space + 1 if space >= 0 else length
    return after[:length], before[length:], after[length:]


def _asset(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def is_report(text: str) -> bool:
    """Whether a file beginning with `text` is a page of ours, which may be replaced."""
    return f'<meta name="generator" content="{GENERATOR}">' in text
