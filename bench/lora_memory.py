"""What does a step of LoRA-QAT hold beside the packed base, the adapters and their optimizer?

A Llama of the given size whose packed integers are drawn at random (no float weight ever exists), adapters of rank 16
inside the rounding on every linear layer, AdamW, steps on random tokens. Counted: bytes of the tensors held (packed
base with its float embeddings and norms; adapters and gradients; optimizer), and of what backward keeps (activations,
by hooks on saved tensors). Measured: the process's peak resident memory above what it was before the model was built,
after the imports and a step of a tiny model. `--plain` is the control: the same layers, with the weight rounded by
ordinary autograd operations, which keep float copies for backward.

    python bench/lora_memory.py --out bench/results/lora_memory.json

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from quantailor.api import environment
from quantailor.models.adapt import adapt
from quantailor.models.structure import modules_of, replace
from quantailor.nn.lora import LoRA, LoRALinear
from quantailor.nn.packed import PackedWeight, QuantLinear
from quantailor.spec import Scheme

HERE = Path(__file__).parent


def random_packed(hidden: int, layers: int, scheme: Scheme) -> nn.Module:
    """A packed Llama without a float weight in its blocks, at any moment."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, module in list(modules_of(model, nn.Linear)):
        if name == "lm_head":
            continue
        store = PackedWeight(scheme.weight, module.out_features, module.in_features)
        for part, buffer in store.named_buffers():
            if part == "scale":
                buffer.fill_(0.2 * hidden**-0.5)
            else:
                buffer.random_()
        replace(model, name, QuantLinear(scheme, store, None))
    rotary = type(model.model.rotary_emb)(config)
    for name, parameter in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        value = torch.ones(parameter.shape) if parameter.dim() == 1 else torch.randn(parameter.shape) * 0.02
        setattr(model.get_submodule(owner), last, nn.Parameter(value))
    model.model.rotary_emb = rotary
    model.quantailor_state = None
    return model


def plain_forward(layer: LoRALinear, x: Tensor) -> Tensor:
    """The same numbers by ordinary operations: autograd keeps what it needs, which is float weights."""
    adapter = layer.adapter
    assert adapter is not None
    scale = layer.packed.scales().repeat_interleave(layer.packed.spec.group_size, 1)
    v = layer.packed.integers().float() + adapter.lora.scaling * (adapter.lora_B @ adapter.lora_A) / scale
    rounded = torch.round(v).clamp(-8, 7)
    return F.linear(x, (v + (rounded - v).detach()) * scale)


def resident(what: str = "VmRSS") -> int:
    """Bytes of this process's memory now, or its peak (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what + ":"))
    return int(line.split()[1]) * 1024


def size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def warm_up(scheme: Scheme) -> None:
    """A step of a tiny model: code and buffers that torch and transformers make once are not the model's."""
    model = random_packed(128, 1, scheme)
    adapt(model, LoRA(r=16, base_bits=scheme.weight.grid.bits))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 512, (1, 32))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    scheme = Scheme.parse(options.scheme)
    warm_up(scheme)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident()
    model = random_packed(options.hidden, options.layers, scheme)
    adapt(model, LoRA(r=16, base_bits=options.base_bits))
    if options.plain:
        for _, layer in modules_of(model, LoRALinear):
            layer.forward = lambda x, layer=layer: plain_forward(layer, x)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, 512, (options.rows, options.tokens))
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    seconds = []
    for step in range(options.steps):
        start = time.process_time()
        with torch.autograd.graph.saved_tensors_hooks(keep if step == 0 else lambda t: t, lambda t: t):
            loss = model(input_ids=ids, labels=ids).loss
        activations = sum(kept.values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        seconds.append(time.process_time() - start)
    base = size(p for p in model.parameters() if not p.requires_grad) + size(model.buffers())
    adapters = size(trained)
    states = size(t for state in optimizer.state.values() for t in state.values())
    held = base + 2 * adapters + states  # a gradient is as large as its parameter
    peak = resident("VmHWM") - before
    weights = sum(m.in_features * m.out_features for _, m in modules_of(model, LoRALinear))
    return {
        "way": "plain" if options.plain else "recomputed",
        "weights": weights,
        "float_weights_bytes": 4 * weights,
        "packed_base_bytes": base,
        "adapters_bytes": adapters,
        "gradients_bytes": adapters,
        "optimizer_bytes": states,
        "held_bytes": held,
        "activations_bytes": activations,
        "peak_bytes": peak,
        "peak_above_held": peak / held - 1,
        "peak_less_activations_above_held": (peak - activations) / held - 1,
        "loss": float(loss.detach()),
        "cpu_seconds_a_step": min(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--scheme", default="w4a16-g64")
    parser.add_argument("--base-bits", type=int, default=4)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--alone", action="store_true", help="this process measures itself")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measure(options)))
        return
    results = []
    for extra in ([], ["--plain"]):
        command = [sys.executable, __file__, "--alone", *sys.argv[1:], *extra]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        mib = {k: round(v / 2**20, 1) for k, v in results[-1].items() if k.endswith("_bytes")}
        print(results[-1]["way"], mib, f"peak above held {results[-1]['peak_above_held']:.1%}", flush=True)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE)
    document = {
        "question": __doc__.splitlines()[0],
        "command": "python bench/lora_memory.py " + " ".join(sys.argv[1:]),
        "settings": {k: str(v) for k, v in vars(options).items() if k != "out"},
        "environment": environment(),
        "commit": commit.stdout.strip(),
        "load": os.getloadavg()[0],
        "results": results,
    }
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
