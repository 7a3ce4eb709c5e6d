"""Does the ranking of layers hold against brute force, and does mixed precision beat uniform at equal bytes?

    python bench/mixed_precision.py stories260k [--seeds 5] [--out bench/results/mixed_precision.json]

Ranking: every layer alone at 3 and at 2 bits, quantized by the library's own verb and measured on the whole validation
data (the change of the loss and of KL), against `sensitivity` on held training rows, measured and from gradients;
Spearman's rank correlation. Of a classifier also how far each row's loss moves, either way, in the mean: single layers
move the mean loss by less than the labels' noise, and as often down as up. Mixed: for calibration seeds 0 to 4,
`mixed` (layers solved one by one with GPTQ) against the uniform scheme of the very same bytes, scales counted; both
then quantized with Qronos, the default of one pass, on the same calibration rows and measured on the validation data:
KL and perplexity ratio to float. The classifier is MiniLM fine-tuned on SST-2 in float first (--steps). A run adds its
model to --out. QUANTAILOR_DATA points at models and data (docs/BENCHMARKS.md). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from seeds import interval

from quantailor.api import (
    Keep,
    Model,
    Rule,
    Settings,
    environment,
    examples_for,
    load,
    quantize,
    save,
    train,
)
from quantailor.data.examples import Examples
from quantailor.evaluate.run import evaluate, reference_for
from quantailor.models.roles import find_roles
from quantailor.searching.mixed import Search
from quantailor.searching.variants import unit_bytes
from quantailor.spec import Scheme
from quantailor.verbs.mixing import CHOICES
from quantailor.verbs.sensitivity import sensitivity
from quantailor.verbs.studying import study_for

DATA = Path(os.environ.get("QUANTAILOR_DATA", Path(__file__).parents[2] / "shared" / "data"))
UNIFORM = ("w4a16-g64", "w3a16-g32", "w2a16-g32")  # 4.5, 4.0 and 3.0 bits a weight with float32 scales
SEARCHED = ("q/k/v", "o", "ffn in", "ffn out")


def classifier(cache: Path, steps: int) -> Model:
    """MiniLM fine-tuned on SST-2 in float, kept in `cache`."""
    if not cache.exists():
        tasks = DATA / "tasks" / "sst2"
        settings = Settings(steps=steps, batch_size=32, learning_rate=1e-4)
        tuned = train(
            DATA / "models" / "minilm-l6-v2",
            tasks / "train.jsonl",
            scheme="float",
            eval_data=tasks / "dev.jsonl",
            settings=settings,
        )
        save(tuned, cache)
    return load(cache)


def loss_of(result: Any) -> float:
    return float(getattr(result, "nats_per_token", getattr(result, "mean_loss", float("nan"))))


def row_losses(result: Any) -> Any:
    """Cross-entropy of every row of a classifier's result; None for another task's."""
    if not hasattr(result, "log_probs"):
        return None
    return -result.log_probs[torch.arange(len(result.labels)), torch.from_numpy(result.labels)]


def ranking(model: Model, data: Examples, valid: Examples, reference: Any, bits: int) -> dict[str, Any]:
    """Spearman of both ways against brute force, over single layers (not units): more to rank."""
    before = getattr(reference, "result", reference)
    base, rows_before = loss_of(before), row_losses(before)
    found = {
        how: sensitivity(model, data, (bits,), how=how, tied=False, roles=SEARCHED) for how in ("measured", "fisher")
    }
    loss, kl, moved = {}, {}, {}
    for row in found["measured"].rows:
        rules = [
            Rule(Scheme.parse(f"w{bits}a16-g32"), pattern=row.unit.layers[0]),
            Rule(Keep("one layer alone"), pattern="*"),
        ]
        alone = evaluate(quantize(model, "float", data=data, rules=rules, method="gptq").model, valid, reference)
        loss[row.unit.name], kl[row.unit.name] = loss_of(alone) - base, float(alone.kl or 0.0)
        if rows_before is not None:
            moved[row.unit.name] = float((row_losses(alone) - rows_before).abs().mean())
    result: dict[str, Any] = {"bits": bits, "layers": len(loss), "validation_rows": len(valid)}
    for how, table in found.items():
        mine = [row.kl[bits] or 0.0 for row in table.rows]
        names = [row.unit.name for row in table.rows]
        result[how] = {
            "spearman_loss": float(spearmanr(mine, [loss[n] for n in names]).statistic),
            "spearman_kl": float(spearmanr(mine, [kl[n] for n in names]).statistic),
            "seconds": table.seconds,
        }
        if moved:
            result[how]["spearman_loss_of_rows"] = float(spearmanr(mine, [moved[n] for n in names]).statistic)
    result["changes"] = {n: {"loss": loss[n], "kl": kl[n], "loss_of_rows": moved.get(n)} for n in loss}
    result["spearman_of_brute_force_kl_and_loss"] = float(spearmanr(list(kl.values()), list(loss.values())).statistic)
    return result


def one_seed(
    model: Model, data: Examples, valid: Examples, reference: Any, uniform: list[str], seed: int
) -> list[dict[str, Any]]:
    """Mixed and uniform of the same bytes, solved and measured alike, for each uniform scheme; the layers are solved
    and measured once for all."""
    began = time.perf_counter()
    schemes = [Scheme.parse(c) for c in CHOICES]
    units = find_roles(model.model).of(*SEARCHED)
    study = study_for(model, data, units, schemes, seed=seed)
    study.solve()
    study.measure()
    shared = time.perf_counter() - began
    costs = {(u, s): unit_bytes(model.model, u, s) for u in units for s in schemes}
    weights = sum(u.num_weights for u in units)
    rows = []
    for scheme in uniform:
        budget = sum(unit_bytes(model.model, unit, Scheme.parse(scheme)) for unit in units)
        found = Search(study, costs, budget).run()
        chosen = {unit: schemes[i] for unit, i in zip(units, found.best.chosen)}
        rules = [Rule(s, pattern=layer) for unit, s in chosen.items() for layer in unit.layers]
        row: dict[str, Any] = {
            "uniform_scheme": scheme,
            "seed": seed,
            "validation_rows": len(valid),
            "bits_with_scales": 8 * budget / weights,
            "search_seconds": shared + found.seconds,
            "candidates": [{"name": c.name, "kl": c.kl, "bytes": c.cost} for c in found.candidates],
        }
        for name, added in (("uniform", []), ("mixed", rules)):
            made = quantize(model, scheme, data=data, rules=added, seed=seed)
            result = evaluate(made.model, valid, reference)
            row[name] = {"kl": result.kl, "loss": loss_of(result), result.metric: result.value}
            row["method"] = made.state.method
        row["uniform"]["bytes"], row["mixed"]["bytes"] = budget, found.best.cost
        row["assigned"] = {unit.name: str(s) for unit, s in chosen.items()}
        row["kl_ratio"] = row["mixed"]["kl"] / row["uniform"]["kl"]
        row["load"] = os.getloadavg()[0]
        rows.append(row)
        print(
            f"{scheme} seed {seed}: KL ratio {row['kl_ratio']:.3f}, {row['search_seconds']:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return rows


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a uniform scheme, over the seeds."""
    lines = []
    for scheme in dict.fromkeys(r["uniform_scheme"] for r in runs):
        mine = [r for r in runs if r["uniform_scheme"] == scheme]
        ratios = [r["kl_ratio"] for r in mine]
        losses = [r["mixed"]["loss"] - r["uniform"]["loss"] for r in mine]
        lines.append(
            {
                "uniform_scheme": scheme,
                "bits_with_scales": mine[0]["bits_with_scales"],
                "seeds": len(mine),
                "mixed_wins_kl": sum(ratio < 1 for ratio in ratios),
                "mixed_wins_loss": sum(loss < 0 for loss in losses),
                "kl_ratio": statistics.mean(ratios),
                "kl_ratio_interval": interval(ratios),
                "loss_difference": statistics.mean(losses),
                "loss_difference_interval": interval(losses),
                "search_seconds_most": max(r["search_seconds"] for r in mine),
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("stories260k", "tinystories-llama-4m", "minilm-sst2"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--uniform", nargs="*", default=list(UNIFORM))
    parser.add_argument("--bits", type=int, nargs="*", default=[3, 2], help="for the ranking; none: no ranking")
    parser.add_argument("--steps", type=int, default=54, help="of the classifier's float fine-tune")
    parser.add_argument("--limit", type=int, help="validation rows; all by default")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "quantailor-mixed")
    parser.add_argument("--out", type=Path, help="a model's runs are added to what is there, the same ones replaced")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    if options.model == "minilm-sst2":
        model = classifier(options.cache / f"minilm-sst2-{options.steps}", options.steps)
        texts = [DATA / "tasks" / "sst2" / f"{name}.jsonl" for name in ("train", "dev")]
    else:
        model = load(DATA / "models" / options.model)
        texts = [DATA / "text" / "tinystories" / f"{name}.txt" for name in ("train", "valid")]
    data, valid = (examples_for(model, text) for text in texts)
    valid = valid if options.limit is None else valid.take(options.limit)
    reference = reference_for(model.model, valid)
    document: dict[str, Any] = {}
    for bits in options.bits:
        document = add(options, [ranking(model, data, valid, reference, bits)], [])
    for seed in options.seeds:
        document = add(options, [], one_seed(model, data, valid, reference, options.uniform, seed))
    print(json.dumps(document))


def add(options: argparse.Namespace, rankings: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """This model's document with what was just measured, written at once: a long run that ends early loses nothing."""
    whole = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    before = whole.get(options.model, {"rankings": [], "runs": []})
    new = {(r["uniform_scheme"], r["seed"]) for r in runs}
    ranked = {r["bits"] for r in rankings}
    runs = [r for r in before["runs"] if (r["uniform_scheme"], r["seed"]) not in new] + runs
    rankings = [r for r in before["rankings"] if r["bits"] not in ranked] + rankings
    document = {
        "question": "sensitivity against brute force, mixed against uniform at equal bytes",
        "rankings": rankings,
        "mixed": summary(runs),
        "choices": list(CHOICES),
        "threads": torch.get_num_threads(),
        "environment": environment(),
        "command": " ".join(["python", "bench/mixed_precision.py", *sys.argv[1:]]),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip(),
        "runs": sorted(runs, key=lambda r: (r["uniform_scheme"], r["seed"])),
    }
    if options.out:
        options.out.write_text(json.dumps({**whole, options.model: document}, indent=1) + "\n")
    return document


if __name__ == "__main__":
    main()
