"""What does each class of points inside a block cost a classifier? MiniLM on SST-2, w8a8 and its points on and off.

    python bench/points.py [--head FOLDER] [--spec a8-static] [--out bench/results/points.json]

Cells: w8a8 alone (base), base and each class, base and all of them, all without each. Each is measured on the dev set
against the float model, and paired with the base (a class on alone) or with all (a class left out). `--head`: a
fine-tuned classifier; where it is missing it is trained (as bench/sst2.py does) and kept there. Cells that a run has
finished lie beside the result as JSON lines: the same command goes on behind them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

import quantailor as qt
from quantailor.api import environment, examples_for
from quantailor.evaluate.bootstrap import mean, paired_difference
from quantailor.evaluate.divergence import kl_divergence

DATA = Path(os.environ.get("QUANTAILOR_DATA", Path(__file__).parents[2] / "shared" / "data"))
CLASSES = ("output", "scores", "norm", "gelu", "residual", "embedding")
SAMPLES, SEED = 64, 0


def head(folder: Path, steps: int) -> qt.Model:
    """The float classifier, trained if it is not there yet."""
    if not folder.exists():
        train, dev = (DATA / "tasks" / "sst2" / f"{name}.jsonl" for name in ("train", "dev"))
        settings = qt.Settings(steps=steps, batch_size=32, learning_rate=1e-4)
        model = qt.train(DATA / "models" / "minilm-l6-v2", train, scheme="float", eval_data=dev, settings=settings)
        qt.save(model, folder)
    return qt.load(folder)


def cells(spec: str) -> dict[str, dict[str, str]]:
    """Name -> points."""
    everything = dict.fromkeys(CLASSES, spec)
    return {
        "base": {},
        **{f"+{name}": {name: spec} for name in CLASSES},
        "all": everything,
        **{f"all-{name}": {k: v for k, v in everything.items() if k != name} for name in CLASSES},
    }


def per_row(result: Any, reference: Any) -> dict[str, list[float]]:
    """Correct (0 or 1), the float model's class (0 or 1) and KL(float || quantized) of each row of the dev set."""
    correct = (result.predictions == result.labels).astype(float)
    same = (result.predictions == reference.predictions).astype(float)
    kl = kl_divergence(reference.log_probs, result.log_probs)
    return {"accuracy": correct.tolist(), "agreement": same.tolist(), "kl": [float(f"{v:.6g}") for v in kl]}


def change(before: list[float], after: list[float]) -> dict[str, object]:
    """after - before with its 95 % interval, paired by rows."""
    ones = np.ones(len(before))
    value, interval = paired_difference((before, ones), (after, ones), mean, seed=SEED)
    return {"value": value, "interval": list(interval)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=Path, default=Path("sst2-head"))
    parser.add_argument("--steps", type=int, default=108, help="of the float fine-tune, batches of 32")
    parser.add_argument("--spec", default="a8-static", help="how every point is quantized")
    parser.add_argument("--out", type=Path, default=Path("bench/results/points.json"))
    options = parser.parse_args()
    model = head(options.head, options.steps)
    train, dev = (examples_for(model, DATA / "tasks" / "sst2" / f"{name}.jsonl") for name in ("train", "dev"))
    reference = qt.eval(model, dev)
    lines = options.out.with_suffix(f".{options.spec}.jsonl")
    done = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    rows = {row["name"]: row for row in done if row["fingerprint"] == reference.fingerprint}
    for name, points in cells(options.spec).items():
        if name in rows:
            continue
        quantized = qt.quantize(model, "w8a8", data=train, samples=SAMPLES, points=points, method="rtn", seed=SEED)
        measured = per_row(qt.eval(quantized, dev), reference)
        inventory = qt.inventory(quantized).counts(0)
        rows[name] = {"name": name, "fingerprint": reference.fingerprint, "block": inventory, "rows": measured}
        with lines.open("a") as file:
            file.write(json.dumps(rows[name]) + "\n")
        print(f"{name:<14} " + " ".join(f"{k} {np.mean(v):.5f}" for k, v in measured.items()), flush=True)
    found = []
    for name, points in cells(options.spec).items():
        against = "all" if name.startswith("all-") else "base"
        mine, theirs = rows[name]["rows"], rows[against]["rows"]
        found.append(
            {
                "cell": name,
                "points": points,
                "block": rows[name]["block"],
                **{metric: float(np.mean(values)) for metric, values in mine.items()},
                "against": against,
                "change": {metric: change(theirs[metric], mine[metric]) for metric in mine},
            }
        )
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here).stdout
    document = {
        "question": "what each class of points costs MiniLM on SST-2 dev, beside w8a8 (rtn)",
        "float_accuracy": reference.value,
        "rows": reference.num_rows,
        "spec": options.spec,
        "cells": found,
        "seed": SEED,
        "samples": SAMPLES,
        "commit": commit.strip(),
        "environment": environment(),
        "command": f"python bench/points.py --steps {options.steps} --spec {options.spec}",
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
