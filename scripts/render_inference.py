"""The table of inference, from bench/results/inference.json (render_tables.py puts it in place)."""

from __future__ import annotations

from typing import Any


def _span(row: dict[str, Any], key: str) -> str:
    found = row[key]
    return f"{found['median']:.3g} ({found['min']:.3g} to {found['max']:.3g})"


def _ratio(row: dict[str, Any], base: str, key: str) -> str:
    found = row.get("against", {}).get(base, {}).get(key)
    return "–" if found is None else f"{found['median']:.2f}"


def _from_disk(row: dict[str, Any]) -> str:
    """Loading over reading; none where files had stayed in a cache."""
    sound = "load_over_read_cold" in row and "note" not in row["cold"]
    return f"{row['load_over_read_cold']:.1f}" if sound else "–"


def _table(head: list[str], rows: dict[str, list[str] | str]) -> list[str]:
    """Lines of it; a row that is a string says why it was not measured. Ratios and what is after them to the right."""
    right = ("of ", "peak", "load", "from disk", "GB")
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join("---:" if h.startswith(right) else "---" for h in head) + "|",
    ]
    for name, cells in rows.items():
        if isinstance(cells, str):
            lines.append(f"| {name} | not measured: {' '.join(cells.split())[-160:]} |" + " – |" * (len(head) - 2))
        else:
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def inference_table(data: dict[str, Any]) -> str:
    """Decoding, then whole encoders, then what was not measured and why. Older results lack some columns."""
    lines: list[str] = []
    rows: dict[str, list[str] | str]
    if found := data["models"].get("llama-1.1b"):
        disk = ["from disk"] if any("cold" in row for row in found.values()) else []
        head = ["1.1B Llama, batch 1", "decoded tokens a second", "tokens a CPU second", "of float32, by CPU"]
        head += [
            "of llama.cpp, by CPU",
            "GB a token",
            "prompt tokens a second",
            "peak memory / file",
            "load / read",
            *disk,
        ]
        rows = {}
        for name, row in found.items():
            if "not_measured" in row:
                rows[name] = str(row["not_measured"])
                continue
            bold = "**" if name.startswith("quantailor") else ""
            size = f"{row['bytes_a_token'] / 1e9:.2f}" if "bytes_a_token" in row else "–"
            ratios = [_ratio(row, base, "decode_cpu") for base in ("torch float32", "llama.cpp Q4_0")]
            cells = [_span(row, "decode"), _span(row, "decode_cpu"), *ratios, size, _span(row, "prefill")]
            cells += [f"{row['peak_over_file']:.2f}", f"{row['load_over_read']:.1f}", *(_from_disk(row) for _ in disk)]
            rows[f"{bold}{name}{bold}"] = cells
        lines += _table(head, rows)
    if found := data["models"].get("bert-base"):
        bases = [base for base in ("torch float32", "torch bfloat16") if "rounds" in found.get(base, {})]
        ratios = [f"of {base.removeprefix('torch ')}, by CPU" for base in bases]
        head = ["BERT-base, 128 tokens", "examples a second, batch 1", *ratios, "batch 32", *ratios]
        rows = {}
        for name, row in found.items():
            cells = []
            for batch in () if "not_measured" in row else ("batch 1", "batch 32"):
                cells += [_span(row, batch), *(_ratio(row, base, f"{batch}_cpu") for base in bases)]
            rows[name] = str(row["not_measured"]) if "not_measured" in row else cells
        lines += ["", *_table(head, rows)]
    load = " to ".join(f"{value:.1f}" for value in (data["load_before"][0], data["load_after"][0]))
    threads, read = data["environment"]["threads"], data["memory_gb_per_s"]
    missing = "; ".join(f"{name} ({why})" for name, why in data["not_measured"].items())
    said = f"{threads} thread(s) a process; memory read {read:.1f} GB/s after the rounds; load {load}. Not measured: "
    return "\n".join([*lines, "", f"{said}{missing}."])
