"""The table of inference, from bench/results/inference.json (render_tables.py puts it in place)."""

from __future__ import annotations

from typing import Any


def _span(row: dict[str, Any], key: str) -> str:
    found = row[key]
    return f"{found['median']:.3g} ({found['min']:.3g} to {found['max']:.3g})"


def _ratio(row: dict[str, Any], base: str, key: str) -> str:
    found = row.get("against", {}).get(base, {}).get(key)
    return "–" if found is None else f"{found['median']:.2f}"


def inference_table(data: dict[str, Any]) -> str:
    """Decoding, then whole encoders, then what was not measured and why."""
    lines: list[str] = []
    if found := data["models"].get("llama-1.1b"):
        lines += [
            "| 1.1B Llama, batch 1 | decoded tokens a second | tokens a CPU second | of float32, by CPU | "
            "of llama.cpp, by CPU | GB a token | prompt tokens a second | peak memory / file | load / read |",
            "|---|---|---|---:|---:|---:|---|---:|---:|",
        ]
        for name, row in found.items():
            if "not_measured" in row:
                lines.append(f"| {name} | not measured: {' '.join(row['not_measured'].split())[-160:]} |" + " – |" * 7)
                continue
            bold = "**" if name.startswith("quantailor") else ""
            size = f"{row['bytes_a_token'] / 1e9:.2f}" if "bytes_a_token" in row else "–"
            ratios = [_ratio(row, base, "decode_cpu") for base in ("torch float32", "llama.cpp Q4_0")]
            cells = [_span(row, "decode"), _span(row, "decode_cpu"), *ratios, size, _span(row, "prefill")]
            cells += [f"{row['peak_over_file']:.2f}", f"{row['load_over_read']:.1f}"]
            lines.append(f"| {bold}{name}{bold} | " + " | ".join(cells) + " |")
    if found := data["models"].get("bert-base"):
        lines += [
            "",
            "| BERT-base, 128 tokens | examples a second, batch 1 | of float32, by CPU | batch 32 "
            "| of float32, by CPU |",
        ]
        lines.append("|---|---|---:|---|---:|")
        for name, row in found.items():
            if "not_measured" in row:
                lines.append(f"| {name} | not measured: {' '.join(row['not_measured'].split())[-160:]} |" + " – |" * 3)
                continue
            cells = []
            for batch in ("batch 1", "batch 32"):
                cells += [_span(row, batch), _ratio(row, "torch float32", f"{batch}_cpu")]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    load = " to ".join(f"{value:.1f}" for value in (data["load_before"][0], data["load_after"][0]))
    threads, read = data["environment"]["threads"], data["memory_gb_per_s"]
    missing = "; ".join(f"{name} ({why})" for name, why in data["not_measured"].items())
    said = f"{threads} thread(s) a process; memory read {read:.1f} GB/s after the rounds; load {load}. Not measured: "
    return "\n".join([*lines, "", f"{said}{missing}."])
