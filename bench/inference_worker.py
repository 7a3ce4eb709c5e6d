"""One contestant of inference.py in a process of its own: it loads, tells what that took, and times a round a line.

    python inference_worker.py KIND FOLDER [--tokens N] [--prompt N]     then "go" lines on stdin, JSON lines on stdout

Kinds: ours, float32, bfloat16, torchao-int8, torchao-int4, llamacpp (where llama_cpp is installed: of it, nothing else
is imported); bert-ours, bert-float32, bert-onnxruntime, bert-openvino. Linux only: memory is VmHWM.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path


def memory(field: str) -> int:
    """Bytes: VmRSS now, VmHWM at most since the process began."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def rates(times: list[tuple[float, float]], prompt: int) -> dict[str, float]:
    """Tokens a second and tokens a CPU second, of the prompt and of what follows; `times`: start, then each token."""
    found = {}
    for place, of in enumerate(("", "_cpu")):
        t = [pair[place] for pair in times]
        found |= {f"prefill{of}": prompt / (t[1] - t[0]), f"decode{of}": (len(t) - 2) / (t[-1] - t[1])}
    return found


def read_seconds(files: list[Path]) -> float:
    """Of reading these files into memory, when the system holds them in its cache; the median of three."""
    times = []
    buffer = bytearray(16 * 2**20)
    for _ in range(4):
        start = time.perf_counter()
        for file in files:
            with open(file, "rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def llamacpp(file: Path, prompt: int, tokens: int) -> tuple[Callable, Callable]:
    import llama_cpp
    import numpy as np

    threads = int(os.environ["BENCH_THREADS"])

    def load():
        return llama_cpp.Llama(
            str(file), n_ctx=prompt + tokens + 8, n_threads=threads, n_threads_batch=threads, verbose=False,
            logits_all=False, flash_attn=False,
        )  # fmt: skip

    def go(llm):
        llm.reset()
        times = [now()]
        llm.eval(list(range(3, 3 + prompt)))
        times.append(now())
        for _ in range(tokens - 1):
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(llm.ctx), shape=(llm.n_vocab(),))
            llm.eval([int(np.argmax(logits))])
            times.append(now())
        return rates(times, prompt)

    return load, go


def language_model(kind: str, folder: Path, prompt: int, tokens: int) -> tuple[Callable, Callable]:
    import torch

    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    from quantailor import api
    from quantailor.evaluate.speed import bytes_a_token, generation_times
    from quantailor.models.serving import serving

    ids = torch.arange(3, 3 + prompt)[None]

    def load():
        if kind == "ours":
            return api.load(folder).model.eval()
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if kind == "bfloat16" or kind == "torchao-int4" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        if kind.startswith("torchao"):
            _torchao(model, kind)
        return model

    def go(model):
        with torch.inference_mode(), serving(model) if kind == "ours" else nullcontext():
            times = generation_times(model, ids, tokens)
        size = {} if kind.startswith("torchao") else {"bytes_a_token": bytes_a_token(model)}  # subclasses hide theirs
        return rates(times, prompt) | size

    return load, go


def _torchao(model, kind: str) -> None:
    sys.path.append(os.environ["TORCHAO"])
    import torchao.quantization as q

    if kind == "torchao-int8":
        q.quantize_(model, q.Int8WeightOnlyConfig())
        return
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    q.quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32))


def encoder(kind: str, folder: Path, batches: tuple[int, ...], tokens: int) -> tuple[Callable, Callable]:
    import torch

    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    ids = (torch.arange(max(batches) * tokens) * 7919 % 30000 + 100).reshape(-1, tokens)

    def load():
        if kind in ("bert-onnxruntime", "bert-openvino"):
            from quantailor.formats.engines import Engine

            name = "OpenVINO" if kind == "bert-openvino" else "ONNX Runtime"
            return Engine(name, next(folder.rglob("*.onnx")))
        from quantailor import api

        return api.load(folder).model.eval()

    def go(model):
        from quantailor.models.serving import serving

        found = {}
        for batch in batches:
            given = {"input_ids": ids[:batch], "attention_mask": torch.ones_like(ids[:batch])}
            given["token_type_ids"] = torch.zeros_like(ids[:batch])
            with torch.inference_mode(), serving(model) if kind == "bert-ours" else nullcontext():
                repeats = 3 if batch == 1 else 1
                start = now()
                for _ in range(repeats):
                    model(given) if callable(getattr(model, "generation_speed", None)) else model(**given)
            wall, cpu = (b - a for a, b in zip(start, now()))
            found |= {f"batch {batch}": batch * repeats / wall, f"batch {batch}_cpu": batch * repeats / cpu}
        return found

    return load, go


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    o = parser.parse_args()
    if o.kind == "llamacpp":
        load, go = llamacpp(o.folder, o.prompt, o.tokens)
    elif o.kind.startswith("bert"):
        load, go = encoder(o.kind, o.folder, (1, 32), 128)
    else:
        load, go = language_model(o.kind, o.folder, o.prompt, o.tokens)
    suffixes = (".safetensors", ".gguf", ".onnx", ".data")
    files = [o.folder] if o.folder.is_file() else [f for f in o.folder.rglob("*") if f.suffix in suffixes]
    reading, before = read_seconds(files), memory("VmRSS")
    start = time.perf_counter()
    model = load()
    loaded = {"load_seconds": time.perf_counter() - start, "read_seconds": reading, "rss_before": before}
    loaded |= {"peak_after_load": memory("VmHWM"), "file_bytes": sum(f.stat().st_size for f in files)}
    print(json.dumps(loaded), flush=True)
    for line in sys.stdin:
        if line.strip() != "go":
            break
        print(json.dumps(go(model) | {"peak": memory("VmHWM")}), flush=True)


if __name__ == "__main__":
    main()
