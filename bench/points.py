"""What does each class of points inside a block cost a classifier? MiniLM on SST-2, w8a8 and its points on and off.

    python bench/points.py [--head FOLDER] [--spec a8-static] [--out bench/results/points.json]

Cells: w8a8 alone (base), base and each class, base and all of them, all without each. Each is measured on the dev set
against the float model, and paired with the base (a class on alone) or with all (a class left out). `--head`: a
fine-tuned classifier; where it is missing it is trained (as bench/sst2.py does) and kept there. Cells that a run has
finished lie beside the result as JSON lines: the same command goes on behind them. Products are exact float sums of
the integers, as in `check`: on a machine without an int8 instruction they are far faster. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import quantailor as qt
from quantailor.api import environment, examples_for
from quantailor.evaluate.bootstrap import mean, paired_difference
from quantailor.evaluate.divergence import kl_divergence
from quantailor.nn.int_forward import float_products

DATA = Path(os.environ.get("QUANTAILOR_DATA", Path(__file__).parents[2] / "shared" / "data"))
CLASSES = ("output", "scores", "norm", "gelu", "residual", "embedding")
SAMPLES, SEED = 32, 0


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


def per_row(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, list[float]]:
    """Correct (0 or 1), the float model's class (0 or 1) and KL(float || quantized) of each row of the dev set."""
    mine, theirs = (torch.tensor(r["log_probs"]) for r in (row, reference))
    correct = mine.argmax(-1) == torch.tensor(reference["labels"])
    same = mine.argmax(-1) == theirs.argmax(-1)
    return {
        "accuracy": correct.double().tolist(),
        "agreement": same.double().tolist(),
        "kl": kl_divergence(theirs, mine).double().tolist(),
    }


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
    parser.add_argument("--cells", type=int, default=99, help="at most so many now; the rest by the same command later")
    parser.add_argument("--out", type=Path, default=Path("bench/results/points.json"))
    options = parser.parse_args()
    model = head(options.head, options.steps)
    train, dev = (examples_for(model, DATA / "tasks" / "sst2" / f"{name}.jsonl") for name in ("train", "dev"))
    lines = options.out.with_suffix(f".{options.spec}.jsonl")
    rows = {row["name"]: row for row in map(json.loads, lines.read_text().splitlines() if lines.exists() else [])}
    left = [(name, points) for name, points in {"float": {}, **cells(options.spec)}.items() if name not in rows]
    for name, points in left[: options.cells]:
        measured, block = model, {}
        with float_products():
            if name != "float":
                given = {"data": train, "samples": SAMPLES, "method": "rtn", "seed": SEED}
                measured = qt.quantize(model, "w8a8", points=points, **given)
                block = qt.inventory(measured).counts(0)
            result: Any = qt.eval(measured, dev)
        row = {"name": name, "block": block, "log_probs": result.log_probs.tolist(), "labels": result.labels.tolist()}
        rows[name] = row
        with lines.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:<14} accuracy {result.value:.4f}", flush=True)
    if len(left) > options.cells:
        print(f"{len(left) - options.cells} cells are left; the same command goes on")
        return
    measures = {name: per_row(row, rows["float"]) for name, row in rows.items()}
    found = []
    for name, points in cells(options.spec).items():
        against = "all" if name.startswith("all-") else "base"
        mine, theirs = measures[name], measures[against]
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
        "float_accuracy": float(np.mean(measures["float"]["accuracy"])),
        "rows": len(dev),
        "spec": options.spec,
        "cells": found,
        "seed": SEED,
        "samples": SAMPLES,
        "commit": commit.strip(),
        "environment": environment(),
        "command": f"python bench/points.py --steps {options.steps} --spec {options.spec}",
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    lines.unlink()
    print(json.dumps(document))


if __name__ == "__main__":
    main()
