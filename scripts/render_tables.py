"""Puts the measured tables into the README and docs, from bench/results:   python scripts/render_tables.py

Text between `<!-- NAME -->` and `<!-- /NAME -->` is replaced. Every figure there comes from a result file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from render_exports import export_table
from render_inference import inference_table

from quantailor.demo import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
MODELS = ("stories260k", "tinystories-llama-4m")


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def ratio(values: dict[str, float], name: str) -> str:
    return f"{values[name] / values['float']:.3f}" if name in values else "–"


def mean(runs: list[dict], name: str) -> str:
    ratios = [run["values"][name] / run["values"]["float"] for run in runs if name in run["values"]]
    return f"{sum(ratios) / len(ratios):.3f}" if ratios else "–"


def share(row: dict, key: str) -> str:
    entry = row.get(key)
    if not entry:
        return "–"
    low_high = entry["interval"]
    return f"{entry['mean']:.0%}" + (f" ({low_high[0]:.0%} to {low_high[1]:.0%})" if low_high else "")


def fit_table() -> str:
    lines = [
        "| model | scheme | RTN | Qronos | Block-AP | short QAT | longer QAT | float, trained as long | verdict "
        "| QAT took back |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for model in MODELS:
        for row in read(f"fit_{model}")["fits"]:
            names = ("rtn", "qronos", "blockap", "hybrid", "qat", "float+")
            cells = [mean(row["runs"], name) for name in names]
            verdicts = ", ".join(dict.fromkeys(row["verdicts"]))
            trained = any("hybrid" in run["values"] for run in row["runs"])
            taken = share(row, "recovery") if trained else "–"
            lines.append(f"| {model} | {row['scheme']} | {' | '.join(cells)} | {verdicts} | {taken} |")
    return "\n".join(lines)


def guard_table() -> str:
    lines = ["| model | scheme | learning rate | PTQ | after training | held |", "|---|---|---|---:|---:|---|"]
    for model in MODELS:
        for row in read(f"fit_{model}")["guard"]:
            held = "yes" if row["held"] else "NO"
            cells = (model, row["scheme"], row["learning_rate"], f"{row['ptq']:.4f}", f"{row['trained']:.4f}", held)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def control_table() -> str:
    lines = [
        "| model | scheme | recovery against float | against float trained as long | final / float |",
        "|---|---|---|---|---|",
    ]
    for model in MODELS:
        for row in read(f"fit_{model}")["fits"]:
            if any("hybrid" in run["values"] for run in row["runs"]):
                final = row["final_over_float"]
                spread = f" ({final['interval'][0]:.3f} to {final['interval'][1]:.3f})" if final["interval"] else ""
                cells = (share(row, "recovery"), share(row, "recovery_control"), f"{final['mean']:.3f}{spread}")
                lines.append(f"| {model} | {row['scheme']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sst2_line() -> str:
    data = read("sst2")
    low, high = data["change_interval"]
    return (
        f"Accuracy {data['float_accuracy']:.4f} in float, {data['accuracy']:.4f} at w8a8 "
        f"(change 95 %: {low:+.4f} to {high:+.4f}), "
        f"the same prediction on {data['agreement']:.2%} of the rows; verdict `{data['verdict']}`, parity "
        f"{'equal' if data['check']['equal'] else 'NOT equal'} over {data['check']['integers_compared']:,} integers."
    )


def classifier_table() -> str:
    """Points of accuracy that each scheme loses, by PTQ and by QAT, beside float and beside float trained as long."""
    data = read("qat_classifier")
    head = "| scheme | steps | PTQ loses, points | after QAT | beside float trained as long | same class | asked |"
    lines = [head, "|---|---:|---|---|---|---:|---:|"]

    def text(value: dict) -> str:
        span = value["interval"]
        return f"{value['mean']:+.2f}" + (f" ({span[0]:+.2f} to {span[1]:+.2f})" if span else "")

    for scheme, row in data["cases"].items():
        spans = " | ".join(text(row[key]) for key in ("lost_by_ptq", "lost", "lost_beside_control"))
        lines.append(f"| {scheme} | {row['steps']} | {spans} | {row['agreement']:.2%} | {row['allowed']} |")
    ways = [(way.split()[1], f"{value['mean']:.4f}") for way, value in data["accuracy"].items()]
    float_one, after = ways[0][1], ", ".join(f"{value} after {steps} steps more" for steps, value in ways[1:])
    told = f"Accuracy in float {float_one}, {after}; {len(data['seeds'])} seeds, "
    return "\n".join([*lines, "", told + f"batches of {data['batch_size']} rows, 872 dev rows."])


def ptq_table() -> str:
    """Ours and the rivals on every layer of the blocks: perplexity over float, KL, seconds."""
    head = "| model | bits | tool | perplexity / float | KL | seconds | draws |"
    lines = [head, "|---|---:|---|---|---:|---:|---:|"]
    for case in read("ptq_quality")["cases"]:
        if case["layers"] != "all layers":
            continue
        rows = sorted((row["ratio"], name, row) for name, row in case["rows"].items() if "error" not in row)
        for value, name, row in rows:
            low_high = row["ratio_interval"]
            spread = f" ({low_high[0]:.4f} to {low_high[1]:.4f})" if low_high else ""
            bold = "**" if name.startswith("ours") else ""
            lines.append(
                f"| {case['model']} | {case['bits']} | {bold}{name.replace('ours:', 'quantailor ')}{bold} "
                f"| {value:.4f}{spread} | {row['kl']:.5f} | {row['seconds']:.1f} | {row['draws']} |"
            )
    return "\n".join(lines)


def best_table() -> str:
    """The best rival (least KL to the float model) and our best, every layer of the blocks."""
    head = "| model | bits | best of the others | perplexity / float | KL | quantailor | perplexity / float | KL |"
    lines = [head, "|---|---:|---|---:|---:|---|---:|---:|"]
    for case in read("ptq_quality")["cases"]:
        rows = {name: row for name, row in case["rows"].items() if "error" not in row}
        ours = {name: row for name, row in rows.items() if name.startswith("ours")}
        theirs = {name: row for name, row in rows.items() if name not in ours}
        if case["layers"] != "all layers" or not ours or not theirs:
            continue
        cells = [case["model"], str(case["bits"])]
        for group in (theirs, ours):
            name = min(group, key=lambda n: group[n]["kl"])
            cells += [name.removeprefix("ours:"), f"{group[name]['ratio']:.4f}", f"{group[name]['kl']:.5f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def absolute_table() -> str:
    """Ours alone, with more calibration rows."""
    data = read("ptq_quality_512")
    lines = ["| model | bits | method | perplexity / float | KL |", "|---|---:|---|---:|---:|"]
    for case in data["cases"]:
        for name, row in case["rows"].items():
            low_high = row["ratio_interval"]
            spread = f" ({low_high[0]:.4f} to {low_high[1]:.4f})" if low_high else ""
            lines.append(
                f"| {case['model']} | {case['bits']} | {name.removeprefix('ours:')} | {row['ratio']:.4f}{spread} "
                f"| {row['kl']:.5f} |"
            )
    return "\n".join(lines)


def cost_table() -> str:
    lines = ["| inputs x outputs | bits | tool | seconds (quartiles) | output error |", "|---|---:|---|---|---:|"]
    for row in read("ptq_cost")["rows"]:
        if "failed" in row:
            lines.append(f"| {row['size']} | {row['bits']} | {row['tool']} | could not run: {row['failed']} | – |")
            continue
        low, high = row["quartiles"]
        lines.append(
            f"| {row['size']} | {row['bits']} | {row['tool']} | {row['seconds']:.3f} ({low:.3f} to {high:.3f}) "
            f"| {row['error']:.4f} |"
        )
    return "\n".join(lines)


STEPS = (
    ("qat_step", "AMX"),
    ("qat_step_bert", "AMX, another"),
    ("qat_step_llama", "AMX, another"),
    ("qat_step_bert_avx2", "AVX2"),
    ("qat_step_llama_avx2", "AVX2"),
)


def step_table() -> str:
    """A training step beside the plain float step of the same rounds."""
    head = "| model, processor | step | seconds | of plain | of plain, bf16 | of plain, compiled | peak of plain |"
    lines = [head, "|---|---|---:|---:|---:|---:|---:|"]
    wanted = (("plain", "step"), ("plain, bf16", "step"), ("plain, compiled", "step"), ("plain", "peak_bytes"))
    for file, processor in STEPS:
        for model, found in read(file)["models"].items():
            for name, row in found["rows"].items():
                place = f"{model}, {processor}"
                if "error" in row:
                    lines.append(f"| {place} | {name} | could not run: {row['error']} |" + " – |" * len(wanted))
                    continue
                cells = []
                for base, part in wanted:
                    span = row["against"].get(base, {}).get(part)
                    told = span and f"{span['median']:.2f} ({span['min']:.2f} to {span['max']:.2f})"
                    cells.append(told or "–")
                bold = "**" if name.startswith("ours") else ""
                shown = name.replace("ours", "quantailor")
                seconds = row["seconds"]["step"]["median"]
                lines.append(f"| {place} | {bold}{shown}{bold} | {seconds:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def points_table() -> str:
    """Each class of points on alone, and left out of all of them."""
    data = read("points")
    head = "| points beside w8a8 | accuracy | same class as float | KL | change of KL | against | change of accuracy |"
    lines = [head, "|---|---:|---:|---:|---|---|---|"]
    for row in data["cells"]:
        spans = []
        for metric, form in (("kl", "{:+.5f} ({:+.5f} to {:+.5f})"), ("accuracy", "{:+.4f} ({:+.4f} to {:+.4f})")):
            span = row["change"][metric]
            spans.append("–" if row["cell"] == "base" else form.format(span["value"], *span["interval"]))
        against = "–" if row["cell"] == "base" else row["against"]
        cells = (f"{row['accuracy']:.4f}", f"{row['agreement']:.2%}", f"{row['kl']:.5f}", spans[0], against, spans[1])
        lines.append(f"| {row['cell']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def savers_table() -> str:
    """One way of saving switched on: time, memory and metric beside the same training without it."""
    data = read("savers")
    head = "| switched on | time of a step | backward | peak memory | nats a token | change |"
    lines = [head, "|---|---:|---:|---:|---:|---:|"]
    for name, row in data["rows"].items():
        cells = []
        for span in (row.get("time", {}).get("step"), row.get("time", {}).get("backward"), row.get("memory")):
            cells.append(f"{span['median']:.2f} ({span['min']:.2f} to {span['max']:.2f})" if span else "the same step")
        change = row.get("change")
        nats = f"{row['nats']['mean']:.4f}" if "nats" in row else "–"
        low_high = change["interval"] if change and name != "nothing" else None
        moved = f"{change['mean']:+.4f} ({low_high[0]:+.4f} to {low_high[1]:+.4f})" if low_high else "–"
        lines.append(f"| {name} | {' | '.join(cells)} | {nats} | {moved} |")
    return "\n".join(lines)


def mobilenet_table() -> str:
    lines = ["| weights and activations | PTQ | QAT | packed |", "|---|---:|---:|---:|"]
    ways = read("mobilenet")["ways"]

    def cell(way: str) -> str:
        row = ways[way]
        low_high = row["interval"]
        spread = f" ({low_high[0]:.1%} to {low_high[1]:.1%})" if low_high else ""
        return f"{row['mean']:.1%}{spread}"

    lines.append(f"| float | {cell('float')} | {cell('float+')} (trained as long) | – |")
    for scheme in [way.removesuffix(" PTQ") for way in ways if way.endswith(" PTQ")]:
        cells = (cell(f"{scheme} {way}") for way in ("PTQ", "QAT", "packed"))
        lines.append(f"| {scheme} | {' | '.join(cells)} |")
    return "\n".join(lines)


def routes_table() -> str:
    """Perplexity of each route at each width, the winner in bold."""
    data = read("routes")
    names = list(dict.fromkeys(route for row in data["rows"] for route in row["routes"]))
    lines = ["| bits | " + " | ".join(names) + " | winner |", "|---:|" + "---|" * (len(names) + 1)]
    for row in data["rows"]:
        cells = []
        for name in names:
            found = row["routes"].get(name)
            if found is None:
                cells.append("–")
                continue
            low_high = found["interval"]
            spread = f" ({low_high[0]:.2f} to {low_high[1]:.2f})" if low_high else ""
            bold = "**" if name == row.get("winner") else ""
            cells.append(f"{bold}{found['mean']:.2f}{bold}{spread}")
        lines.append(f"| {row['bits']} | " + " | ".join(cells) + f" | {row.get('winner', 'not complete')} |")
    controls = ", ".join(f"{name} {found['mean']:.2f}" for name, found in data["controls"].items())
    lines.append(
        f"\nFloat as published {data['float']:.2f}; {controls}; {data['seeds']} seeds, {data['tokens']:,} tokens each."
    )
    return "\n".join(lines)


def spread(row: dict, key: str, form: str) -> str:
    """A figure with its interval, if it has one."""
    if row.get(key) is None:
        return "–"
    low_high = row.get(f"{key}_interval")
    return format(row[key], form) + (f" ({low_high[0]:{form}} to {low_high[1]:{form}})" if low_high else "")


def qat_table() -> str:
    lines = [
        "| model | bits | way | perplexity / float | KL | recovery | against float trained as long "
        "| optimizer | seconds | seeds |",
        "|---|---:|---|---|---:|---|---|---:|---:|---:|",
    ]
    names = {"ptq": "Block-AP", "qat": "**QAT**", "scales": "**scales only**", "defaults": "**defaults**"}
    for case in read("qat_quality")["cases"]:
        for way, row in case["rows"].items():
            start = f"| {case['model']} | {case['bits']} | {names.get(way, way)} "
            if "error" in row:
                lines.append(f"{start}| could not run | – | – | – | – | – | – |")
                continue
            size = f"{row['optimizer_bytes'] / 1e6:.2f} MB" if row["optimizer_bytes"] else "–"
            figures = f"{spread(row, 'ratio', '.4f')} | {row['kl']:.4f} | {spread(row, 'recovery', '.0%')} "
            figures += (
                f"| {spread(row, 'recovery_control', '.0%')} | {size} | {row['seconds']:.0f} | {len(row['seeds'])} |"
            )
            lines.append(f"{start}| {figures}")
    return "\n".join(lines)


def main() -> None:
    parts = {
        "demo": lambda: "```\n" + table(read("demo")) + "\n```",
        "fit": fit_table,
        "guard": guard_table,
        "control": control_table,
        "sst2": sst2_line,
        "classifier": classifier_table,
        "best": best_table,
        "ptq": ptq_table,
        "step": step_table,
        "ptq512": absolute_table,
        "cost": cost_table,
        "points": points_table,
        "savers": savers_table,
        "mobilenet": mobilenet_table,
        "formats": export_table,
        "inference": lambda: inference_table(read("inference")),
        "routes": routes_table,
        "qat": qat_table,
    }
    for page in ("README.md", "README.zh-CN.md", "docs/BENCHMARKS.md", "docs/FORMATS.md"):
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        for name, make in parts.items():
            marked = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", flags=re.DOTALL)
            if marked.search(text):
                made = make()
                text = marked.sub(lambda found, made=made: found[1] + made + found[2], text)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
