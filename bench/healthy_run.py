"""Does a healthy training run raise an alarm, and does a broken one raise its own?

Five hundred steps of QAT on stories260k with the default rates, recorded every ten steps: no alarm is to be raised at
any width of weights. Then the same for sixty steps with one thing broken at the start (learning rate) or behind step
20: exactly the alarm of that fault is to be raised, within fifty steps of it.

    python bench/healthy_run.py --schemes w2a16-g32 w8a8-static --out bench/results/healthy_run.json
    python bench/healthy_run.py --faults --out bench/results/planted_faults.json

The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import quantailor as qt
from quantailor import api
from quantailor.environment import environment
from quantailor.evaluate.run import evaluate
from quantailor.qat.settings import learning_rates
from quantailor.qat.train import train, weight_bits
from quantailor.qat.watch import Watch

HERE = Path(__file__).parent
DATA = Path(os.environ.get("QUANTAILOR_DATA") or HERE.parents[1] / "shared" / "data")
BROKEN_AT = 20


def dead_norm(model: Any) -> None:
    model.model.layers[2].input_layernorm.weight.zero_()


def scale_to_0(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight_quantizer.log_scale.fill_(-20.0)


def activation_x1000(model: Any) -> None:
    if not hasattr(model, "was_multiplied"):
        model.was_multiplied = True
        model.model.layers[3].post_attention_layernorm.weight.mul_(1000.0)


FAULTS: dict[str, tuple[str, Callable[[Any], None] | None]] = {
    "learning rate x100": ("rate", None),
    "dead norm": ("norm", dead_norm),
    "scale -> 0": ("scale", scale_to_0),
    "activation x1000": ("range", activation_x1000),
}


def go(scheme: str, steps: int, fault: str | None, context: int) -> dict[str, Any]:
    source = qt.load(DATA / "models" / "stories260k")
    text = (DATA / "text" / "tinystories" / "train.txt").read_text(encoding="utf-8")
    data = [part.strip() for part in text[:1_500_000].split("<|endoftext|>") if part.strip()]
    held = (DATA / "text" / "tinystories" / "valid.txt").read_text(encoding="utf-8")[:20_000]
    examples = api.examples_for(source, data, context=context)
    valid = api.examples_for(source, [held], context=context)
    model = qt.quantize(source, scheme, data=examples, samples=16, method="rtn").model
    settings = qt.Settings(steps=steps, evaluations=5, record=True)
    broken = FAULTS[fault][1] if fault else None
    if fault and broken is None:
        rate = learning_rates(settings, weight_bits(model), sum(p.numel() for p in model.parameters()))[0]
        settings = dataclasses.replace(settings, learning_rate=100 * rate)
    real = Watch.on_step_begin

    def breaking(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if broken is not None and state.global_step >= BROKEN_AT:
            with torch.no_grad():
                broken(more["model"])
        real(self, args, state, control, **more)

    began = time.process_time()
    Watch.on_step_begin = breaking  # type: ignore[method-assign]
    try:
        report = train(model, examples, lambda m: score(m, valid),
                       settings, teacher=source.model)  # fmt: skip
    finally:
        Watch.on_step_begin = real  # type: ignore[method-assign]
    recording = report.recording
    assert recording is not None
    first, last = recording.measures[0], recording.measures[-1]

    def ratio(measure: str) -> float | None:
        pairs = [(a, b) for a, b in zip(first.layers.get(measure, []), last.layers.get(measure, [])) if a and b]
        return max((b / a for a, b in pairs), default=None)

    return {
        "scheme": scheme,
        "steps": report.steps,
        "fault": fault,
        "expected": FAULTS[fault][0] if fault else None,
        "alarms": [dataclasses.asdict(a) for a in recording.alarms],
        "worst_ratios_to_first": {m: ratio(m) for m in ("error", "range")},
        "most": {
            m: max((v for r in recording.measures for v in r.layers.get(m, []) if v is not None), default=None)
            for m in ("clip", "flips", "update", "drift_peak", "range")
        },
        "score": [report.start[0], report.best[0]],
        "cpu_seconds": time.process_time() - began,
    }


def score(model: Any, valid: Any) -> tuple[float]:
    return (float(evaluate(model, valid).nats_per_token),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["w2a16-g32", "w4a16-g32", "w8a8-static"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    document: dict[str, Any] = {
        "question": "whether healthy runs raise no alarm, and broken ones their own",
        "command": shlex.join(["python", "bench/healthy_run.py", *sys.argv[1:]]),
        "environment": environment(),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE, check=False
        ).stdout.strip(),
        "seed": 0,
        "rows": [],
    }
    cells = [(s, f) for s in options.schemes for f in (FAULTS if options.faults else [None])]
    for scheme, fault in cells:
        row = go(scheme, BROKEN_AT + 40 if fault else options.steps, fault, options.context)
        kinds = [(a["alarm"], a["step"]) for a in row["alarms"]]
        if fault:
            begun = 0 if FAULTS[fault][1] is None else BROKEN_AT
            row["met"] = [k for k, _ in kinds] == [row["expected"]] and kinds[0][1] - begun <= 50
        else:
            row["met"] = not kinds
        document["rows"].append(row)
        print(scheme, fault or "healthy", row["steps"], "steps:", kinds, "met" if row["met"] else "MISSED", flush=True)
        if options.out:
            options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
