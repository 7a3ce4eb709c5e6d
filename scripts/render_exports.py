"""The table of formats, from bench/results/export_table.json. Called by render_tables.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parents[1] / "bench" / "results" / "export_table.json"


def hf(cell: dict[str, Any]) -> str:
    if cell["refused"]:
        return f"refused: {cell['refused']}"
    stock = cell["stock"]
    own = "" if stock["reader"].startswith("stock") else " (own layout)"
    reals, integers = stock["against_products_of_reals"], stock["against_products_of_integers"]
    against = "" if integers <= 1e-5 else f"; against our integer product {integers:.1e}"
    return f"{reals:.1e}{own}{against}"


def onnx(cell: dict[str, Any], jitter: float) -> str:
    if cell["refused"]:
        return f"refused: {cell['refused']}"
    value = cell["max_logit_difference"]
    return f"{value:.1e}" if value <= 1e-4 else f"{value:.1e} (the model itself: {jitter:.1e})"


def gguf(cell: dict[str, Any]) -> str:
    if cell["refused"]:
        return f"refused: {cell['refused']}"
    ran = cell.get("llama.cpp")
    if ran is None:
        return f"read back {cell['max_logit_difference']:.1e}"
    lead = ran["largest_lead_of_an_unequal_argmax"]
    text = f"{ran['argmax_equal']} of {ran['positions']} argmaxes, correlation {ran['correlation']:.5f}"
    return text if lead is None else f"{text}; those unequal led by at most {lead / ran['largest_logit']:.1%}"


def equal(row: dict[str, Any]) -> str:
    written = [cell for cell in row["formats"].values() if not cell["refused"]]
    return "all" if all(cell["integers_equal"] for cell in written) else "**NO**"


def export_table() -> str:
    if not RESULT.exists():
        return "The bench has not been run whole yet."
    lines = [
        "| model | scheme | integers equal | stock transformers | ONNX Runtime | llama.cpp |",
        "|---|---|---|---|---|---|",
    ]
    for row in json.loads(RESULT.read_text())["rows"]:
        cells = row["formats"]
        shown = [hf(cells["hf"]), onnx(cells["onnx"], row["jitter"]), gguf(cells["gguf"])]
        lines.append(f"| {row['model']} | {row['scheme']} | {equal(row)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)
