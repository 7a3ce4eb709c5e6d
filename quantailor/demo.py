"""`fit` on the built-in model at 8, 4 and 2 bits: where PTQ is enough, and where only QAT saves the model."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from quantailor import api
from quantailor.data import python_docs
from quantailor.progress import Progress

MODEL = Path(__file__).parent / "assets" / "demo"
SCHEMES = ("w8a8", "w4a16-g32", "w2a16-g32")
_TRAIN_CHARACTERS = 1_500_000
_EVAL_CHARACTERS = 90_000


def texts() -> tuple[list[str], list[str]]:
    """(to train on, to measure on): documents of the Python that runs this."""
    train, valid = python_docs.split(python_docs.documents())
    return _some(train, _TRAIN_CHARACTERS), _some(valid, _EVAL_CHARACTERS)


def run(out: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Three fits; returns {"seconds", "rows"}: one row a scheme, from its report.json. `out` keeps the folders."""
    progress = progress or Progress()
    began = time.monotonic()
    train, valid = texts()
    rows = []
    with ExitStack() as stack:
        base = out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = api.load(MODEL)
        train_data = api.examples_for(model, train)
        valid_data = api.examples_for(model, valid)
        for scheme in SCHEMES:
            progress.say(f"\n{scheme}")
            goal = api.Goal(
                tolerance=0.02,
                minutes=3.0,  # Block-AP may take two of them on a busy machine, and QAT is to be seen
                calibration=48,
                short_steps=60,
                long_steps=180,
                settings=api.Settings(batch_size=8, evaluations=3),
            )
            result = api.fit(
                model, train_data, scheme, base / scheme, eval_data=valid_data, goal=goal, progress=progress
            )
            rows.append(result.data)
    return {"seconds": round(time.monotonic() - began, 1), "rows": rows}


def _some(documents: list[str], characters: int) -> list[str]:
    """Documents from the start, up to so many characters."""
    chosen: list[str] = []
    for document in documents:
        if characters <= 0:
            break
        chosen.append(document)
        characters -= len(document)
    return chosen


def table(result: dict[str, Any]) -> str:
    """The table that people see."""
    head = f"{'scheme':<12}{'float':>9}{'PTQ':>10}{'QAT':>10}  {'verdict':<11}{'bytes':>10}{'bits/weight':>13}  parity"
    lines = [head, "-" * len(head)]
    for row in result["rows"]:
        values = {step["name"]: step["value"] for step in row["steps"]}
        ptq = min(step["value"] for step in row["steps"] if step["name"] != "float" and "training" not in step)
        qat = [values[name] for name in ("hybrid", "qat") if name in values]
        trained = f"{min(qat):>10.3f}" if qat else f"{'-':>10}"
        parity = "equal" if row["check"]["equal"] else "NOT EQUAL"
        lines.append(
            f"{row['scheme']:<12}{values['float']:>9.3f}{ptq:>10.3f}{trained}  {row['verdict']:<11}"
            f"{row['size_bytes']:>10,}{row['bits_per_weight']:>13.2f}  {parity}"
        )
    lines.append(
        "perplexity on held-out Python documentation, context 256; "
        f"float weights take {result['rows'][0]['float_size_bytes']:,} bytes"
    )
    lines.append(f"{result['seconds']:.0f} s in all")
    return "\n".join(lines)
