"""Do our GPU kernels pay, at layers 4096 wide?

    python bench/gpu.py [--rounds 7] [--out bench/results/gpu.json]

Three comparisons with bfloat16, whose contestants take turns (A B, B A, ...) after one round that does not count:

  step    a training step (forward, backward, AdamW) of four Linear layers, 4096 and 16384 tokens, under autocast: w8a8
          on integers beside the plain one. Asked: at most 1.00 of its time. Launched one by one as training does, and
          as a CUDA graph, which leaves out what launches from Python take.
  int8    one layer at 1024 and 4096 rows, from bfloat16 to bfloat16: the input is quantized within. As a CUDA graph,
          and launched one by one; the product alone is told as well, and whether our kernel or torch's product was
          the faster. Asked: 1.3 times as fast.
  decode  one layer of 4 bits in groups of 128, one row. Every call takes another layer of many, as in a model, or the
          second cache would hold the weights; the calls are one CUDA graph, because a launch from Python takes longer
          than the kernel. What they take one by one is told as well. Asked: twice as fast.

A ratio is taken round by round; the median and the range are told. Without a GPU nothing is measured: one line, status
2. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantailor.environment import environment
from quantailor.errors import UsageError
from quantailor.kernels import decode, passes
from quantailor.kernels.ops import IntegerInput, IntegerWeight, int_linear, product_here
from quantailor.kernels.triton import library as gpu
from quantailor.models.prepare import prepare
from quantailor.nn.int_forward import set_backward
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.observers.weights import weight_scale
from quantailor.recipe import Recipe
from quantailor.spec import Scheme

DEVICE = "cuda"
WIDE, GROUP, ROWS, TOKENS = 4096, 128, (1024, 4096), (4096, 16384)
ONE_BY_ONE, GRAPHED = ", launched one by one", ", as a CUDA graph"
BF16 = torch.bfloat16
Runs = dict[str, Callable[[], Any]]


def no_gpu() -> str:
    """Why nothing can be measured here; "" where it can."""
    return "" if torch.cuda.is_available() else "bench/gpu.py measures nothing here: torch sees no CUDA device"


def seconds(run: Callable[[], Any], calls: int) -> float:
    """Of one call, of `calls` in a row, the device waited for."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def in_turn(runs: Runs, rounds: int, least: float = 0.2) -> dict[str, list[float]]:
    """Seconds a call, a list of rounds; every round lasts about `least` seconds a contestant."""
    for run in runs.values():
        seconds(run, 3)  # compiled, and the fastest blocks found
    calls = {name: max(1, round(least / seconds(run, 3))) for name, run in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            took = seconds(runs[name], calls[name])
            if turn:
                found[name].append(took)
    return found


def span(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compared(found: dict[str, list[float]], mine: str, base: str, asked: float) -> dict[str, Any]:
    """Times of both, and how many times as fast `mine` is; `asked`: at least so many."""
    speedup = span([b / a for a, b in zip(found[mine], found[base])])
    ms = {name: {key: 1e3 * value for key, value in span(times).items()} for name, times in found.items()}
    return {"ms": ms, "of": base, "speedup": speedup, "asked": asked, "met": speedup["median"] >= asked}


def stepper(quantized: bool, tokens: int = TOKENS[0], graphed: bool = False) -> Callable[[], None]:
    """A training step of a stack of Linear layers, plain or on the integers of w8a8."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(nn.Linear(WIDE, WIDE) for _ in range(4)))
    if quantized:
        prepare(model, Recipe(Scheme.parse("w8a8"), (), "rtn"))
        quantizers = [m for m in model.modules() if isinstance(getattr(m, "weight_quantizer", None), WeightQuantizer)]
        assert len(quantizers) == 4, "a layer was left in float"
        for module in quantizers:
            scales = weight_scale(module.weight_ON.detach(), module.weight_quantizer.spec)  # type: ignore[union-attr]
            module.weight_quantizer.set_scale(*scales)  # type: ignore[union-attr]
        set_backward(model, BF16)
    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True, capturable=graphed and DEVICE == "cuda")
    x = torch.randn(tokens, WIDE, device=DEVICE, requires_grad=True)

    def step() -> None:
        with torch.autocast(DEVICE, BF16):
            y = model(x)
        y.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        x.grad = None

    return as_graph(step) if graphed else step


def integer_products(rows: int, graphed: bool) -> Runs:
    """One layer from bfloat16 to bfloat16: plain, on integers, and the integer product alone."""
    x = torch.randn(rows, WIDE, device=DEVICE, dtype=BF16)
    w = torch.randn(WIDE, WIDE, device=DEVICE, dtype=BF16) / 64
    scale = w.float().abs().amax(1, keepdim=True) / 127.5
    w_q = passes.quantize_weight(w.float(), scale, None, 0.0, -128, 127, WIDE)
    weight = IntegerWeight(w_q, scale, None, None)
    q, x_scale = passes.quantize_tokens(x, -128, 127)

    def on_integers() -> Tensor:
        return int_linear(IntegerInput(*passes.quantize_tokens(x, -128, 127)), weight, None, dtype=BF16)

    runs: Runs = {
        "bf16": lambda: F.linear(x, w),
        "int8": on_integers,
        "int8, the product alone": lambda: int_linear(IntegerInput(q, x_scale), weight, None, dtype=BF16),
    }
    for run in runs.values():
        run()  # which product is faster is measured outside of a graph
    return {name: as_graph(run) for name, run in runs.items()} if graphed else runs


def decoding(graphed: bool) -> tuple[Runs, int]:
    """(One row through many layers, plain and of 4 bits; how many layers a call goes through)."""
    layers = 24  # 800 MB in bfloat16, 200 MB at 4 bits: more than the second cache of any GPU so far
    x = torch.randn(1, WIDE, device=DEVICE, dtype=BF16)
    plain = [torch.randn(WIDE, WIDE, device=DEVICE, dtype=BF16) for _ in range(layers)]
    words = torch.randint(-(2**31), 2**31 - 1, (layers, WIDE, WIDE // 8), device=DEVICE, dtype=torch.int32)
    scale = torch.rand(WIDE, WIDE // GROUP, device=DEVICE)
    packed = [decode.StoredWeight(data, scale, 4, WIDE, GROUP, -8.0) for data in words]
    if reason := decode.why_not(packed[0], 1, DEVICE):
        raise UsageError(f"there is no kernel to measure: {reason}")
    runs: Runs = {
        "bf16": lambda: [F.linear(x, w) for w in plain],
        "int4": lambda: [decode.decode_linear(x, w, None, BF16) for w in packed],
    }
    return ({name: as_graph(run) for name, run in runs.items()} if graphed else runs), layers


def as_graph(run: Callable[[], Any]) -> Callable[[], None]:
    """The same work as one CUDA graph: no time goes to launches from Python."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # before it is recorded: compiles and tunes
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(held: Callable[[], Any] = run) -> None:  # the graph works on memory that only `run` keeps alive
        graph.replay()

    return replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    if reason := no_gpu():
        print(reason, file=sys.stderr)
        sys.exit(UsageError.exit_code)
    results: dict[str, Any] = {}
    not_measured: dict[str, str] = {}
    for tokens in TOKENS:
        for graphed in (False, True):
            steps = {name: stepper(name == "w8a8", tokens, graphed) for name in ("bf16", "w8a8")}
            row = compared(in_turn(steps, o.rounds), "w8a8", "bf16", asked=1.0)
            results[f"step, {tokens} tokens{GRAPHED if graphed else ''}"] = row
            del steps
    with torch.inference_mode():
        for rows in ROWS:
            for graphed in (True, False):
                found = in_turn(integer_products(rows, graphed), o.rounds)
                row = compared(found, "int8", "bf16", asked=1.3) | {"product": product_here(DEVICE, has_run=True)}
                results[f"int8, {rows} rows{'' if graphed else ONE_BY_ONE}"] = row
        for name, graphed in (("decode", True), (f"decode{ONE_BY_ONE}", False)):
            try:
                runs, layers = decoding(graphed)
            except UsageError as error:
                not_measured[name] = str(error)
                continue
            found = {run: [t / layers for t in times] for run, times in in_turn(runs, o.rounds).items()}
            results[name] = compared(found, "int4", "bf16", asked=2.0)
    for name, row in results.items():
        if name.endswith(ONE_BY_ONE):
            row.pop("met", None)  # told beside, and not what is asked for
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    document = {
        "question": "do our GPU kernels pay at layers 4096 wide",
        "command": shlex.join(["python", "bench/gpu.py", *sys.argv[1:]]),
        "commit": commit.stdout.strip(),
        "environment": environment() | {"cuda": str(torch.version.cuda)},
        "kernels": gpu.why_not(DEVICE) or "Triton's",
        "rounds": o.rounds,
        "results": results,
        "not_measured": not_measured,
    }
    print(f"kernels: {document['kernels']}")
    for name, row in results.items():
        speedup, times = row["speedup"], ", ".join(f"{n} {t['median']:.4f} ms" for n, t in row["ms"].items())
        mark = {True: "met", False: "MISSED", None: "told beside"}[row.get("met")]
        print(f"{name}: {speedup['median']:.2f} times as fast ({speedup['min']:.2f} to {speedup['max']:.2f}), "
              f"asked {row['asked']}: {mark}; {times}")  # fmt: skip
        if "product" in row:
            print(f"  the product by {row['product']}")
    for name, reason in not_measured.items():
        print(f"{name}: not measured: {reason}")
    if o.out:
        o.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
