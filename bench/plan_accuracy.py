"""How far is a plan from what is then measured?

Steps of QAT of small Llamas and BERTs made from configs of different width, depth, batch and length, each in a process
of its own, with a float teacher and the best iterate kept: peak resident memory above the imports (VmHWM, reset after
a warm-up), and the median time of a step. The probe of the machine runs between them, round after round, and the median
of all rounds is what predictions are made from. The first models (`fit`) set the allocator's gaps; errors are those of
the others, which nothing was fitted on.

    python bench/plan_accuracy.py [--rounds 3] [--out bench/results/plan_accuracy.json]

Linux only. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

# name: (fit?, kind, hidden, ffn, layers, vocabulary, rows, length, scheme)
MODELS = {
    "llama-192x3": (True, "llama", 192, 512, 3, 2000, 8, 96, "w4a16-g32"),
    "llama-384x4": (True, "llama", 384, 1024, 4, 8000, 4, 128, "w4a16-g32"),
    "bert-256x4": (True, "bert", 256, 1024, 4, 8000, 16, 64, "w8a8"),
    "llama-256x8": (False, "llama", 256, 688, 8, 4000, 8, 64, "w4a16-g32"),
    "llama-512x4": (False, "llama", 512, 1376, 4, 8000, 4, 64, "w2a16-g64"),
    "llama-320x6": (False, "llama", 320, 864, 6, 16000, 2, 256, "w4a16-g32"),
    "llama-256x5-w8a8": (False, "llama", 256, 704, 5, 4000, 8, 128, "w8a8"),
    "llama-128x12": (False, "llama", 128, 352, 12, 2000, 16, 64, "w3a16-g32"),
    "bert-384x6": (False, "bert", 384, 1536, 6, 10000, 8, 64, "w8a8"),
    "bert-192x8": (False, "bert", 192, 768, 8, 5000, 32, 64, "w4a16-g32"),
    "bert-512x3": (False, "bert", 512, 2048, 3, 30000, 8, 128, "w8a8"),
}
CHILD = """
import json, re, sys, time, statistics
sys.path.insert(0, {here!r})
import torch
from plan_accuracy import train_a_few, config_of
torch.set_num_threads(1)
def status(name): return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
warm = ("llama" if {name!r}.startswith("llama") else "bert", 64, 128, 2, 100, 2, 16, {scheme!r})
train_a_few(*warm, steps=2)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
times = train_a_few(*{settings!r}, steps={steps})
print(json.dumps({{"bytes": status("VmHWM") - before, "seconds": statistics.median(times[1:])}}))
"""


def config_of(kind, hidden, ffn, layers, vocabulary):
    from transformers import BertConfig, LlamaConfig

    heads = {"num_attention_heads": 4, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    if kind == "llama":
        names = {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 4}
        return LlamaConfig(vocab_size=vocabulary, **heads, **names)
    return BertConfig(vocab_size=vocabulary, **heads, architectures=["BertForSequenceClassification"])


def train_a_few(kind, hidden, ffn, layers, vocabulary, rows, length, scheme, *, steps):
    """Seconds of each step: what `qat.train` does in one, without its data loading and its looks at the metric."""
    import time

    import torch
    from transformers import BertForSequenceClassification, LlamaForCausalLM

    from quantailor.models.structure import replace
    from quantailor.nn.fake_quant import fake_quantized
    from quantailor.qat.losses import kl_to_teacher, scored
    from quantailor.recipe import Recipe
    from quantailor.spec import Scheme

    torch.manual_seed(0)
    config = config_of(kind, hidden, ffn, layers, vocabulary)
    made = {"llama": LlamaForCausalLM, "bert": BertForSequenceClassification}[kind]
    model, teacher = made(config).train(), made(config).eval()
    for name, its in Recipe(Scheme.parse(scheme)).assign(model).quantized.items():
        layer = fake_quantized(model.get_submodule(name), its)
        spread = layer.weight_ON.abs().mean().item() / 2
        quantizer = layer.weight_quantizer
        quantizer.set_scale(torch.full_like(quantizer.base_scale, spread), torch.zeros_like(quantizer.zero_point))
        replace(model, name, layer)
    best = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    ids = torch.randint(0, vocabulary, (rows, length))
    labels = ids if kind == "llama" else torch.zeros(rows, dtype=torch.int64)
    task = "lm" if kind == "llama" else "classification"
    call = {"input_ids": ids, **({"use_cache": False} if kind == "llama" else {})}
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        student, _targets = scored(model(**call).logits, labels, task)
        with torch.no_grad():
            reference, _targets = scored(teacher(**call).logits, labels, task)
        loss = kl_to_teacher(student, reference)
        del student, reference
        loss.backward()
        del loss
        torch.isfinite(torch.stack(torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begin)
    assert best
    return times


def predicted(name, settings, machine):
    """(seconds, bytes, the traced step) of the plan's own code, from the config alone."""
    import torch

    from quantailor.cost.memory import of_training
    from quantailor.cost.skeleton import Skeleton, on_meta
    from quantailor.cost.step import Batch, trace_step
    from quantailor.qat.losses import kl_to_teacher
    from quantailor.recipe import Recipe
    from quantailor.spec import Scheme

    kind, hidden, ffn, layers, vocabulary, rows, length, scheme = settings
    config = config_of(kind, hidden, ffn, layers, vocabulary)
    task = "lm" if kind == "llama" else "classification"
    plan = Skeleton(on_meta(config, task, torch.float32), config, task, torch.float32, name)
    schemes = Recipe(Scheme.parse(scheme)).assign(plan.model).quantized
    step = trace_step(plan, schemes, Batch(rows, length), distance=kl_to_teacher)
    memory = of_training(step, copies=1)
    return machine.seconds(step.ops + step.update_ops), memory.peak.value, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    import torch

    from quantailor.cost.memory import BUFFERS, GAPS
    from quantailor.cost.probe import Probe
    from quantailor.cost.throughput import fitted
    from quantailor.environment import environment

    torch.set_num_threads(1)
    probe = Probe()
    found: dict[str, list[dict]] = {name: [] for name in MODELS}
    for number in range(o.rounds):
        probe.round()
        for place, (name, (_fit, *settings)) in enumerate(MODELS.items()):
            code = CHILD.format(
                here=str(Path(__file__).parent), name=name, scheme=settings[-1], settings=tuple(settings), steps=o.steps
            )
            ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
            if ran.returncode:
                sys.exit(ran.stderr)
            found[name].append(json.loads(ran.stdout.splitlines()[-1]))
            if place % 4 == 3:
                probe.round()
        print(f"round {number + 1} of {o.rounds}", flush=True)
    machine = fitted(probe)
    rows = []
    for name, (fit, *settings) in MODELS.items():
        seconds, traced, step = predicted(name, settings, machine)
        measured = {key: statistics.median(run[key] for run in found[name]) for key in ("seconds", "bytes")}
        rows.append(
            {
                "model": name,
                "fitted_on": fit,
                "settings": dict(
                    zip(("kind", "hidden", "ffn", "layers", "vocabulary", "rows", "length", "scheme"), settings)
                ),
                "parameters": step.num_parameters,
                "measured_seconds": measured["seconds"],
                "predicted_seconds": seconds,
                "seconds_error": seconds / measured["seconds"] - 1,
                "measured_bytes": measured["bytes"],
                "predicted_bytes": traced,
                "bytes_error": traced / measured["bytes"] - 1,
                "runs": found[name],
            }
        )
        print(
            f"{name:<18} {'fit ' if fit else '    '} step {measured['seconds']:.3f} s, planned {seconds:.3f} "
            f"({rows[-1]['seconds_error']:+.0%})   peak {measured['bytes'] / 1e6:.0f} MB, planned "
            f"{traced / 1e6:.0f} ({rows[-1]['bytes_error']:+.1%})",
            flush=True,
        )
    held = [row for row in rows if not row["fitted_on"]]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    document = {
        "question": "predicted against measured: step time and peak memory of QAT",
        "command": f"python bench/plan_accuracy.py --rounds {o.rounds} --steps {o.steps}",
        "commit": commit,
        "environment": environment(),
        "held_out": len(held),
        "mean_seconds_error": statistics.mean(abs(r["seconds_error"]) for r in held),
        "worst_seconds_error": max(abs(r["seconds_error"]) for r in held),
        "mean_bytes_error": statistics.mean(abs(r["bytes_error"]) for r in held),
        "worst_bytes_error": max(abs(r["bytes_error"]) for r in held),
        "memory_constants": {"buffers": BUFFERS, "gaps": GAPS},
        "machine": {"call": machine.call, "factor": machine.factor, "spread": machine.spread},
        "rows": rows,
    }
    print(
        f"{len(held)} models kept out: step time off by {document['mean_seconds_error']:.1%} on average, "
        f"{document['worst_seconds_error']:.1%} at most; peak memory by {document['mean_bytes_error']:.1%}, "
        f"{document['worst_bytes_error']:.1%} at most"
    )
    if o.out:
        o.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
