"""Puts the tables of docs/PLANNING.md in place, from code and bench/results:   python scripts/render_planning.py

Text between `<!-- NAME -->` and `<!-- /NAME -->` is replaced. `--check` changes nothing and fails where it would.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import BertConfig, LlamaConfig, MobileNetV2Config

from quantailor.cost.checklist import USUAL_EPOCHS
from quantailor.cost.economics import SHARES, Point, alternatives, marginal, return_on, saving, split, sweet_spot
from quantailor.cost.guides import claims
from quantailor.cost.hardware import DEVICES
from quantailor.cost.storage import of_parameters
from quantailor.searching.decision import LOSSES, Facts, decide
from quantailor.verbs.planning import plan

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "PLANNING.md"
# The worked cases: config, scheme, rows of data, context, batch, epochs, hardware, monthly cost and speed-up assumed.
CASES: dict[str, dict[str, Any]] = {
    "BERT-base, W8A8, sentiment, 100,000 sentences": {
        "config": BertConfig(architectures=["BertForSequenceClassification"]),
        "scheme": "w8a8", "rows": 100_000, "context": 128, "batch": 32, "epochs": 3.0, "hardware": "T4",
        "monthly": 1333.0, "speedup": 4.0, "pretrained": True,
    },
    "Llama 7B, W4A16 g128, dialogue, 50,000 rows": {
        "config": LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16"),
        "scheme": "w4a16-g128", "rows": 50_000, "context": 512, "batch": 4, "epochs": 1.0, "hardware": "8xA100",
        "monthly": 5000.0, "speedup": 2.0, "pretrained": True,
    },
    "MobileNetV2, W8A8, from scratch, 1,281,167 images": {
        "config": MobileNetV2Config(architectures=["MobileNetV2ForImageClassification"]),
        "scheme": "w8a8", "rows": 1_281_167, "context": 224, "batch": 64, "epochs": 5.0, "hardware": "8xV100",
        "monthly": 200.0, "speedup": 2.0, "pretrained": False,
    },
}  # fmt: skip


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def claims_table() -> str:
    lines = ["| about | a guide says | computed | holds | how |", "|---|---|---|---|---|"]
    lines += [f"| {c.about} | {c.said} | {c.computed} | {'yes' if c.holds else '**no**'} | {c.how} |" for c in claims()]
    return "\n".join(lines)


def storage_table() -> str:
    lines = ["| parameters | bits | group | integers | scales |", "|---:|---:|---:|---:|---:|"]
    for bits, group in ((32, None), (16, None), (8, None), (8, 128), (4, 128), (4, 32), (2, 64)):
        size, extra = of_parameters(100e9, bits, group)
        lines.append(f"| 100 B | {bits} | {group or '–'} | {size / 1e9:.0f} GB | {extra / 1e9:.2f} GB |")
    return "\n".join(lines)


def accuracy_table() -> str:
    data = read("plan_accuracy")
    lines = [
        "| model | fitted on | step measured, s | planned | error | peak measured, MB | planned | error |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in data["rows"]:
        lines.append(
            f"| {r['model']} | {'yes' if r['fitted_on'] else 'no'} | {r['measured_seconds']:.3f} | "
            f"{r['predicted_seconds']:.3f} | {r['seconds_error']:+.0%} | {r['measured_bytes'] / 1e6:.0f} | "
            f"{r['predicted_bytes'] / 1e6:.0f} | {r['bytes_error']:+.1%} |"
        )
    lines += [
        "",
        f"{data['held_out']} models kept out of fitting: step time off by {data['mean_seconds_error']:.1%} on average, "
        f"{data['worst_seconds_error']:.1%} at most, peak memory by {data['mean_bytes_error']:.1%} and "
        f"{data['worst_bytes_error']:.1%}. `{data['command']}` on {data['environment']['device']}, "
        f"{data['environment']['threads']} thread, torch {data['environment']['torch']}, other work beside it.",
    ]
    return "\n".join(lines)


def losses_table() -> str:
    lines = ["| bits | groups | robust model | fragile model | rests on |", "|---:|---|---:|---:|---|"]
    for (bits, grouped), e in LOSSES.items():
        high = "none usable" if e.high == float("inf") else f"{e.high:.2%}"
        groups = "up to 128" if grouped else "a channel"
        lines.append(f"| {bits} | {groups} | {e.low:.2%} | {high} | {e.basis}: {e.source} |")
    return "\n".join(lines)


def agreement_table() -> str:
    lines = ["| model | scheme | the tree | `fit` found | agrees |", "|---|---|---|---|---|"]
    for model, size in (("stories260k", 260_032), ("tinystories-llama-4m", 3_700_000)):
        for row in read(f"fit_{model}")["fits"]:
            bits = int(row["scheme"][1])
            found = decide(Facts(bits=bits, grouped="-g" in row["scheme"], parameters=size, rows=100_000))
            verdict = ", ".join(dict.fromkeys(row["verdicts"]))
            lines.append(f"| {model} | {row['scheme']} | {says(found)} | {verdict} | {agrees(found, verdict)} |")
    found = decide(Facts(bits=8, grouped=False, parameters=22_700_000, rows=60_000))
    verdict = read("sst2")["verdict"]
    lines.append(f"| minilm-l6-v2, SST-2 | w8a8 | {says(found)} | {verdict} | {agrees(found, verdict)} |")
    return "\n".join(lines)


def says(found: Any) -> str:
    end = {True: "", False: ", and that it will fall short", None: ", not knowing whether that is enough"}
    return f"{found.way}{end[found.within]}"


def agrees(found: Any, verdict: str) -> str:
    if found.way == verdict:
        return "yes"
    trains = found.way in ("hybrid", "qat", "progressive", "lora-qat")
    if verdict == "infeasible" and trains:
        if found.within is False:
            return "yes: no rung met the tolerance"
        return "in part: it trains, as `fit` did, and does not say that the tolerance is out of reach"
    return "**no**"


def curves_table() -> str:
    """Perplexity of the ladder's rungs at 2 bits, mean of three seeds, by steps trained so far."""
    lines = [
        "| model | from – to steps | perplexity | gain a step | sweet spot (a tenth of the gain left) |",
        "|---|---|---|---:|---:|",
    ]
    for model, short, long in (("stories260k", 60, 240), ("tinystories-llama-4m", 30, 120)):
        runs = next(r["runs"] for r in read(f"fit_{model}")["fits"] if r["scheme"] == "w2a16-g32")
        means = [sum(r["values"][n] for r in runs) / len(runs) for n in ("qronos", "hybrid", "qat")]
        curve = [Point(steps, value) for steps, value in zip((0, short, short + long), means)]
        spot = sweet_spot(curve, higher_is_better=False)
        for m, (a, b) in zip(marginal(curve, higher_is_better=False), itertools.pairwise(means)):
            last = f"{spot.cost:g}" if m.end == curve[-1].cost else ""
            lines.append(f"| {model} | {m.start:g} – {m.end:g} | {a:.3f} -> {b:.3f} | {m.per_unit:.4f} | {last} |")
    return "\n".join(lines)


def cases_table() -> str:
    parts = []
    with tempfile.TemporaryDirectory() as place:
        for number, (title, case) in enumerate(CASES.items()):
            folder = Path(place) / f"model-{number}"
            case["config"].save_pretrained(folder)
            found = plan(
                folder, case["scheme"], data=case["rows"], hardware=case["hardware"], context=case["context"],
                batch_size=case["batch"], epochs_wanted=case["epochs"], pretrained=case["pretrained"], budget=500.0
                if number == 0 else None,
            )  # fmt: skip
            parts.append(case_section(title, case, found))
    return "\n\n".join(parts)


def case_section(title: str, case: dict[str, Any], found: Any) -> str:
    price = found.target.price
    lines = [
        f"**{title}** on {found.target.name} at {price.value:g} an hour and device ({price.basis}), batch "
        f"{case['batch']}, {case['epochs']:g} epochs of QAT:",
        "",
        "| way | steps | device hours (interval) | money (interval) | peak memory | rests on |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, way in found.ways.items():
        lines.append(
            f"| {'**' + name + '**' if name == found.decision.way else name} | {way.steps:,} | {span(way.hours)} | "
            f"{span(way.money)} | {way.peak.value / 1e9:.3g} GB | {way.seconds.basis} |"
        )
    cost = found.ways[found.decision.way].money.value
    back = return_on(cost, saving(case["monthly"], case["speedup"]))
    disk = found.storage
    lines += [
        "",
        f"Decision: {found.decision.way}, because {found.decision.reasons[-1].text}. "
        f"Disk {disk.float_bytes / 1e9:.3g} -> {disk.total / 1e9:.3g} GB (counted). "
        f"If inference costs {case['monthly']:,.0f} a month and becomes {case['speedup']:g} times as fast (both "
        f"assumed), {back.monthly_saving:,.0f} a month are saved, and the compute is paid back in "
        f"{back.payback_days:.2g} days. Work by people is not counted.",
    ]
    return "\n".join(lines)


def span(figure: Any) -> str:
    return f"{figure.value:.3g} ({figure.low:.2g} – {figure.high:.2g})"


def split_table() -> str:
    lines = ["| of 500 | share | with QAT | PTQ is enough |", "|---|---:|---:|---:|"]
    whole, without = split(500), split(500, without=["qat"])
    lines += [f"| {n} | {s:.0%} | {whole[n]:.0f} | {without.get(n, 0):.0f} |" for n, s in SHARES.items()]
    return "\n".join(lines)


def alternatives_table() -> str:
    lines = [
        "| method | a step, of a plain one | steps for the cost of 1000 of QAT | weights left | products left | note |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for a in alternatives(1000, 4):
        lines.append(
            f"| {a.name} | {a.step:.2f} | {a.steps:.0f} | {a.weight_share:.0%} | {a.product_share:.0%} | {a.note} |"
        )
    return "\n".join(lines)


def devices_table() -> str:
    lines = [
        "| device | FP32 | BF16/FP16 | INT8 | memory | bandwidth | price an hour, assumed |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, d in DEVICES.items():
        int8 = f"{d.peak['int8']:g}" if "int8" in d.peak else "–"
        lines.append(
            f"| {name} | {d.peak['float32']:g} | {d.peak['bfloat16']:g} | {int8} | {d.memory_gb:g} GB | "
            f"{d.bandwidth_gbs:g} GB/s | {d.price.value:g} |"
        )
    return "\n".join(lines)


def epochs_table() -> str:
    lines = ["| bits | usual epochs |", "|---|---|"]
    names = {8: "8", 3: "3 to 7", 0: "2 and below"}
    return "\n".join([*lines, *(f"| {names[least]} | {low:g} to {high:g} |" for least, (low, high) in USUAL_EPOCHS)])


TABLES = {
    "claims": claims_table,
    "storage": storage_table,
    "accuracy": accuracy_table,
    "losses": losses_table,
    "agreement": agreement_table,
    "curves": curves_table,
    "cases": cases_table,
    "split": split_table,
    "alternatives": alternatives_table,
    "devices": devices_table,
    "epochs": epochs_table,
}


def rendered(page: str) -> str:
    """`page` with every table made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            sys.exit(f"{PAGE} must have one place for the table {name}")
        page = pattern.sub(lambda m, make=make: m[1] + make() + "\n" + m[2], page)
    return page


def main() -> None:
    before = PAGE.read_text(encoding="utf-8")
    after = rendered(before)
    if "--check" in sys.argv:
        sys.exit(0 if after == before else f"{PAGE} is not what its data gives; run python scripts/render_planning.py")
    PAGE.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
