"""What does each way of saving save, and what does it cost? Every row is the same QAT with one thing switched on.

AMP, accumulation, partial quantization, freezing 80 % of the blocks, progressive bits, gradient checkpointing. Time and
memory are of single steps of a Llama of 10 blocks with random weights, on and off in turn, in a process of their own
each; seconds are CPU seconds of one thread, since other work on the machine does not count into them. The metric is of
whole runs on stories260k at 2 bits (nats a token on validation text; its best iterate is chosen on other text).

    python bench/savers.py --out bench/results/savers.json

What was measured is kept in --cache, a line each, and only what is missing is run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from seeds import interval
from transformers import LlamaConfig, LlamaForCausalLM

import quantailor as qt
from quantailor.api import environment, examples_for
from quantailor.models.prepare import FAKE_QUANT, prepare
from quantailor.models.structure import modules_of
from quantailor.qat.freezing import frozen

DATA = Path(os.environ.get("QUANTAILOR_DATA", Path(__file__).parents[2] / "shared" / "data"))
SCHEME = "w2a16-g32"
ROWS, LENGTH = 8, 64


@dataclass(frozen=True)
class Saver:
    """What is switched on. `settings`: of `qt.Settings`; `keep_below`: layers of fewer weights stay float; `stages`:
    bits one after the other, sharing the steps."""

    settings: dict[str, Any] = field(default_factory=dict)
    keep_below: int = 0
    stages: tuple[int, ...] = ()


SAVERS = {
    "nothing": Saver(),
    "AMP (bfloat16)": Saver({"precision": "bfloat16"}),
    "accumulation, 4 x 2 rows": Saver({"batch_size": 2, "accumulate": 4}),
    "partial: FFN alone": Saver(keep_below=40_000),
    "freezing 80 % of the blocks": Saver({"freeze_lower": 0.8}),
    "progressive 8, 4, 2 bits": Saver(stages=(8, 4, 2)),
    "gradient checkpointing": Saver({"gradient_checkpointing": True}),
}
SMALL = {"partial: FFN alone": 9_000}  # of stories260k: its attention has 4,096 and 2,048 a layer, its FFN 11,008


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`work` in a fork of this process: a heap of its own, and no second import."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, json.dumps(work()).encode())
        except BaseException as error:
            os.write(write, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    return json.loads(text or b'{"error": "died"}')


def resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def recipe(saver: Saver, keep_below: int) -> qt.Recipe:
    rules = (qt.Rule(qt.Keep("small"), fewer_than=keep_below),) if saver.keep_below else ()
    return qt.Recipe(qt.Scheme.parse(SCHEME), rules, "rtn")


def steps_of(name: str, count: int) -> dict[str, Any]:
    """CPU seconds of forward, backward and update (medians), and the peak above the weights, of one saver."""
    saver = SAVERS[name]
    settings = qt.Settings(**{"batch_size": ROWS, **saver.settings})
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=10, num_attention_heads=4, vocab_size=512,
        use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    prepare(model, recipe(saver, saver.keep_below))
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.randint(1, 512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    start = resident("VmRSS")
    times: list[dict[str, float]] = []
    with frozen(model, settings):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        for _ in range(count + 1):
            spent = {"forward": 0.0, "backward": 0.0}
            for part in ids.split(settings.batch_size):
                began = time.process_time()
                autocast = settings.precision == "bfloat16"
                with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                    loss = model(input_ids=part, labels=part).loss / settings.accumulate
                middle = time.process_time()
                loss.backward()
                spent["forward"] += middle - began
                spent["backward"] += time.process_time() - middle
            began = time.process_time()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            spent["update"] = time.process_time() - began
            times.append(spent | {"step": sum(spent.values())})
    medians = {part: statistics.median(t[part] for t in times[1:]) for part in times[0]}
    return {"seconds": medians, "peak_bytes": resident("VmHWM") - start, "load": os.getloadavg()[0]}


def run_of(name: str, seed: int, steps: int) -> dict[str, Any]:
    """One whole run: the metric before and after, and its CPU seconds."""
    saver = SAVERS[name]
    model = qt.load(DATA / "models" / "stories260k")
    whole = (DATA / "text" / "tinystories" / "train.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    text = [part.strip() for part in whole]
    train = examples_for(model, text[:400], context=LENGTH)
    choose = examples_for(model, text[-60:], context=LENGTH).take(48)
    judged = examples_for(model, DATA / "text" / "tinystories" / "valid.txt", context=LENGTH).take(160)
    rules = recipe(saver, SMALL[name]).rules if saver.keep_below else ()
    began = time.process_time()
    current, done = model, model
    stages = saver.stages or (2,)
    start = 0.0
    for bits in stages:
        ptq = qt.quantize(current, f"w{bits}a16-g32", data=train, samples=32, method="rtn", rules=rules, seed=seed)
        start = start or math_log(qt.eval(ptq, judged).value)
        settings = qt.Settings(
            **{"steps": steps // len(stages), "batch_size": ROWS, "evaluations": 2, "seed": seed, **saver.settings}
        )
        done = qt.train(ptq, train, eval_data=choose, teacher=model, settings=settings)
        if bits != stages[-1]:
            current = with_trained_weights(model, done)
    return {
        "start": start,
        "nats": math_log(qt.eval(done, judged).value),
        "seconds": time.process_time() - began,
        "float": math_log(qt.eval(model, judged).value),
        "load": os.getloadavg()[0],
    }


def math_log(perplexity: float) -> float:
    return float(torch.tensor(perplexity, dtype=torch.float64).log())


def with_trained_weights(model: qt.Model, trained: qt.Model) -> qt.Model:
    """The float model with the float weights that training moved: what the next stage quantizes."""
    new = copy.deepcopy(model)
    places, values = dict(new.model.named_parameters()), dict(trained.model.named_parameters())
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(values[name])
    assert any(True for _ in modules_of(trained.model, FAKE_QUANT))
    return new


def cached(path: Path, key: list[Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for line in lines:
        if line["key"] == key:
            return line["found"]
    found = in_child(work)
    print(*key, found, flush=True)
    if "error" not in found:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as stream:
            stream.write(json.dumps({"key": key, "found": found}) + "\n")
    return found


def spread(values: list[float]) -> dict[str, Any]:
    """Median and range; 95 % of the mean over two to five values."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return found | {"mean": statistics.mean(values), "interval": interval(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of the steps, on and off in turn")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="of each run")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "quantailor-savers")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in SAVERS}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SAVERS}
    file = options.cache / "savers.jsonl"
    for turn in range(options.rounds):
        for name in list(SAVERS) if turn % 2 == 0 else list(SAVERS)[::-1]:
            if not SAVERS[name].stages:  # its steps are those of `nothing`
                steps[name].append(cached(file, ["step", name, turn], lambda name=name: steps_of(name, 2)))
    for seed in range(options.seeds):
        for name in SAVERS:
            key = ["run", name, seed, options.steps]
            runs[name].append(cached(file, key, lambda name=name, seed=seed: run_of(name, seed, options.steps)))
    rows = {}
    for name in SAVERS:
        row: dict[str, Any] = {}
        if all("error" not in s for s in steps[name]) and steps[name]:
            pairs = list(zip(steps[name], steps["nothing"]))
            row["time"] = {
                part: spread([mine["seconds"][part] / off["seconds"][part] for mine, off in pairs])
                for part in ("step", "forward", "backward", "update")
            }
            row["memory"] = spread([mine["peak_bytes"] / off["peak_bytes"] for mine, off in pairs])
            row["peak_bytes"] = statistics.median(mine["peak_bytes"] for mine, _ in pairs)
            row["step_seconds"] = statistics.median(mine["seconds"]["step"] for mine, _ in pairs)
        if all("error" not in r for r in runs[name]):
            row["nats"] = spread([r["nats"] for r in runs[name]])
            row["change"] = spread([r["nats"] - off["nats"] for r, off in zip(runs[name], runs["nothing"])])
            row["start"] = statistics.mean(r["start"] for r in runs[name])
            row["run_time"] = spread([r["seconds"] / off["seconds"] for r, off in zip(runs[name], runs["nothing"])])
        rows[name] = row
    here = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=here)
    backward = rows["freezing 80 % of the blocks"]["time"]["backward"]["median"]
    document = {
        "question": "what each saver of training saves, and what it costs",
        "scheme": SCHEME,
        "rounds": options.rounds,
        "seeds": list(range(options.seeds)),
        "steps": options.steps,
        "float_nats": runs["nothing"][0].get("float"),
        "backward_cut_by_freezing": 1 - backward,
        "loads": [
            min(s["load"] for part in steps.values() for s in part),
            max(s["load"] for part in steps.values() for s in part),
        ],
        "rows": rows,
        "environment": environment(),
        "commit": commit.stdout.strip(),
        "command": shlex.join(["python", "bench/savers.py", *sys.argv[1:]]),
    }
    for name, row in rows.items():
        time_text = f"{row['time']['step']['median']:.2f} of the time" if "time" in row else "the same step"
        print(f"{name:30}{time_text:>18}  {row.get('nats', {}).get('mean', float('nan')):.4f} nats")
    print(f"freezing 80 % of the blocks cuts backward by {1 - backward:.0%}")
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
