"""Does `search` find what an exhaustive grid finds, for how much of its cost, and does it keep its budgets?

    python bench/auto_qat.py [--out bench/results/auto_qat.json] [--steps 12] [--seeds 0 1 2]

stories260k, windows of 32 tokens of TinyStories, short runs: the search is compared with the grid. The grid: bits (4,
3, or --bits) x groups 32, 64 x learned or fixed scales x three learning rates = 24 recipes, each trained to its end,
all on the same start (PTQ once a scheme) and the same seed. The limit on the latency (predicted from bytes at 1 GB/s,
so that load on the machine does not decide) leaves the dearest scheme out. Then, each with a new study: the verb,
once, which has to keep three budgets (accuracy, latency, minutes: 40 % of the grid's), and the search alone, with
other seeds of its sampler, ended by 35 % of the grid's processor seconds.

Regret: perplexity of what the search chose over that of the grid's best within the limits, less 1. `choosing` is on the
rows that recipes are compared on, from the grid's own figure of that recipe; `judged` on the validation text: what
the verb saved against the grid's best as it was trained. Cost: processor seconds, so that other work on the machine
counts for neither; wall seconds stand beside. A grid point or a run that is in --out already is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quantailor.api import Settings, Space, environment, evaluate, examples_for, load, search
from quantailor.data.loading import split
from quantailor.evaluate.run import reference_for
from quantailor.searching.auto_qat import Clock, Search
from quantailor.searching.front import Limits
from quantailor.searching.latency import Latency
from quantailor.searching.qat_runs import Runs
from quantailor.searching.shared_study import SharedStudy

DATA = Path(os.environ.get("QUANTAILOR_DATA", Path(__file__).parents[2] / "shared" / "data"))
CONTEXT, ROWS, CHOOSING, JUDGING, SAMPLES = 32, 3000, 64, 200, 32


def space_of(steps: int, bits: Sequence[int]) -> Space:
    rates = (0.3, 1.0, 3.0)
    return Space(bits=tuple(bits), group=(32, 64), learning_rate=rates, steps=(steps,), frozen=(0.0,))


class Document:
    """The result file, written after every measurement."""

    def __init__(self, path: Path | None, steps: int, bits: list[int]) -> None:
        self.path = path
        held = json.loads(path.read_text()) if path and path.exists() else {}
        same = held.get("steps") == steps and held.get("bits", [4, 3]) == bits
        new = {"steps": steps, "bits": bits, "grid": [], "searches": [], "verb": None}
        self.data: dict[str, Any] = held if same else new

    def write(self, **more: Any) -> None:
        commit = ["git", "rev-parse", "--short", "HEAD"]
        self.data |= {
            "question": "regret and cost of search against an exhaustive grid; budgets of the verb",
            "environment": environment(),
            "commit": subprocess.run(commit, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip(),
            "command": " ".join(["python", "bench/auto_qat.py", *sys.argv[1:]]),
            **more,
        }
        if self.path:
            self.path.write_text(json.dumps(self.data, indent=1) + "\n")


class Bench:
    def __init__(self, steps: int, bits: list[int], document: Document) -> None:
        self.space, self.document = space_of(steps, bits), document
        self.model = load(DATA / "models" / "stories260k")
        text = DATA / "text" / "tinystories"
        self.train = examples_for(self.model, text / "train.txt", context=CONTEXT, limit=ROWS)
        self.valid = examples_for(self.model, text / "valid.txt", context=CONTEXT, limit=JUDGING)
        self.settings = Settings(batch_size=8, seed=0)

    def runs(self) -> Runs:
        """As the verb makes them."""
        train_data, held = split(self.train, 0.1, 0)
        latency = Latency({"input_ids": torch.ones(1, 1, dtype=torch.long)}, bandwidth=1.0)
        return Runs(
            self.model.model, train_data, held.take(CHOOSING), (), self.settings, samples=SAMPLES, latency=latency
        )

    def grid(self) -> list[dict[str, Any]]:
        """Every point to its end."""
        runs, done = self.runs(), self.document.data["grid"]
        known = {row["recipe"] for row in done}
        reference = reference_for(self.model.model, self.valid)
        for point in self.space.points():
            if str(point) in known:
                continue
            began, processor = time.monotonic(), time.process_time()
            start = runs.start(point.scheme)
            trained = runs.train(point, until=math.inf)
            cost = {"seconds": time.monotonic() - began, "processor_seconds": time.process_time() - processor}
            judged = evaluate(self.model.__class__(trained.model, self.model.tokenizer, "lm"), self.valid)  # type: ignore[arg-type]
            row = {
                "recipe": str(point),
                "scheme": str(point.scheme),
                "ptq_loss": start.loss,
                "loss": trained.loss,
                "latency_ms": start.latency_ms,
                "judged": judged.value,
                **cost,
            }
            done.append(row)
            print(row, file=sys.stderr, flush=True)
            self.document.write(float={"choosing": runs.float_result.value, "judged": _value(reference)})
        return list(done)

    def limits(self, grid: list[dict[str, Any]]) -> Limits:
        """Between the dearest scheme and the next one; and an accuracy that the best of the rest has some room to."""
        costs = sorted({row["latency_ms"] for row in grid})
        allowed = (costs[-1] + costs[-2]) / 2
        losses = sorted(row["loss"] for row in grid if row["latency_ms"] <= allowed)
        return Limits(loss=1.05 * (1 + losses[0]) - 1, cost=allowed)

    def search(self, grid: list[dict[str, Any]], limits: Limits, seed: int) -> None:
        """The search alone, until its processor seconds are 35 % of the grid's."""
        processor = 0.35 * sum(row["processor_seconds"] for row in grid)
        began = time.process_time()
        clock = Clock(0.0, processor)
        with tempfile.TemporaryDirectory() as folder:
            runs = self.runs()
            runs.clock = lambda: time.process_time() - began
            with SharedStudy(Path(folder) / "s", {"bench": 1}, self.space, limits, seed=seed) as study:
                found = Search(runs, study, limits, clock, trains_winner=False).search()
        spent = time.process_time() - began
        assert found.winner is not None
        by_recipe = {row["recipe"]: row for row in grid}
        best = min((r for r in grid if limits.excess(r["loss"], r["latency_ms"]) <= 0), key=lambda r: r["loss"])
        chosen = by_recipe[str(found.winner.point)]
        row = {
            "seed": seed,
            "winner": str(found.winner.point),
            "best_of_grid": best["recipe"],
            "regret_choosing": (1 + chosen["loss"]) / (1 + best["loss"]) - 1,
            "regret_judged": chosen["judged"] / best["judged"] - 1,
            "share_of_grid_cost": spent / sum(r["processor_seconds"] for r in grid),
            "share_of_feasible_grid_cost": spent
            / sum(r["processor_seconds"] for r in grid if r["latency_ms"] <= (limits.cost or math.inf)),
            "trials": len(found.tried),
            "stopped_early": sum(str(t.facts.get("reason", "")).startswith("stopped") for t in found.tried),
            "seconds": found.seconds,
            "processor_seconds": spent,
            "load": os.getloadavg()[0],
        }
        print(row, file=sys.stderr, flush=True)
        self.document.data["searches"] = [r for r in self.document.data["searches"] if r["seed"] != seed] + [row]
        self.document.write()

    def verb(self, grid: list[dict[str, Any]], limits: Limits) -> None:
        """The whole job under three budgets, and what it saved measured again from disk."""
        minutes = 0.4 * sum(row["seconds"] for row in grid) / 60
        share = 100 / (1 + limits.loss)
        place = Path(tempfile.mkdtemp())
        began, processor = time.monotonic(), time.process_time()
        found = search(
            self.model,
            self.train,
            out=place / "out",
            eval_data=self.valid,
            accuracy=f"{share:.6f}%",
            latency_ms=limits.cost,
            bandwidth=1.0,
            minutes=minutes,
            space=self.space,
            settings=self.settings,
            samples=SAMPLES,
        )
        wall, spent = time.monotonic() - began, time.process_time() - processor
        saved = load(place / "out")
        again = evaluate(saved, self.valid).value
        float_value = evaluate(self.model, self.valid).value
        size = Latency({"input_ids": torch.ones(1, 1, dtype=torch.long)}, bandwidth=1.0)(saved.model)
        best = min((r for r in grid if limits.excess(r["loss"], r["latency_ms"]) <= 0), key=lambda r: r["judged"])
        row = {
            "verdict": found.verdict,
            "winner": found.data["winner"]["recipe"],
            "steps": found.data["final"]["steps"],
            "trials": len(found.data["trials"]),
            "perplexity_again": again,
            "perplexity_allowed": float_value * (1 + limits.loss),
            "latency_ms_again": size,
            "latency_ms_allowed": limits.cost,
            "seconds": wall,
            "seconds_allowed": 60 * minutes,
            "regret_judged": again / best["judged"] - 1,
            "share_of_grid_seconds": wall / sum(r["seconds"] for r in grid),
            "share_of_grid_processor_seconds": spent / sum(r["processor_seconds"] for r in grid),
            "sentence": found.data["sentence"],
            "load": os.getloadavg()[0],
        }
        row["meets"] = [
            again <= row["perplexity_allowed"],
            size <= (limits.cost or math.inf),
            wall <= 1.05 * row["seconds_allowed"],
        ]
        shutil.rmtree(place)
        print(row, file=sys.stderr, flush=True)
        self.document.write(verb=row)


def _value(reference: Any) -> float:
    return float(getattr(reference, "result", reference).value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--bits", type=int, nargs=2, default=[4, 3], help="the grid's two widths")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    document = Document(options.out, options.steps, options.bits)
    bench = Bench(options.steps, options.bits, document)
    grid = bench.grid()
    limits = bench.limits(grid)
    document.write(limits={"loss": limits.loss, "latency_ms": limits.cost})
    if document.data["verb"] is None:
        bench.verb(grid, limits)
    known = {row["seed"] for row in document.data["searches"]}
    for seed in options.seeds:
        if seed not in known:
            bench.search(grid, limits, seed)
    print(json.dumps(document.data))


if __name__ == "__main__":
    main()
