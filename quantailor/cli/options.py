"""Options that several commands share, and the small languages in them: percentages and rules."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from quantailor.errors import UsageError
from quantailor.recipe import Keep, Rule
from quantailor.spec import Scheme

ModelArgument = Annotated[
    Path, typer.Argument(help="model folder: config.json, *.safetensors, tokenizer", show_default=False)
]
SchemeOption = Annotated[
    str, typer.Option("--scheme", help="what to quantize to; `quantailor schemes` lists them", show_default=False)
]
OutOption = Annotated[
    Path, typer.Option("--out", help="new folder for the result; an existing one is left alone", show_default=False)
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="replace the folder that --out names, by renaming")]
JsonOption = Annotated[bool, typer.Option("--json", help="print exactly one JSON document on stdout")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="no progress bars")]
DeviceOption = Annotated[str, typer.Option("--device", help="where the model runs, such as cpu or cuda")]
SeedOption = Annotated[int, typer.Option("--seed", help="of calibration samples, shuffling and dropout")]
ContextOption = Annotated[int, typer.Option("--context", help="tokens a window or row")]
SamplesOption = Annotated[
    int,
    typer.Option(
        "--samples",
        help="calibration rows, drawn once each: 128 to 5000 are usual; `quantailor calibration` says what is enough",
        min=1,
    ),
]
RuleOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        help="PATTERN=SCHEME, PATTERN=SCHEME:METHOD or PATTERN=keep, such as '*.down_proj=w8a16:rtn'; in place of a "
        "name, or joined to it by &: type:Linear, size>100000, size<5000 (weights), such as 'size<5000=keep'; "
        "first match decides; repeatable; @FILE reads a rule a line",
    ),
]
PointOption = Annotated[
    list[str] | None,
    typer.Option(
        "--point",
        help="NAME=SPEC: what else is quantized inside the blocks. NAME: scores, kv, norm, gelu (or silu), residual, "
        "embedding, output (of Linear layers); SPEC: a8 (a scale a token, at each call), a8-static (calibrated), "
        "a8-learned (calibrated, then trained); 2 to 8 bits; repeatable; `quantailor inventory` shows what they hit",
    ),
]
NoRaggedOption = Annotated[
    bool, typer.Option("--no-ragged", help="refuse a group size that does not divide a layer's inputs")
]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", help="compressed-tensors or quantailor; by default the first where it can say the scheme"),
]


def rules(texts: list[str] | None) -> list[Rule]:
    """`PATTERN=SCHEME[:METHOD]` or `PATTERN=keep`, in order; `@FILE` stands for the lines of a file. PATTERN: a name,
    `type:NAME`, `size>N`, `size<N`, or several of them joined by `&`.

    Raises: UsageError on another form or unknown scheme, and for a file that cannot be read.
    """
    result = []
    for text in _lines(texts or []):
        pattern, equals, action = text.rpartition("=")
        if not equals or not pattern or not action:
            raise UsageError(f"--rule {text!r} is not PATTERN=SCHEME or PATTERN=keep; an example: '*.down_proj=w8a16'")
        scheme, _, method = action.partition(":")
        if scheme == "keep" and method:
            raise UsageError(f"--rule {text!r} keeps what it hits and names a method; leave one of the two out")
        kept = Keep(f"rule: {text}") if scheme == "keep" else Scheme.parse(scheme)
        result.append(Rule(kept, method=method or None, **_conditions(pattern, text)))
    return result


def points(texts: list[str] | None) -> dict[str, str]:
    """`NAME=SPEC`, by name. Raises: UsageError on another form, or a name given twice."""
    result: dict[str, str] = {}
    for text in texts or []:
        name, equals, spec = text.partition("=")
        if not equals or not name or not spec:
            raise UsageError(f"--point {text!r} is not NAME=SPEC; an example: norm=a8-static")
        if name in result:
            raise UsageError(f"--point {name} is given twice; give it once")
        result[name] = spec
    return result


_SIZE = {">": "more_than", "<": "fewer_than"}


def _conditions(pattern: str, text: str) -> dict[str, Any]:
    """What a rule asks of a module, as fields of `Rule`."""
    found: dict[str, Any] = {}
    for part in pattern.split("&"):
        name, value = "pattern", part
        if part.startswith("type:"):
            name, value = "module_type", part.removeprefix("type:")
        elif part.startswith(("size>", "size<")):
            name, value = _SIZE[part[4]], part[5:]
        if not value or name in found or (name in _SIZE.values() and not value.isdecimal()):
            raise UsageError(
                f"--rule {text!r}: {part!r} is no condition, or comes twice; "
                "use a name, type:Linear, size>100000, size<5000"
            )
        found[name] = int(value) if name in _SIZE.values() else value
    return found


def _lines(texts: list[str]) -> list[str]:
    """The texts, files opened; empty lines are left out."""
    found = []
    for text in texts:
        if not text.startswith("@"):
            found.append(text)
            continue
        try:
            found += [line for line in Path(text[1:]).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"--rule {text!r} names a file that cannot be read ({error}); give one with a rule a line"
            ) from error
    return found


def check_format(name: str | None) -> None:
    """Refuse an unknown format before the work, not after. Raises: UsageError."""
    if name not in (None, "compressed-tensors", "quantailor"):
        raise UsageError(f"format {name!r} is none of compressed-tensors, quantailor")


def share(text: str) -> float:
    """`2%` or `0.02` as 0.02. Raises: UsageError."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise UsageError(f"{text!r} is no share; write 2% or 0.02") from error


shown = False  # whether the result is on stdout already: an error after it adds no second document


def show(document: dict[str, Any], text: str, as_json: bool) -> None:
    """The result: one JSON document, or lines for people."""
    global shown
    shown = True
    print(json.dumps(_finite(document), indent=1, ensure_ascii=False) if as_json else text)


def _finite(value: Any) -> Any:
    """JSON knows no infinity: such a number becomes null."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
