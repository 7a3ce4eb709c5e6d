"""How good are our PTQ methods beside other tools, on the same model, calibration rows, bits, groups and evaluation?

Each rival runs in a virtual environment of its own (bench/rivals/README.md tells how they are made) and hands back
dequantized weights; they replace the float model's, and our evaluation measures all alike. Where a rival leaves layers
float, our methods run again on its layers alone. What could not run is in the table with its error.

    python bench/ptq_quality.py stories260k --bits 4 3 2 --draws 3 --venvs ~/.cache/quantailor-rivals
    python bench/ptq_quality.py stories260k --only ours --methods rtn,gptq,magr+qronos      runs ours alone
    python bench/ptq_quality.py stories260k --again 'ours:gptq' 'gptqmodel:*'               measure these once more

Every measurement is kept in --cache and only what is missing is run; --only limits what is run, and whatever the cache
has stands in the table. --seconds with --again keeps the quality figures and takes the time and memory once more.
Calibration: 128 rows (--rows) of 256 tokens of TinyStories' training text, drawn by the seeds 0, 1, ...; evaluation:
all of its validation text. Needs the models and texts named in docs/BENCHMARKS.md; QUANTAILOR_DATA points at them. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from quantailor.api import environment, examples_for

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "rivals")]
from job import block_linears  # noqa: E402
from judging import CONTEXT, DATA, Judge  # noqa: E402
from seeds import commit, interval  # noqa: E402

MODELS = ("stories260k", "tinystories-llama-4m")
ROWS = 128
Result = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One line of the table: `tool` names the environment and the adapter, `variant` its method.

    `draws` says whether calibration data matters to it; `bits` what it can do, None for anything.
    """

    tool: str
    variant: str = ""
    draws: bool = True
    bits: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return f"{self.tool}:{self.variant}" if self.variant else self.tool

    @property
    def ours(self) -> bool:
        return self.tool == "ours"


RIVALS = (  # the quick ones first
    Entry("torchao", "rtn", draws=False),
    Entry("torchao", "hqq", draws=False),
    Entry("hqq", draws=False),
    Entry("bitsandbytes", "nf4", draws=False, bits=(4,)),
    Entry("llmcompressor", "rtn-mse", draws=False),
    Entry("llmcompressor", "awq-mse"),
    Entry("llmcompressor", "gptq-mse"),
    Entry("llmcompressor", "gptq-imatrix"),
    Entry("gptqmodel", "gptq"),
    Entry("gptqmodel", "gptaq"),
    Entry("autoround"),
    Entry("autoround", "ext", bits=(2, 3)),
    Entry("brevitas", "gptq"),
    Entry("brevitas", "gpfq"),
    Entry("brevitas", "qronos"),
    Entry("brevitas", "magr+qronos"),
)


@dataclass(frozen=True)
class Case:
    """What is measured: an entry on a model. `layers` None: every Linear of the blocks; else these only."""

    entry: Entry
    model: str
    bits: int
    group_size: int
    draw: int
    layers: tuple[str, ...] | None = None
    rows: int = ROWS

    def file(self, cache: Path) -> Path:
        folder = cache / f"{self.model}-w{self.bits}g{self.group_size}"
        part = "" if self.layers is None else f"-of-{coverage_hash(self.layers)}"
        return folder / f"{self.entry.name.replace(':', '_')}{part}-draw{self.draw}{_rows(self.rows)}.json"

    def __str__(self) -> str:
        part = "" if self.layers is None else f" on {len(self.layers)} layers"
        return f"{self.model} w{self.bits} draw {self.draw} {self.entry.name}{part}"


def _rows(rows: int) -> str:
    """What marks files of another number of calibration rows than the usual one."""
    return "" if rows == ROWS else f"-rows{rows}"


def coverage_hash(layers: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(layers)).encode()).hexdigest()[:8]


def coverage(layers: Sequence[str], every: Sequence[str]) -> str:
    """What to call a set of layers: by the kinds that are left out.

    >>> coverage(["0.q", "1.q"], ["0.q", "1.q", "0.up", "1.up"])
    'without up'
    """
    left = [name for name in every if name not in layers]
    if not left:
        return "all layers"
    kinds = sorted({name.rpartition(".")[2] for name in left})
    whole = all(name in left for name in every if name.rpartition(".")[2] in kinds)
    return "without " + ", ".join(kinds) + ("" if whole else f" in part ({coverage_hash(layers)})")


def most_levels(weights: Sequence[torch.Tensor], group_size: int) -> int:
    """The most distinct values in a group of a row: more than 2^bits, and the weights are not what was asked for.

    >>> most_levels([torch.tensor([[0.0, 1.0, 1.0, 2.0, 3.0]])], 4)
    3
    """
    most = 0
    for weight in weights:
        for group in weight.split(group_size, dim=1):
            ordered = group.sort(dim=1).values
            most = max(most, 1 + int((ordered.diff(dim=1) != 0).sum(1).max()))
    return most


class Bench:
    """Runs cases: a subprocess each, so that time and memory are its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.judges: dict[str, Judge] = {}

    def judge(self, model: str) -> Judge:
        if model not in self.judges:
            self.judges[model] = Judge(model)
        return self.judges[model]

    def calibration(self, model: str, draw: int) -> Path:
        """The rows drawn by seed `draw`, int32 [rows, 256], written once."""
        path = self.options.cache / "calibration" / f"{model}-draw{draw}{_rows(self.options.rows)}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            train = examples_for(self.judge(model).float, DATA / "text" / "tinystories" / "train.txt", context=CONTEXT)
            drawn = train.batches(16, shuffle=True, seed=draw, limit=self.options.rows)
            np.save(path, torch.cat([batch["input_ids"] for batch in drawn]).numpy().astype(np.int32))
        return path

    def measure(self, case: Case) -> Result | None:
        """From the cache, or new; with `error` in it where it could not run. None: not there and not asked for."""
        path = case.file(self.options.cache)
        old = json.loads(path.read_text()) if path.exists() else None
        if not chosen(case.entry, self.options.only):
            return old
        again = any(fnmatch.fnmatchcase(case.entry.name, pattern) for pattern in self.options.again)
        if old is not None and (not again or old.get("started", 0) >= self.options.since):
            return old
        result = self._run(case)
        if self.options.seconds and old is not None and "error" not in old and "error" not in result:
            result |= {"judged": old["judged"]}
        if old is not None:
            result["earlier"] = [*old.pop("earlier", []), _timing(old)]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(path)
        return result

    def _run(self, case: Case) -> Result:
        entry = case.entry
        python = Path(sys.executable) if entry.ours else self.options.venvs / entry.tool / "bin" / "python"
        result: Result = {"entry": entry.name, "started": time.time(), "commit": commit(), "load": [os.getloadavg()[0]]}
        if not python.exists():
            return result | {"error": f"no virtual environment {python}; bench/rivals/README.md tells how to make it"}
        with tempfile.TemporaryDirectory() as folder:
            command = [str(python), str(HERE / "rivals" / f"run_{entry.tool}.py")]
            command += ["--model", str(DATA / "models" / case.model), "--out", folder]
            command += ["--calibration", str(self.calibration(case.model, case.draw).resolve())]
            command += ["--bits", str(case.bits), "--group-size", str(case.group_size)]
            command += ["--threads", str(self.options.threads)]
            command += ["--variant", entry.variant] if entry.variant else []
            if case.layers is not None:
                (Path(folder) / "only.json").write_text(json.dumps(case.layers))
                command += ["--only", f"{folder}/only.json"]
            offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            threads = {"OMP_NUM_THREADS": str(self.options.threads)}
            # In the empty folder, so that nothing that lies about is imported in place of a package.
            try:
                done = subprocess.run(
                    command,
                    cwd=folder,
                    env=os.environ | offline | threads,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    timeout=self.options.timeout,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return result | {"error": f"not done after {self.options.timeout} s"}
            result["load"].append(os.getloadavg()[0])
            receipt = Path(folder) / "receipt.json"
            if done.returncode or not receipt.exists():
                lines = [s for s in done.stdout.decode(errors="replace").replace("\r", "\n").splitlines() if s.strip()]
                return result | {"error": lines[-1] if lines else f"exit {done.returncode}", "log": lines[-25:]}
            result |= json.loads(receipt.read_text())
            if "judged" not in result:
                weights = Path(folder) / "weights.safetensors"
                result["judged"] = self._judge(case.model, weights, result["quantized"], case.group_size)
                if (levels := result["judged"]["levels"]) > 2**case.bits:
                    result["notes"].append(
                        f"{levels} levels in {case.group_size} weights of a row: other groups or grid"
                    )
        if not math.isfinite(result["judged"]["ratio"]):
            return result | {"error": "its perplexity is not finite", "judged": None}
        return result

    def _judge(self, name: str, weights: Path, quantized: Sequence[str], group_size: int) -> Result:
        """Our evaluation of the float model with just these tensors replaced."""
        judge = self.judge(name)
        model = judge.float.model
        new = load_file(weights)
        parameters = dict(model.named_parameters())
        old = {key: parameters[key].detach().clone() for key in new}
        try:
            with torch.no_grad():
                for key, tensor in new.items():
                    if tensor.shape != old[key].shape:
                        raise ValueError(f"{key} came back as {list(tensor.shape)}, it is {list(old[key].shape)}")
                    parameters[key].copy_(tensor)
            return judge(model) | {"levels": most_levels([new[f"{n}.weight"] for n in quantized], group_size)}
        finally:
            with torch.no_grad():
                for key, tensor in old.items():
                    parameters[key].copy_(tensor)


def _timing(result: Result) -> Result:
    return {key: result.get(key) for key in ("started", "commit", "seconds", "peak_rss_mib", "load", "error")}


def chosen(entry: Entry, only: Sequence[str]) -> bool:
    """Whether a pattern names the entry or its tool; all where there is no pattern."""
    return not only or any(fnmatch.fnmatchcase(n, p) for n in (entry.name, entry.tool) for p in only)


Table = dict[tuple[str, int, str], dict[str, list[Result]]]  # (model, bits, coverage) -> entry -> a result a draw


def run_all(bench: Bench, options: argparse.Namespace) -> Iterator[tuple[Case, Result, str]]:
    """(case, its result, which layers it is compared on), rivals first, then ours on each set of layers they left."""
    ours = [Entry("ours", method) for method in options.methods.split(",")]
    for draw in range(options.draws):
        for bits in options.bits:
            for model in options.models:
                every = tuple(sorted(block_linears(bench.judge(model).float.model)))
                coverages: dict[str, tuple[str, ...] | None] = {coverage(every, every): None}
                for entry in RIVALS:
                    if entry.bits is not None and bits not in entry.bits:
                        continue
                    number = draw if entry.draws else 0
                    case = Case(entry, model, bits, options.group_size, number, rows=options.rows)
                    result = bench.measure(case)
                    if result is None:
                        continue
                    layers = tuple(result.get("quantized", every))
                    where = coverage(layers, every)
                    if "error" not in result:
                        coverages[where] = None if layers == every else layers
                    if entry.draws or draw == 0:
                        yield case, result, where
                for where, layers in coverages.items():
                    for entry in ours:
                        case = Case(entry, model, bits, options.group_size, draw, layers, options.rows)
                        result = bench.measure(case)
                        if result is not None:
                            yield case, result, where


def summary(results: Sequence[Result]) -> Result:
    """Means over the draws; the error where one failed."""
    if errors := [r["error"] for r in results if "error" in r]:
        return {"draws": len(results), "error": errors[0]}
    figures = [r["judged"] for r in results]
    ratios = [f["ratio"] for f in figures]
    return {
        "draws": len(results),
        "ratio": statistics.mean(ratios),
        "ratio_interval": interval(ratios),
        "excess": statistics.mean(ratios) - 1,
        "kl": statistics.mean(f["kl"] for f in figures),
        "kl_interval": interval([f["kl"] for f in figures]),
        "top1_agreement": statistics.mean(f["top1_agreement"] for f in figures),
        "seconds": statistics.median(r["seconds"] for r in results),
        "peak_rss_mib": statistics.median(r["peak_rss_mib"] for r in results),
        "load": max(load for r in results for load in r["load"]),
        "versions": results[-1]["versions"],
        "settings": results[-1]["settings"],
        "notes": sorted({note for r in results for note in r["notes"]}),
        "ratios": ratios,
        "kls": [f["kl"] for f in figures],
    }


def verdict(rows: dict[str, Result]) -> Result | None:
    """The best rival against our best, by perplexity and by KL: ratios, with an interval over paired draws."""
    sound = {name: row for name, row in rows.items() if "error" not in row}
    theirs = {n: r for n, r in sound.items() if not n.startswith("ours")}
    own = {n: r for n, r in sound.items() if n.startswith("ours")}
    if not theirs or not own:
        return None
    found: Result = {}
    for figure, each in (("ratio", "ratios"), ("kl", "kls")):
        best, mine = (min(group, key=lambda n: group[n][figure]) for group in (theirs, own))
        a, b = own[mine][each], theirs[best][each]
        b = b * len(a) if len(b) == 1 else b
        paired = [x / y for x, y in zip(a, b)] if len(a) == len(b) else [own[mine][figure] / theirs[best][figure]]
        found["perplexity" if figure == "ratio" else "kl"] = {
            "best_rival": best,
            "ours": mine,
            "of_the_rivals": statistics.mean(paired),
            "interval": interval(paired),
            "best_rival_value": theirs[best][figure],
            "our_value": own[mine][figure],
        }
    return found


def printed(rows: dict[str, Result], final: Result | None) -> str:
    """The table of one model and width, best first, failures last."""
    lines = [f"{'':24}{'ppl/float':>10} {'95 %':>19}{'KL':>10}{'top-1':>8}{'seconds':>9}{'MiB':>7}{'draws':>6}"]
    for name, row in sorted(rows.items(), key=lambda item: item[1].get("ratio", float("inf"))):
        if "error" in row:
            lines.append(f"{name:24}  could not run: {row['error'][:110]}")
            continue
        low_high = row["ratio_interval"]
        span = f"{low_high[0]:.4f}..{low_high[1]:.4f}" if low_high else ""
        figures = f"{row['kl']:10.5f}{row['top1_agreement']:8.2%}{row['seconds']:9.1f}{row['peak_rss_mib']:7.0f}"
        lines.append(f"{name:24}{row['ratio']:10.4f} {span:>19}{figures}{row['draws']:6}")
    for figure, found in (final or {}).items():
        span = f" ({found['interval'][0]:.4f}..{found['interval'][1]:.4f})" if found["interval"] else ""
        lines.append(
            f"  {figure}: best rival {found['best_rival']} {found['best_rival_value']:.5f}, {found['ours']} "
            f"{found['our_value']:.5f}: {found['of_the_rivals']:.4f}{span} of the rival's"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--rows", type=int, default=ROWS, help="calibration rows of 256 tokens, for everybody")
    parser.add_argument("--methods", default="rtn,gptq,qronos,blockap", help="of ours, by comma; chains as well")
    parser.add_argument("--only", nargs="*", default=[], help="entries or tools to take, such as ours or brevitas:*")
    parser.add_argument("--again", nargs="*", default=[], help="entries to measure although the cache has them")
    parser.add_argument("--seconds", action="store_true", help="of --again keep the quality, take time and memory only")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    parser.add_argument("--timeout", type=int, default=3600, help="seconds a case")
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache" / "quantailor-rivals")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "quantailor-rivals" / "results")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.since = time.time()  # what is newer than this was measured by this very call
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    table: Table = {}
    for case, result, where in run_all(bench, options):
        table.setdefault((case.model, case.bits, where), {}).setdefault(case.entry.name, []).append(result)
        state = result.get("error") or f"ppl/float {result['judged']['ratio']:.4f}, {result['seconds']:.1f} s"
        print(f"{case}: {state[:150]}", flush=True)
    cases = []
    for (model, bits, where), entries in table.items():
        rows = {name: summary(results) for name, results in entries.items()}
        final = verdict(rows)
        print(f"\n{model} W{bits} g{options.group_size}, {where}\n{printed(rows, final)}")
        cases.append({"model": model, "bits": bits, "layers": where, "rows": rows, "verdict": final})
    document = {
        "question": "PTQ quality beside other tools",
        "group_size": options.group_size,
        "calibration": {"rows": options.rows, "tokens": CONTEXT, "seeds": list(range(options.draws))},
        "threads": options.threads,
        "commit": commit(),
        "environment": environment(),
        "load_now": os.getloadavg(),
        "command": shlex.join(["python", "bench/ptq_quality.py", *sys.argv[1:]]),
        "cases": cases,
    }
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
