"""One contestant of inference.py in a process of its own: it loads, tells what that took, and times a round a line.

    python inference_worker.py KIND FOLDER [--tokens N] [--prompt N] [--batch N]    "go" lines in, JSON lines out
    python inference_worker.py KIND FOLDER --cold                              tells what its files take from the disk

Kinds: ours, float32, bfloat16, torchao-int8, torchao-int4, llamacpp (where llama_cpp is installed: of it, nothing else
is imported); bert-ours, bert-float32, bert-bfloat16, both with -compiled, bert-onnxruntime, bert-openvino. Linux only:
memory is VmHWM, and what the system's cache holds of a file is asked by mincore.
"""

from __future__ import annotations

import argparse
import ctypes
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
    """Of reading these files into memory, from wherever the system has them."""
    buffer = bytearray(16 * 2**20)
    start = time.perf_counter()
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def drop(files: list[Path]) -> float:
    """Take files out of the system's cache; returns the part of them that stayed, such as what others have mapped."""
    for file in files:
        place = os.open(file, os.O_RDONLY)
        os.fsync(place)  # pages that are not written yet would stay
        os.posix_fadvise(place, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(place)
    return in_cache(files)


def in_cache(files: list[Path]) -> float:
    """The part of these files' pages that the system's cache holds."""
    import numpy as np

    page, held, pages = os.sysconf("SC_PAGE_SIZE"), 0, 0
    for file in files:
        mapped = np.memmap(file, dtype=np.uint8, mode="r")
        found = np.zeros(-(-mapped.size // page), dtype=np.uint8)
        address, length, to = (ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.size), found.ctypes.data)
        if ctypes.CDLL(None, use_errno=True).mincore(address, length, ctypes.c_void_p(to)):
            raise OSError(ctypes.get_errno(), f"mincore does not tell what is cached of {file}")
        held, pages = held + int((found & 1).sum()), pages + found.size
    return held / max(1, pages)


def cold(files: list[Path], load: Callable) -> dict[str, float]:
    """Seconds of reading and of loading these files from the disk, and what had stayed in the cache before each. They
    are read once before: where the disk is a virtual one, a cache lies below it that both then find alike."""
    drop(files)
    read_seconds(files)
    before_read = drop(files)
    reading = read_seconds(files)
    before_load = drop(files)
    start = time.perf_counter()
    load()
    loading = time.perf_counter() - start
    stayed = {"cached_before_read": before_read, "cached_before_load": before_load}
    return {"load_seconds": loading, "read_seconds": reading} | stayed


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
    from transformers import AutoModelForCausalLM

    from quantailor import api
    from quantailor.evaluate.speed import bytes_a_token, generation_times
    from quantailor.models.serving import serving

    ids = torch.arange(3, 3 + prompt)[None]

    def load():
        if kind == "ours":
            return api.load(folder).model.eval()
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
    from transformers import AutoModelForSequenceClassification

    from quantailor import api
    from quantailor.formats.engines import Engine
    from quantailor.models.serving import serving

    engine = {"bert-onnxruntime": "ONNX Runtime", "bert-openvino": "OpenVINO"}.get(kind)
    compiled = Compiled(len(batches)) if kind.endswith("-compiled") else None
    ids = (torch.arange(max(batches) * tokens) * 7919 % 30000 + 100).reshape(-1, tokens)

    def load():
        if engine:
            return Engine(engine, next(folder.rglob("*.onnx")))
        if kind == "bert-ours":
            return api.load(folder).model.eval()
        dtype = torch.bfloat16 if kind.startswith("bert-bfloat16") else torch.float32
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
        return compiled.of(model) if compiled else model

    def go(model):
        found = {}
        for batch in batches:
            given = {"input_ids": ids[:batch], "attention_mask": torch.ones_like(ids[:batch])}
            given["token_type_ids"] = torch.zeros_like(ids[:batch])
            with torch.inference_mode(), serving(model) if kind == "bert-ours" else nullcontext():
                repeats = 3 if batch == 1 else 1
                start = now()
                for _ in range(repeats):
                    model(given) if engine else model(**given)
            wall, cpu = (b - a for a, b in zip(start, now()))
            found |= {f"batch {batch}": batch * repeats / wall, f"batch {batch}_cpu": batch * repeats / cpu}
        return found | ({"compiled": compiled.told()} if compiled else {})

    return load, go


class Compiled:
    """torch.compile with weights frozen into the graph, a graph a shape, and the proof that this is what ran."""

    def __init__(self, shapes: int) -> None:
        import torch._inductor.config
        import torch._inductor.freezing as freezing

        torch._inductor.config.freezing = True
        self.shapes, self.frozen, freeze = shapes, 0, freezing.freeze

        def counted(*args, **options):
            self.frozen += 1
            return freeze(*args, **options)

        freezing.freeze = counted

    def of(self, model):
        """Compiled at the first call with each shape. What Dynamo cannot put into one graph raises (fullgraph)."""
        import torch

        return torch.compile(model, fullgraph=True, dynamic=False)

    def told(self) -> str:
        """Raises: RuntimeError where calls ran anything but one frozen graph a shape."""
        from torch._dynamo.utils import counters

        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        told = f"{graphs} graphs for {self.shapes} shapes, {breaks} graph breaks, {self.frozen} graphs frozen"
        if breaks or not graphs == self.frozen == self.shapes:
            raise RuntimeError(f"not compiled as meant: {told}")
        return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--cold", action="store_true")
    o = parser.parse_args()
    if o.kind == "llamacpp":
        load, go = llamacpp(o.folder, o.prompt, o.tokens)
    elif o.kind.startswith("bert"):
        load, go = encoder(o.kind, o.folder, (1, o.batch), 128)
    else:
        load, go = language_model(o.kind, o.folder, o.prompt, o.tokens)
    suffixes = (".safetensors", ".gguf", ".onnx", ".data")
    files = [o.folder] if o.folder.is_file() else [f for f in o.folder.rglob("*") if f.suffix in suffixes]
    if o.cold:
        print(json.dumps(cold(files, load)), flush=True)
        return
    reading, before = statistics.median([read_seconds(files) for _ in range(4)][1:]), memory("VmRSS")
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
