"""How often is the probe's forecast right? The full run is made as well, and the forecast held against it.

stories260k on TinyStories: a cell is a scheme and a seed; the probe sees 128 rows twice, the full run
four times as many steps on all rows. A hit: what the full run reached lies within the 90 % interval, of which the width
is told beside it: one that holds everything says nothing.

    python bench/probe_backtest.py --out bench/results/probe_backtest.json

Every cell is kept in --cache and only what is missing is run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import quantailor as qt
from quantailor.api import environment, examples_for

DATA = Path(os.environ.get("QUANTAILOR_DATA", Path(__file__).parents[2] / "shared" / "data"))
SCHEMES = ("w2a16-g32", "w3a16-g32", "w2a16-g32-balanced", "w1.58a16-g32")
CONTEXT, ROWS, BATCH = 64, 128, 8


def cell(scheme: str, seed: int) -> dict[str, Any]:
    """The probe of one scheme and seed, and the run that it forecasts."""
    model = qt.load(DATA / "models" / "stories260k")
    whole = (DATA / "text" / "tinystories" / "train.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    text = [part.strip() for part in whole]
    train = examples_for(model, text[:700], context=CONTEXT)
    held = examples_for(model, text[-60:], context=CONTEXT).take(96)
    settings = qt.Settings(steps=4 * 2 * ROWS // BATCH, batch_size=BATCH, seed=seed)
    options: dict[str, Any] = {"scheme": scheme, "eval_data": held, "settings": settings, "method": "rtn"}
    found = qt.probe(model, train, samples=ROWS, epochs=2, **options)
    full = qt.train(model, train, **options).training
    assert full is not None
    reached = full.best[0]
    low, high = found.full.interval
    return {
        "scheme": scheme,
        "seed": seed,
        "before": found.before,
        "original": found.original,
        "probe": found.reached,
        "forecast": found.full.value,
        "interval": [low, high],
        "fits": found.full.fits,
        "reached": reached,
        "hit": low <= reached <= high,
        "error": found.full.value - reached,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "quantailor-probe")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = []
    for seed in range(options.seeds):
        for scheme in SCHEMES:
            path = options.cache / f"{scheme}-seed{seed}.json"
            if not path.exists():
                made = cell(scheme, seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(made) + "\n")
            cells.append(json.loads(path.read_text()))
            print(cells[-1], flush=True)
    gained = [c["before"] - c["reached"] for c in cells]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    document = {
        "question": "does the full run reach what the probe forecast",
        "level": 0.9,
        "cells": cells,
        "hits": sum(c["hit"] for c in cells),
        "of": len(cells),
        "too_optimistic": sum(c["reached"] > c["interval"][1] for c in cells),
        "too_pessimistic": sum(c["reached"] < c["interval"][0] for c in cells),
        "median_width_of_gain": statistics.median(
            (c["interval"][1] - c["interval"][0]) / g for c, g in zip(cells, gained) if g > 0
        ),
        "median_error_of_gain": statistics.median(abs(c["error"]) / g for c, g in zip(cells, gained) if g > 0),
        "environment": environment(),
        "commit": commit.stdout.strip(),
        "command": shlex.join(["python", "bench/probe_backtest.py", *sys.argv[1:]]),
    }
    print(f"{document['hits']} of {document['of']} full runs within the interval")
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
