"""How fast are packed models beside float, other engines and other tools, and how near the memory's limit?

    python bench/inference.py [--layers 22] [--rounds 3] [--threads 2] [--cold 1] [--work DIR] [--torchao DIR]
                              [--llamacpp VENV/bin/python] [--openvino DIR] [--only lm|bert] [--out FILE]
                              [--without '*bfloat16*']        where it is emulated, and slow

Two models of real shapes with seeded random weights, which is right for time and memory and says nothing of quality: a
1.1 B Llama (bench/ptq_memory.py), head quantized too, decoded at batch 1, and BERT-base, 128 tokens, batches of 1 and
32 (--batch). Each contestant is a process of its own (inference_worker.py), all are loaded first, and rounds go through
them in turn, forwards and backwards; the first round does not count. Where others work beside, a second says little:
tokens a CPU second are beside tokens a second, and mean most with --threads 1. Several OMP threads are bound to cores.
Ratios are taken round by round, against float32, bfloat16 in the same engine as ours, and (decoding) llama.cpp.
Compiled rows are torch.compile with weights frozen, compiled in the round that does not count; their row says that one
graph a shape ran, or they are not measured. Loading is timed with files in the system's cache and, before all else and
--cold times, with files dropped from it; where some stayed, a note says so. TORCHAO and OPENVINO are folders to import
these from, VENV has llama-cpp-python; what is not given, or fails, stands in the result as not measured, with the
reason. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from ptq_memory import make
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification, BertTokenizer

from quantailor import api
from quantailor.evaluate.speed import memory_gb_per_s
from quantailor.formats import gguf
from quantailor.formats.gguf_layers import with_half_scales
from quantailor.kernels.ops import multiplies_int8
from quantailor.models.prepare import pack_model, prepare
from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.verbs.quantizing import recipe_for

WORKER = Path(__file__).with_name("inference_worker.py")
LM_SCHEMES = ("w4a16-g32", "w8a16")
HALF = "w4a16-g32, half scales"  # the numbers that the GGUF holds
NOT_HERE = {"GPU": "there is none here", "bitsandbytes": "not run"}
if not multiplies_int8():
    NOT_HERE = {"AMX and AVX-512 kernels": "this machine has AVX2 alone"} | NOT_HERE


def packed_lm(folder: Path, scheme: str, out: Path) -> None:
    """Min-max ranges: which range was taken does not change the time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prepare(model, recipe_for(scheme, [api.Rule(api.Scheme.parse(scheme), "lm_head")], method="rtn"))
    pack_model(model)
    api.save(api.Model(model, AutoTokenizer.from_pretrained(folder), "lm"), out)


def with_scales_halved(folder: Path, out: Path) -> None:
    """As `quantailor convert --half-scales` does."""
    ready = api.load(folder)
    api.save(dataclasses.replace(ready, model=with_half_scales(ready.model)[0]), out)


def write_gguf(folder: Path, file: Path) -> None:
    """The same integers for llama.cpp, with half-precision scales; the tokenizer of words is none that it knows."""
    ready = api.load(folder)
    gguf.write(with_half_scales(ready.model)[0], file)


def bert(work: Path) -> dict[str, Path]:
    """BERT-base with random weights: float, w8a8 packed with dynamic and with static scales, and the ONNX files of the
    former."""
    places = {name: work / f"bert-{name}" for name in ("float", "w8a8", "w8a8-static", "onnx")}
    if not places["float"].exists():
        torch.manual_seed(0)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(30517))]
        BertTokenizer(vocab={word: n for n, word in enumerate(words)}).save_pretrained(places["float"])
        BertForSequenceClassification(BertConfig(num_labels=2)).save_pretrained(places["float"])
    if not places["w8a8"].exists():
        ready = api.load(places["float"])
        prepare(ready.model, recipe_for("w8a8", method="rtn"))
        pack_model(ready.model)
        api.save(ready, places["w8a8"])
    if not places["w8a8-static"].exists():
        ready = api.load(places["float"])
        prepare(ready.model, recipe_for("w8a8-static-minmax", method="rtn"))
        quantizers = [m for m in ready.model.modules() if isinstance(m, ActivationQuantizer)]
        for quantizer in quantizers:
            quantizer.start_calibration()
        with torch.inference_mode():
            ready.model(input_ids=(torch.arange(4 * 128) * 7919 % 30000 + 100).reshape(4, 128))
        for quantizer in quantizers:
            quantizer.finish_calibration()
        pack_model(ready.model)
        api.save(ready, places["w8a8-static"])
    if not places["onnx"].exists():
        api.export(places["w8a8"], places["onnx"], ["onnx"])
    return places


def from_disk(contestant: tuple, times: int) -> dict:
    """Of processes that read and load files dropped from the cache: the medians, the most that stayed, a note of it."""
    name, python, kind, place, env = contestant
    found = []
    for _ in range(times):
        command = [python, str(WORKER), kind, str(place), "--cold"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            return {"note": f"not measured: {done.stderr.strip()[-300:] or f'status {done.returncode}'}"}
        found.append(json.loads(lines[-1]))
    seconds = {key: statistics.median(one[key] for one in found) for key in ("load_seconds", "read_seconds")}
    stayed = max(one[key] for one in found for key in ("cached_before_read", "cached_before_load"))
    print(f"from disk {name} {seconds} {stayed:.1%} stayed in the cache", flush=True)
    note = f"{stayed:.1%} of the files stayed in the system's cache" if stayed > 0.01 else ""
    return seconds | {"stayed": stayed} | ({"note": note} if note else {})


class Contestant:
    """A worker that waits for its turn."""

    def __init__(self, name: str, python: str, kind: str, place: Path, env: dict[str, str], options: list[str]):
        self.name, self.rounds, self.failed = name, [], ""
        self.process = subprocess.Popen(
            [python, str(WORKER), kind, str(place), *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env,
        )  # fmt: skip
        self.loaded = self._answer()

    def _answer(self) -> dict:
        """The next JSON line; libraries that print others are passed over."""
        assert self.process.stdout is not None and self.process.stderr is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        self.failed = self.process.stderr.read().strip()[-300:] or f"status {self.process.wait()}"
        return {}

    def go(self) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def compare(contestants: list[tuple], keys: tuple[str, ...], o: argparse.Namespace) -> dict[str, dict]:
    """Name -> loading, memory, and each key's median and spread; failures with their reason."""
    running, found, options = [], {}, ["--tokens", str(o.tokens), "--batch", str(o.batch)]
    left_out = [one for one in contestants if any(fnmatch.fnmatchcase(one[0], p) for p in o.without)]
    contestants = [one for one in contestants if one not in left_out]
    # First, since what a contestant that waits has mapped cannot be dropped.
    cold = {one[0]: from_disk(one, o.cold) for one in contestants if o.cold}
    try:
        for name, *rest in contestants:
            one = Contestant(name, *rest, options)
            running.append(one)
            print(f"loaded {name}" if not one.failed else f"{name} failed: {one.failed}", flush=True)
        for turn in range(o.rounds + 1):
            for one in running if turn % 2 else running[::-1]:
                if one.failed:
                    continue
                answer = one.go()
                if turn and answer:
                    one.rounds.append(answer)
                print(f"round {turn} {one.name} {answer}", flush=True)
    finally:
        for one in running:
            one.stop()
    found |= {name: {"not_measured": "left out"} for name, *_ in left_out}
    for one in running:
        if one.failed or not one.rounds:
            found[one.name] = {"not_measured": one.failed or "no round was finished"}
            continue
        peak = max(r["peak"] for r in one.rounds)
        row = {**one.loaded, "peak": peak, "rounds": one.rounds}
        above = peak - one.loaded["rss_before"]
        row |= {"peak_over_file": above / one.loaded["file_bytes"]}
        row |= {"load_over_read": one.loaded["load_seconds"] / one.loaded["read_seconds"]}
        row |= loaded_cold(cold.get(one.name, {}), one.loaded["read_seconds"])
        row |= {key: one.rounds[-1][key] for key in ("compiled",) if key in one.rounds[-1]}
        for key in keys:
            values = [r[key] for r in one.rounds]
            row[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        found[one.name] = row
    return found


def loaded_cold(cold: dict, warm_read: float) -> dict:
    """What a row says of it. `warm_read`: seconds of reading the same files from the cache."""
    if "load_seconds" not in cold:
        return {"cold": cold} if cold else {}
    if "note" not in cold and cold["read_seconds"] < 1.2 * warm_read:
        cold["note"] = "read about as fast as from the system's cache: another cache lies below it"
    return {"cold": cold, "load_over_read_cold": cold["load_seconds"] / cold["read_seconds"]}


def against(found: dict[str, dict], base: str, key: str) -> None:
    """Ratios round by round, where both were measured."""
    if "rounds" not in found.get(base, {}):
        return
    for row in found.values():
        if "rounds" in row:
            ratios = [mine[key] / theirs[key] for mine, theirs in zip(row["rounds"], found[base]["rounds"])]
            span = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
            row.setdefault("against", {}).setdefault(base, {})[key] = span


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16, help="new ones of a language model a round")
    parser.add_argument("--batch", type=int, default=32, help="the larger one of BERT")
    parser.add_argument("--cold", type=int, default=1, help="loads from disk, of which the median; 0: none")
    parser.add_argument("--work", type=Path, default=None, help="where models are made and kept")
    parser.add_argument("--torchao", default="")
    parser.add_argument("--llamacpp", default="")
    parser.add_argument("--openvino", default="")
    parser.add_argument("--only", choices=("lm", "bert"))
    parser.add_argument("--without", nargs="*", default=[], help="patterns of contestants left out")
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    place = tempfile.TemporaryDirectory() if o.work is None else None
    work = Path(place.name) if place else o.work
    env = {"BENCH_THREADS": str(o.threads), "OMP_NUM_THREADS": str(o.threads), "TOKENIZERS_PARALLELISM": "false"}
    bound = env | ({"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"} if o.threads > 1 else {})
    ours, load_before = sys.executable, os.getloadavg()
    models: dict[str, dict] = {}
    left_out = dict(NOT_HERE)
    if o.only != "bert":
        folder = work / "float"
        if not folder.exists():
            folder.mkdir(parents=True)
            make(folder, o.layers)
        contestants = []
        for scheme in LM_SCHEMES:
            if not (work / scheme).exists():
                packed_lm(folder, scheme, work / scheme)
            contestants.append((f"quantailor {scheme}", ours, "ours", work / scheme, bound))
        if not (half := work / "w4a16-g32-half").exists():
            with_scales_halved(work / LM_SCHEMES[0], half)
        contestants.append((f"quantailor {HALF}", ours, "ours", half, bound))
        contestants += [(f"torch {kind}", ours, kind, folder, bound) for kind in ("float32", "bfloat16")]
        if o.torchao:
            way = bound | {"TORCHAO": o.torchao}
            contestants += [(f"torchao {k}", ours, f"torchao-{k}", folder, way) for k in ("int8", "int4")]
        else:
            left_out["torchao"] = "not given"
        if o.llamacpp:
            if not (file := work / "q4_0.gguf").exists():
                write_gguf(work / LM_SCHEMES[0], file)
            contestants.append(("llama.cpp Q4_0", o.llamacpp, "llamacpp", file, env))
        else:
            left_out["llama.cpp Q4_0"] = "not given"
        found = compare(contestants, ("prefill", "decode", "prefill_cpu", "decode_cpu"), o)
        for base in ("torch float32", "torch bfloat16", "llama.cpp Q4_0"):
            for key in ("prefill", "decode", "decode_cpu"):
                against(found, base, key)
        models["llama-1.1b"] = found
    if o.only != "lm":
        places = bert(work)
        ov = {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{o.openvino}"}
        contestants = [
            ("torch float32", ours, "bert-float32", places["float"], bound),
            ("torch bfloat16", ours, "bert-bfloat16", places["float"], bound),
            ("torch float32 compiled, frozen", ours, "bert-float32-compiled", places["float"], bound),
            ("torch bfloat16 compiled, frozen", ours, "bert-bfloat16-compiled", places["float"], bound),
            ("quantailor w8a8", ours, "bert-ours", places["w8a8"], bound),
            ("quantailor w8a8-static", ours, "bert-ours", places["w8a8-static"], bound),
            ("quantailor w8a8 in ONNX Runtime", ours, "bert-onnxruntime", places["onnx"], env),
        ]
        if o.openvino:
            contestants.append(("quantailor w8a8 in OpenVINO", ours, "bert-openvino", places["onnx"], env | ov))
        else:
            left_out["OpenVINO"] = "not given"
        keys = tuple(f"batch {size}{of}" for of in ("", "_cpu") for size in (1, o.batch))
        found = compare(contestants, keys, o)
        for base in ("torch float32", "torch bfloat16"):
            for key in keys:
                against(found, base, key)
        models["bert-base"] = found
    torch.set_num_threads(o.threads)
    gb_per_s = memory_gb_per_s()
    for row in models.get("llama-1.1b", {}).values():
        size = row.get("rounds", [{}])[0].get("bytes_a_token")  # other tools' files hold more than a token reads
        if "decode" in row and size:
            row["bytes_a_token"] = size
            row["share_of_limit"] = row["decode"]["median"] * size / 1e9 / gb_per_s
            row["gb_per_cpu_second"] = row["decode_cpu"]["median"] * size / 1e9
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=WORKER.parent)
    document = {
        "question": "inference of packed models beside float, other engines and other tools",
        "command": "python bench/inference.py " + " ".join(sys.argv[1:]),
        "commit": commit.stdout.strip(),
        "environment": api.environment() | {"threads": str(o.threads)},
        "memory_gb_per_s": gb_per_s,
        "load_before": load_before,
        "load_after": os.getloadavg(),
        "models": models,
        "not_measured": left_out,
    }
    for model, found in models.items():
        for name, row in found.items():
            kept = {k: f"{v['median']:.3g}" for k, v in row.items() if isinstance(v, dict) and "median" in v}
            print(model, name, kept or row, f"{row.get('share_of_limit', 0):.0%}")
    if o.out:
        o.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
