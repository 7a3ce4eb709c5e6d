"""What does a quantization-aware training step cost beside the plain step it replaces?

BERT-base with 32 rows of 128 tokens and a Llama of 110 million parameters with 4 of 256: forward, backward, AdamW. Each
contestant trains in a process of its own, in its own environment (bench/rivals/README.md), threads bound to cores, one
after another and in turn: A B C, C B A, ... A ratio is taken round by round against the plain step of that round; the
median and the range are told. Peak memory is that of the process above its imports.

    python bench/qat_step.py bert llama --rounds 3 --out bench/results/qat_step.json
    python bench/qat_step.py llama --without '*bf16*'                              where bfloat16 is emulated
    python bench/qat_step.py bert --only plain 'ours*' --profile 'ours w8a8'      where the time goes
    python bench/qat_step.py llama --device cuda                                   the same on a GPU

The last line is JSON.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from quantailor.environment import environment

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "steps"))
from worker import CONTESTANTS, SHAPES  # noqa: E402

PARTS = ("step", "forward", "backward", "update")
# What the ratios are held against: (contestant, of which plain step, at most, on which model).
TARGETS = (
    ("ours w8a8", "plain", "step", 0.45, "bert"),
    ("ours w8a8", "plain", "step", 0.55, "llama"),
    ("ours w8a8, bf16", "plain, bf16", "step", 1.10, "bert"),
    ("ours w8a8, bf16", "plain, bf16", "step", 1.10, "llama"),
    ("ours w4a16-g32", "plain", "step", 1.10, "bert"),
    ("ours w4a16-g32", "plain", "step", 1.10, "llama"),
    ("ours w4a16-g32, compiled", "plain, compiled", "step", 1.05, "bert"),
    ("ours w4a16-g32, compiled", "plain, compiled", "step", 1.05, "llama"),
    ("ours w8a8", "plain", "peak_bytes", 0.85, "bert"),
    ("ours w4a16-g32", "plain", "peak_bytes", 1.10, "bert"),
)


def run(name: str, model: str, options: argparse.Namespace, profile: bool = False) -> dict[str, Any]:
    """One contestant, one round; with `error` in it where it could not run."""
    package = CONTESTANTS[name][3]
    foreign = package if package != "torch" else None
    python = options.venvs / foreign / "bin" / "python" if foreign else Path(sys.executable)
    if not python.exists():
        return {"error": f"no virtual environment {foreign}; bench/rivals/README.md tells how it is made"}
    command = [str(python), str(HERE / "steps" / "worker.py"), name, "--model", model, "--steps", str(options.steps)]
    command += ["--device", options.device] + (["--profile"] if profile else [])
    binding = {"OMP_NUM_THREADS": str(options.threads), "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    try:
        done = subprocess.run(
            command, env=os.environ | binding, capture_output=True, text=True, timeout=options.timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {options.timeout} s"}
    if profile:
        print(done.stdout or done.stderr)
        return {}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        told = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": told[-1] if told else f"exit {done.returncode}"}
    result: dict[str, Any] = json.loads(lines[-1])
    return result | {"load": os.getloadavg()[0]}


def middle(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(mine: list[dict[str, Any]], theirs: list[dict[str, Any]], part: str) -> list[float]:
    """Round by round; the fastest step of each, since what disturbs only makes slower."""

    def value(result: dict[str, Any]) -> float:
        return float(result[part] if part.endswith("bytes") else min(t[part] for t in result["times"]))

    return [value(a) / value(b) for a, b in zip(mine, theirs)]


def summary(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A row a contestant: seconds, ratios to the plain step of its own kind, memory."""
    rows: dict[str, Any] = {}
    for name, rounds in results.items():
        if errors := [r["error"] for r in rounds if "error" in r]:
            rows[name] = {"error": errors[0]}
            continue
        row: dict[str, Any] = {
            "seconds": {part: middle([min(t[part] for t in r["times"]) for r in rounds]) for part in PARTS},
            "peak_bytes": middle([r["peak_bytes"] for r in rounds]),
            "kept_bytes": rounds[0]["kept_bytes"],
            "loss": rounds[0]["loss"],
            "versions": rounds[0]["versions"],
            "native": rounds[0].get("native"),
            "load": max(r["load"] for r in rounds),
            "against": {},
        }
        for base in ("plain", "plain, compiled", "plain, bf16", "plain, bf16 compiled"):
            if base in results and all("error" not in r for r in results[base]):
                row["against"][base] = {
                    part: middle(ratios(rounds, results[base], part)) for part in (*PARTS, "peak_bytes")
                }
        rows[name] = row
    return rows


def printed(model: str, rows: dict[str, Any]) -> str:
    lines = [
        f"\n{model:30}{'step s':>10} {'of plain':>20} {'of bf16':>20}{'fwd':>6}{'bwd':>6}{'peak GiB':>10}{'kept':>7}"
    ]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"{name:30}  could not run: {row['error'][:120]}")
            continue
        spans = []
        for base in ("plain", "plain, bf16"):
            span = row["against"].get(base, {}).get("step")
            spans.append(f"{span['median']:.2f} [{span['min']:.2f}-{span['max']:.2f}]" if span else "")
        parts = row["against"].get("plain", {})
        parts_text = "".join(f"{parts[p]['median']:6.2f}" if p in parts else "      " for p in ("forward", "backward"))
        kept = "" if row["kept_bytes"] is None else f"{row['kept_bytes'] / 2**30:7.2f}"
        seconds, peak = row["seconds"]["step"]["median"], row["peak_bytes"]["median"] / 2**30
        lines.append(f"{name:30}{seconds:10.2f} {spans[0]:>20} {spans[1]:>20}{parts_text}{peak:10.2f}{kept}")
    return "\n".join(lines)


def verdicts(model: str, rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target of this model with what was measured."""
    found = []
    for name, base, part, most, where in TARGETS:
        ratio = rows.get(name, {}).get("against", {}).get(base, {}).get(part)
        if where == model and ratio is not None:
            found.append(
                {"contestant": name, "of": base, "what": part, "at_most": most, **ratio, "met": ratio["median"] <= most}
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=list(SHAPES))
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of contestants; plain steps always run")
    parser.add_argument("--without", nargs="*", default=[], help="patterns of contestants left out, plain ones too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps a round, after an untimed one")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--timeout", type=int, default=900, help="seconds a contestant and round")
    parser.add_argument("--profile", help="only print where this contestant's time goes")
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache" / "quantailor-rivals")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.profile:
        for model in options.models:
            run(options.profile, model, options, profile=True)
        return

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    asked = [n for n in CONTESTANTS if n.startswith("plain") or matches(n, options.only)]
    names = [n for n in asked if not matches(n, options.without)]
    document: dict[str, Any] = {
        "question": "the cost of a QAT step beside the plain step",
        "command": shlex.join(["python", "bench/qat_step.py", *sys.argv[1:]]),
        "environment": environment() | {"threads": str(options.threads)},
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE, check=False
        ).stdout.strip(),
        "rounds": options.rounds,
        "models": {},
    }
    for model in options.models:
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for turn in range(options.rounds):
            for name in names if turn % 2 == 0 else names[::-1]:
                if results[name] and "error" in results[name][-1]:
                    continue
                results[name].append(run(name, model, options))
                last = results[name][-1]
                told = last.get("error") or f"{min(t['step'] for t in last['times']):.2f} s"
                print(f"{model} round {turn + 1} {name}: {told[:150]}", flush=True)
        rows = summary(results)
        document["models"][model] = {"rows": rows, "targets": verdicts(model, rows)}
        print(printed(model, rows))
        for verdict in document["models"][model]["targets"]:
            mark = "met" if verdict["met"] else "MISSED"
            print(f"  {verdict['contestant']} / {verdict['of']}, {verdict['what']}: {verdict['median']:.3f}"
                  f" (at most {verdict['at_most']}): {mark}")  # fmt: skip
        if options.out:  # after each model, since the next one takes as long again
            options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
