"""The report of a `fit` as a page of Markdown: the verdict first, then figures, then what was done to each layer."""

from __future__ import annotations

import math
from typing import Any


def fit_page(data: dict[str, Any]) -> str:
    """Markdown from what `fit` writes to report.json. Values are escaped: layer names come from the model's files."""
    lines = [
        "# quantailor fit",
        "",
        _verdict(data),
        "",
        "| step | " + data["metric"] + " | against float | 95 % of the change | seconds | why |",
    ]
    lines.append("|---|---:|---:|---|---:|---|")
    for step in data["steps"]:
        change = "" if not step.get("change_interval") else "{:+.4f} to {:+.4f}".format(*step["change_interval"])
        against = "" if step["name"] == "float" else _number(step["loss"], "+.2%")
        cells = (step["name"], _number(step["value"], ".4f"), against, change, f"{step['seconds']:.1f}", step["reason"])
        lines.append("| " + " | ".join(_cell(c) for c in cells) + " |")
    lines += ["", "## Size", "", "| | bytes of weights | bits a weight, whole file |", "|---|---:|---:|"]
    lines.append(f"| float | {data['float_size_bytes']:,} | {data['float_bits_per_weight']:.2f} |")
    lines.append(f"| {_cell(data['scheme'])} | {data['size_bytes']:,} | {data['bits_per_weight']:.2f} |")
    if data.get("recovery") is not None:
        lines += ["", f"Training took back {data['recovery']:.0%} of what PTQ had lost (against the float model)."]
    if data.get("recovery_control") is not None:
        lines.append(f"Against the float model fine-tuned for as many steps: {data['recovery_control']:.0%}.")
    check = data["check"]
    same = "equal" if check["equal"] else "NOT EQUAL"
    lines += [
        "",
        "## Proof",
        "",
        f"Simulated against packed, from disk: **{same}**. "
        f"{check['layers']} layers, {check['integers_compared']:,} integers, "
        f"largest logit difference {check['max_logit_difference']:.2g} of the largest logit.",
    ]
    lines += _notes(data)
    lines += [
        "",
        "## What was done to each module",
        "",
        "| module | type | scheme | reason | output error |",
        "|---|---|---|---|---:|",
    ]
    for entry in data["inventory"]:
        error = entry.get("report", {}).get("output_error")
        row = (
            entry["name"] or "(the model)",
            entry["type"],
            entry["scheme"] or "float",
            entry["reason"],
            "" if error is None else f"{error:.4f}",
        )
        lines.append("| " + " | ".join(_cell(c) for c in row) + " |")
    command = " ".join(data["command"].replace("`", "'").split())
    lines += ["", "## Again", "", "```", command, "```", "", "| | |", "|---|---|"]
    lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in data["environment"].items()]
    return "\n".join(lines) + "\n"


def _verdict(data: dict[str, Any]) -> str:
    final, base = data["final"], data["float"]
    text = {
        "ptq": "post-training quantization is enough",
        "hybrid": "PTQ lost too much; a short QAT from there meets the tolerance",
        "qat": "only longer QAT meets the tolerance",
        "infeasible": "nothing that was tried meets the tolerance; the best of it was saved",
    }[data["verdict"]]
    return (
        f"**{data['verdict']}**: {text}. {data['metric']} {_number(base['value'], '.4f')} in float, "
        f"{_number(final['value'], '.4f')} at {_cell(data['scheme'])} "
        f"({_number(final['loss'], '+.2%')}, tolerance {data['tolerance']:.2%})."
    )


def _number(value: float | None, form: str) -> str:
    """JSON has null where a figure was not finite."""
    return "not finite" if value is None or not math.isfinite(value) else format(value, form)


def _notes(data: dict[str, Any]) -> list[str]:
    return ["", "## Notes", "", *(f"- {_cell(note)}" for note in data["notes"])] if data["notes"] else []


def _cell(value: object) -> str:
    text = str(value).replace("\\", "\\\\").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "|[]!":  # a table's border, a link, a picture that would be fetched
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.replace("`", "'").split())
