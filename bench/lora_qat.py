"""Does an adapter inside the rounding do what full QAT does, at the memory of an adapter, and merge exactly?

stories260k at w4a16-g32, every Linear of the blocks. All ways start from the same PTQ of a seed, see the same batches
for as many steps, learn from the float model (KL), and have their best iterate chosen on rows held out of the training
text; the first windows of the validation text then measure what is *served*: the packed model, adapters merged. Ways:
`qat` (every weight trains), `lora` (r = 16 inside the rounding, 8 bits of base), `lora-base4` (the base keeps its 4
bits alone), `lora-scales` (scales train as well), `loftq` (base and adapter of LoftQ), `qlora` (the same adapter beside
the rounding), `float` (the control: the float model fine-tuned on its own loss).

    python bench/lora_qat.py --seeds 3 --out bench/results/lora_qat.json       makes what is missing in --cache
    python bench/lora_qat.py --only lora --seeds 1 --rates 3e-4 1e-3 3e-3      other learning rates, chosen rows' score

Recovery: (PTQ - way) / (PTQ - float) on log perplexity of the served model; against QAT's, paired by seed. Merging:
largest difference of logits between the model that was trained and the packed one. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from seeds import commit, interval

import quantailor as qt
from quantailor.api import environment, examples_for

HERE = Path(__file__).parent
DATA = Path(os.environ.get("QUANTAILOR_DATA", HERE.parents[1] / "shared" / "data"))
CONTEXT, WINDOWS, CHOOSING = 256, 100, 40
SCHEME = "w4a16-g32"
WAYS: dict[str, qt.LoRA | None] = {
    "qat": None,
    "lora": qt.LoRA(r=16),
    "lora-base4": qt.LoRA(r=16, base_bits=4),
    "lora-scales": qt.LoRA(r=16, scales=True),
    "loftq": qt.LoRA(r=16, init="loftq"),
    "qlora": qt.LoRA(r=16, inside=False),
}
Result = dict[str, Any]


def documents() -> tuple[list[str], list[str]]:
    """(to train on, to choose with): disjoint parts of the training text."""
    text = (DATA / "text" / "tinystories" / "train.txt").read_text(encoding="utf-8")
    found = [d.strip() for d in text.split("<|endoftext|>") if d.strip()]
    return found[:-CHOOSING], found[-CHOOSING:]


class Bench:
    """Makes cells, one a (start, seed, way), and keeps each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.float = qt.load(DATA / "models" / "stories260k")
        self.train, self.choose = documents()
        valid = DATA / "text" / "tinystories" / "valid.txt"
        self.valid = examples_for(self.float, valid, context=CONTEXT)
        options.cache.mkdir(parents=True, exist_ok=True)

    def settings(self, seed: int, **changes: Any) -> qt.Settings:
        o = self.options
        return qt.Settings(seed=seed, steps=o.steps, batch_size=o.batch_size, evaluations=3, **changes)

    def start(self, seed: int) -> qt.Model:
        return qt.quantize(self.float, SCHEME, method=self.options.start, data=self.train, samples=64, seed=seed)

    def judged(self, model: qt.Model) -> float:
        """Nats a token of what would be served."""
        served = model if model.state is None else qt.pack(model)
        return qt.eval(served, self.valid, limit=WINDOWS).nats_per_token

    def cell(self, seed: int, way: str, rate: float | None = None) -> Result | None:
        """From the cache, or made now where --only asks for it."""
        o = self.options
        name = f"{o.start}-{o.steps}x{o.batch_size}-seed{seed}-{way}" + (f"-{rate:g}" if rate else "")
        path = o.cache / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        if o.only and way not in o.only:
            return None
        print(f"{name} ...", flush=True)
        begun = time.process_time()
        result = self._run(seed, way, rate)
        result |= {"cpu_seconds": time.process_time() - begun, "commit": commit(), "load": os.getloadavg()[0]}
        path.write_text(json.dumps(result, indent=1) + "\n")
        return result

    def _run(self, seed: int, way: str, rate: float | None) -> Result:
        changes = {} if rate is None else {"learning_rate": rate}
        if way == "untouched":
            return {"nats": self.judged(self.float)}
        if way == "float":
            settings = self.settings(seed, kl_weight=0.0, task_weight=1.0)
            done = qt.train(self.float, self.train, scheme="float", eval_data=self.choose, settings=settings)
            return {"nats": self.judged(done), "training": training(done)}
        if way == "ptq":
            return {"nats": self.judged(self.start(seed))}
        lora, options = WAYS[way], {"eval_data": self.choose, "settings": self.settings(seed, **changes)}
        if lora is None or lora.init == "loftq":
            if lora is None:
                done = qt.train(self.start(seed), self.train, teacher=self.float, **options)
            else:
                done = qt.train(self.float, self.train, scheme=SCHEME, method="rtn", samples=64, lora=lora, **options)
        else:
            model = qt.add_adapter(self.start(seed), lora, seed=seed)
            done = qt.train(model, self.train, teacher=self.float, **options)
        probe = next(iter(self.valid.batches(8, limit=8)))["input_ids"]
        with torch.no_grad():
            trained, served = (m.model.eval()(input_ids=probe).logits for m in (done, qt.pack(done)))
        return {
            "nats": self.judged(done),
            "nats_before_merge": qt.eval(done, self.valid, limit=WINDOWS).nats_per_token,
            "logit_difference": float((trained - served).abs().max()),
            "largest_logit": float(trained.abs().max()),
            "training": training(done),
        }


def training(model: qt.Model) -> Result:
    report = model.training
    assert report is not None
    return {
        "best_step": report.best_step,
        "chosen": report.best[0],
        "start": report.start[0],
        "learning_rate": report.learning_rate,
        "trainable": report.trainable,
        "optimizer_bytes": report.optimizer_bytes,
    }


def spread(values: list[float]) -> Result:
    return {"mean": statistics.mean(values), "interval": interval(values), "values": values}


def summary(cells: dict[str, dict[int, Result]]) -> Result:
    """A row a way: ratio of perplexity to float, recovery, and its share of QAT's, paired by seed."""
    base = cells["untouched"][0]["nats"]
    rows: Result = {}
    for way, runs in cells.items():
        if way == "untouched" or not runs:
            continue
        row: Result = {"ratio": spread([math.exp(r["nats"] - base) for r in runs.values()])}
        starts = cells["ptq"]
        if way not in ("ptq", "float"):
            gained = {s: starts[s]["nats"] - r["nats"] for s, r in runs.items()}
            row["recovery"] = spread([gained[s] / (starts[s]["nats"] - base) for s in runs])
            if qat := cells.get("qat"):
                paired = [gained[s] / (starts[s]["nats"] - qat[s]["nats"]) for s in runs if s in qat]
                row["share_of_qat"] = spread(paired)
                mine = statistics.mean(gained[s] for s in runs if s in qat)
                row["share_of_qat_of_means"] = mine / statistics.mean(starts[s]["nats"] - qat[s]["nats"] for s in runs)
            row["logit_difference"] = max(r["logit_difference"] for r in runs.values())
            row["nats_lost_in_merge"] = spread([r["nats"] - r["nats_before_merge"] for r in runs.values()])
        if "training" in next(iter(runs.values())):
            row["trainable"] = next(iter(runs.values()))["training"]["trainable"]
            row["optimizer_bytes"] = next(iter(runs.values()))["training"]["optimizer_bytes"]
            row["learning_rate"] = next(iter(runs.values()))["training"]["learning_rate"]
        row["cpu_seconds"] = statistics.median(r["cpu_seconds"] for r in runs.values())
        rows[way] = row
    return rows


def other_rates(cache: Path, cells: dict[str, dict[int, Result]]) -> list[Result]:
    """Cells made with --rates: the score of the rows that choose, and the served model's ratio to float."""
    base, found = cells["untouched"][0]["nats"], []
    for path in sorted(cache.glob("*-seed*-*-0.*.json")):
        cell = json.loads(path.read_text())
        found.append({"cell": path.stem, "chosen": cell["training"]["chosen"], "ratio": math.exp(cell["nats"] - base)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", default="rtn", help="PTQ method all ways start from")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--rates", nargs="*", type=float, help="learning rates to try instead of the default")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/lora_qat"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options)
    if options.rates:
        for rate in options.rates:
            for way in options.only:
                for seed in range(options.seeds):
                    print(way, rate, json.dumps(bench.cell(seed, way, rate)))
        return
    ways = ["ptq", "float", *WAYS]
    cells: dict[str, dict[int, Result]] = {"untouched": {0: bench.cell(0, "untouched") or {}}}
    for way in ways:
        made = {seed: bench.cell(seed, way) for seed in range(options.seeds)}
        cells[way] = {seed: cell for seed, cell in made.items() if cell is not None}
    document = {
        "question": __doc__.splitlines()[0],
        "command": "python bench/lora_qat.py " + " ".join(sys.argv[1:]),
        "start": options.start,
        "scheme": SCHEME,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "context": CONTEXT,
        "windows": WINDOWS,
        "seeds": list(range(options.seeds)),
        "environment": environment(),
        "commit": commit(),
        "adapters": {name: dataclasses.asdict(lora) for name, lora in WAYS.items() if lora is not None},
        "rows": summary(cells),
        "other_rates": other_rates(options.cache, cells),
    }
    for way, row in document["rows"].items():
        share = row.get("share_of_qat", {}).get("mean")
        print(
            f"{way:12} ratio {row['ratio']['mean']:.4f}"
            + (f"  recovery {row['recovery']['mean']:.0%}" if "recovery" in row else "")
            + (f"  of QAT's {share:.0%}" if share is not None else "")
            + (f"  merge moves logits by {row['logit_difference']:.2g}" if "logit_difference" in row else "")
        )
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
