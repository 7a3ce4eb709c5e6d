"""Which way to few bits is best at equal tokens: direct, progressive, from scratch, or float first and then bits?

stories260k on TinyStories, weights alone in groups of 32, at 8, 4, 2, 1.58 and 1 bit. Every cell trains on the same
number of tokens, chooses its best iterate on rows held out of the training text, and is measured on the validation
text, which chose nothing. The routes:

    direct        PTQ of the published float model, then QAT towards it (KL)
    progressive   the same through wider stages, the steps shared evenly; the same teacher
    scratch       QAT from random weights on the text alone; the float model is not used
    float, bits   from random weights: nine tenths of the steps in float, one tenth QAT (KL to that model); scratch with
                  its float pre-training counted
    float+        the published model fine-tuned in float for the same steps: the control
    float scratch the float model from random weights

    python bench/routes.py --lines /tmp/routes.jsonl --out bench/results/routes.json

A cell is a line of JSON, kept at once: the same command goes on where it was stopped. Needs the models and texts named
in docs/BENCHMARKS.md; QUANTAILOR_DATA points at them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from seeds import interval

import quantailor as qt
from quantailor.api import environment, examples_for
from quantailor.data.examples import Examples
from quantailor.data.loading import split

DATA = Path(os.environ.get("QUANTAILOR_DATA", Path(__file__).parents[2] / "shared" / "data"))
BITS = ("8", "4", "2", "1.58", "1")
ROUTES = ("direct", "progressive", "scratch", "float, bits")
STAGES = {"8": ("8",), "4": ("8", "4"), "2": ("8", "4", "2"), "1.58": ("4", "2", "1.58"), "1": ("4", "2", "1")}
GRADIENTS = {"1.58": "bitnet", "1": "lsq"}  # the better ones of --pilot
SCRATCH_RATE = 1e-2  # of random weights; the table's rates are for trained ones
CONTEXT, BATCH = 128, 8
PILOT_SEED = 1000


class Bench:
    """The model, the texts and the lines that are there already."""

    def __init__(self, lines: Path, steps: int) -> None:
        self.lines, self.steps = lines, steps
        self.model = qt.load(DATA / "models" / "stories260k")
        whole = examples_for(self.model, DATA / "text" / "tinystories" / "train.txt", context=CONTEXT)
        self.train, self.choose = split(whole, 0.01, 0)
        valid = DATA / "text" / "tinystories" / "valid.txt"
        self.valid: Examples = examples_for(self.model, valid, context=CONTEXT, limit=60)
        self.cells = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        self.pretrained: tuple[int, qt.Model] | None = None

    def done(self, **key: Any) -> dict[str, Any] | None:
        return next((c for c in self.cells if all(c[k] == v for k, v in {**key, "steps": self.steps}.items())), None)

    def cell(self, bits: str, route: str, seed: int, **changes: Any) -> dict[str, Any]:
        """One figure: from the lines, or trained now."""
        key = {"bits": bits, "route": route, "seed": seed, "changes": changes}
        if (known := self.done(**key)) is not None:
            return known
        cpu, wall = time.process_time(), time.monotonic()
        trained = self.run(bits, route, seed, changes)
        found = qt.eval(trained, self.valid).value
        assert trained.training is not None
        row = {
            **key,
            "steps": self.steps,
            "perplexity": found,
            "best_step": trained.training.best_step,
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "seconds": round(time.monotonic() - wall, 1),
        }
        self.cells.append(row)
        with self.lines.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{bits:>5} {route:<13} seed {seed}: {found:.3f} {changes or ''}", flush=True)
        return row

    def run(self, bits: str, route: str, seed: int, changes: dict[str, Any]) -> qt.Model:
        changes = {"gradient": GRADIENTS.get(bits, "lsq"), **changes}
        if route == "direct":
            return self.fit(self.model, bits, self.steps, seed, changes)
        if route == "progressive":
            chain = STAGES[bits]
            steps = [self.steps // len(chain)] * (len(chain) - 1)
            steps.append(self.steps - sum(steps))
            names = [f"{b}:{changes['gradient']}" if b == bits else b for b in chain]
            stages = [qt.Stage(name, count) for name, count in zip(names, steps)]
            return self.fit(self.model, None, self.steps, seed, {}, stages=stages)
        if route == "scratch":
            changes = {"learning_rate": SCRATCH_RATE, **changes}
            return self.fit(self.model, bits, self.steps, seed, changes, from_scratch=True)
        if route == "float, bits":
            float_steps = round(0.9 * self.steps)
            if self.pretrained is None or self.pretrained[0] != seed:
                rate = {"learning_rate": SCRATCH_RATE}
                made = self.fit(self.model, "float", float_steps, seed, rate, from_scratch=True)
                self.pretrained = seed, made
            return self.fit(self.pretrained[1], bits, self.steps - float_steps, seed, changes)
        if route == "float scratch":
            return self.fit(self.model, "float", self.steps, seed, {"learning_rate": SCRATCH_RATE}, from_scratch=True)
        return self.fit(self.model, "float", self.steps, seed, {})

    def fit(self, model: qt.Model, bits: str | None, steps: int, seed: int, changes: dict[str, Any], **more: Any):
        scheme = None if bits is None else "float" if bits == "float" else f"w{bits}a16-g32"
        if scheme == "float":
            changes = {name: value for name, value in changes.items() if name == "learning_rate"}
        settings = qt.Settings(steps=steps, batch_size=BATCH, evaluations=3, seed=seed, **changes)
        return qt.train(model, self.train, scheme=scheme, eval_data=self.choose, settings=settings, samples=32, **more)


def pilot(bench: Bench) -> None:
    """Rates and gradients, on a seed that counts nowhere."""
    for rate in (3e-3, 1e-2, 3e-2):
        bench.cell("2", "scratch", PILOT_SEED, learning_rate=rate)
    for bits, gradients in (("1.58", ("bitnet", "lsq")), ("1", ("xnor", "lsq", "binaryconnect"))):
        for gradient in gradients:
            bench.cell(bits, "direct", PILOT_SEED, gradient=gradient)


def summary(bench: Bench, seeds: int) -> list[dict[str, Any]]:
    """A row a width: perplexity of each route, and which one won in how many seeds (the same draws of data)."""
    rows = []
    for bits in BITS:
        values = {
            route: [
                c["perplexity"] for s in range(seeds) if (c := bench.done(bits=bits, route=route, seed=s, changes={}))
            ]
            for route in ROUTES
        }
        values = {route: found for route, found in values.items() if found}
        whole = {route: found for route, found in values.items() if len(found) == seeds}
        row: dict[str, Any] = {"bits": bits, "routes": {}}
        for route, found in values.items():
            row["routes"][route] = {"mean": statistics.mean(found), "interval": interval(found), "seeds": found}
        if whole:
            winner = min(whole, key=lambda name: statistics.mean(whole[name]))
            row["winner"] = winner
            for route, found in whole.items():
                ratios = [mine / best for mine, best in zip(found, whole[winner])]
                row["routes"][route]["over_winner"] = {"mean": statistics.mean(ratios), "interval": interval(ratios)}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120, help="of every cell")
    parser.add_argument("--lines", type=Path, required=True, help="cells that are done, one a line of JSON")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pilot", action="store_true", help="only try rates and gradients, on a seed of their own")
    options = parser.parse_args()
    bench = Bench(options.lines, options.steps)
    if options.pilot:
        pilot(bench)
        return
    for seed in range(options.seeds):
        for route in ("float+", "float scratch"):
            bench.cell("float", route, seed)
        for route in ROUTES:
            for bits in BITS:
                if not (route == "progressive" and len(STAGES[bits]) == 1):  # 8 bits have no wider stage
                    bench.cell(bits, route, seed)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    controls = {
        route: {"mean": statistics.mean(found), "interval": interval(found), "seeds": found}
        for route in ("float+", "float scratch")
        if (found := [c["perplexity"] for s in range(options.seeds) if (c := bench.done(route=route, seed=s))])
    }
    document = {
        "question": "routes to few bits at equal tokens, stories260k on TinyStories",
        "tokens": options.steps * BATCH * CONTEXT,
        "steps": options.steps,
        "seeds": options.seeds,
        "context": CONTEXT,
        "float": qt.eval(bench.model, bench.valid).value,
        "controls": controls,
        "rows": summary(bench, options.seeds),
        "stages": STAGES,
        "gradients": GRADIENTS,
        "scratch_learning_rate": SCRATCH_RATE,
        "pilot": [c for c in bench.cells if c["seed"] == PILOT_SEED],
        "cpu_seconds": round(sum(c["cpu_seconds"] for c in bench.cells), 1),
        "commit": commit,
        "environment": environment(),
        "command": f"python bench/routes.py --seeds {options.seeds} --steps {options.steps} --lines LINES --out OUT",
    }
    for row in document["rows"]:
        print(f"{row['bits']} bits: {row.get('winner', 'not complete')} wins")
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
