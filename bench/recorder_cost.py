"""What does the flight recorder add to a training step?

The same short training with and without a recording (a measure every ten steps, the default), in turn in one process:
off on, on off, ... Of each run the first measure period is left out, and the steps after it, whole periods, are timed
by the processor's clock and the wall's. A ratio is taken pair by pair; median and range are told. `inside` is the share
of the processor's time that passes in the recorder's own code, hooks included, measured in the runs that record.
The task's loss alone, without a teacher: the shortest step there is, so the largest share.

    python bench/recorder_cost.py --rounds 3 --out bench/results/recorder_cost.json

The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import quantailor as qt
from quantailor import api
from quantailor.environment import environment
from quantailor.progress import Advance, Progress
from quantailor.qat.flight import Flight
from quantailor.qat.recorder import Recorder
from quantailor.qat.train import train

HERE = Path(__file__).parent
DATA = Path(os.environ.get("QUANTAILOR_DATA") or HERE.parents[1] / "shared" / "data")
CELLS = (  # model, scheme, rows, tokens a row
    ("stories260k", "w2a16-g32", 8, 128),
    ("stories260k", "w8a8-static", 8, 64),
    ("tinystories-llama-4m", "w4a16-g32", 2, 128),
)
EVERY, PERIODS = 10, 4
MOST = 1.05


class Clocks(Progress):
    """The two clocks at the end of each step, and what the recorder has taken until then."""

    def __init__(self, spent: list[float]) -> None:
        self.spent, self.times = spent, list[tuple[float, float, float]]()

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        yield lambda _steps: self.times.append((time.process_time(), time.perf_counter(), self.spent[0]))


@contextmanager
def timed(owner: Any, names: list[str], spent: list[float]) -> Iterator[None]:
    """The processor's time in these methods, and in the hooks that they return, is added to `spent`."""
    real = {name: getattr(owner, name) for name in names}

    def timing(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **others: Any) -> Any:
            began = time.process_time()
            found = call(*args, **others)
            spent[0] += time.process_time() - began
            return timing(found) if callable(found) else found

        return wrapped

    for name, call in real.items():
        setattr(owner, name, timing(call))
    try:
        yield
    finally:
        for name, call in real.items():
            setattr(owner, name, call)


def run(model: Any, examples: Any, batch_size: int, record: bool) -> dict[str, float]:
    steps = EVERY * (1 + PERIODS)
    settings = qt.Settings(
        steps=steps, batch_size=batch_size, evaluations=1, kl_weight=0.0, task_weight=1.0, record=record,
        record_every=EVERY if record else None,
    )  # fmt: skip
    spent = [0.0]
    clocks = Clocks(spent)
    with timed(Flight, ["begin", "end"], spent), timed(Recorder, ["_on_layer", "_on_norm"], spent):
        train(copy.deepcopy(model), examples, lambda _m: (1.0,), settings, progress=clocks)
    (cpu0, wall0, spent0), (cpu1, wall1, spent1) = clocks.times[EVERY - 1], clocks.times[-1]
    return {
        "cpu": (cpu1 - cpu0) / (steps - EVERY),
        "wall": (wall1 - wall0) / (steps - EVERY),
        "inside": (spent1 - spent0) / (cpu1 - cpu0),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cell(name: str, scheme: str, batch_size: int, context: int, rounds: int) -> dict[str, Any]:
    text = DATA / "text" / "tinystories"
    source = qt.load(DATA / "models" / name)
    with open(text / "train.txt", encoding="utf-8") as file:
        rows = [{"text": part.strip()} for part in file.read(400_000).split("<|endoftext|>") if part.strip()]
    data = [row["text"] for row in rows]
    examples = api.examples_for(source, data, context=context)
    model = qt.quantize(source, scheme, data=examples, samples=8, method="rtn").model
    run(model, examples, batch_size, True)  # everything is built and warm
    pairs = []
    for number in range(rounds):
        order = (False, True) if number % 2 == 0 else (True, False)
        found = {record: run(model, examples, batch_size, record) for record in order}
        pairs.append((found[True], found[False]))
        print(
            name, scheme, number, {k: round(found[True][k] / found[False][k], 4) for k in ("cpu", "wall")}, flush=True
        )
    return {
        "model": name,
        "scheme": scheme,
        "batch": [batch_size, context],
        "rounds": rounds,
        "step_cpu_seconds": spread([off["cpu"] for _, off in pairs]),
        "cpu_ratio": spread([on["cpu"] / off["cpu"] for on, off in pairs]),
        "wall_ratio": spread([on["wall"] / off["wall"] for on, off in pairs]),
        "inside": spread([on["inside"] for on, _ in pairs]),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cells", type=int, nargs="*", default=list(range(len(CELLS))), help="numbers of the cells")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    document: dict[str, Any] = {
        "question": "what the flight recorder adds to a training step",
        "command": shlex.join(["python", "bench/recorder_cost.py", *sys.argv[1:]]),
        "environment": environment(),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE, check=False
        ).stdout.strip(),
        "seed": 0,
        "every": EVERY,
        "at_most": MOST,
        "cells": [],
    }
    if options.out and options.out.exists():  # cells are kept that are not measured now
        kept = json.loads(options.out.read_text())["cells"]
        names = [CELLS[number][:2] for number in options.cells]
        document["cells"] = [row for row in kept if (row["model"], row["scheme"]) not in names]
    for number in options.cells:
        row = cell(*CELLS[number], options.rounds)
        row["met"] = row["cpu_ratio"]["median"] <= MOST
        document["cells"].append(row)
        print(f"{row['model']} {row['scheme']}: cpu x{row['cpu_ratio']['median']:.3f} "
              f"[{row['cpu_ratio']['min']:.3f}-{row['cpu_ratio']['max']:.3f}], "
              f"wall x{row['wall_ratio']['median']:.3f}, "
              f"inside {row['inside']['median']:.2%}")  # fmt: skip
        if options.out:
            options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
