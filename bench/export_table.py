"""Which model at which scheme can be said in which format, and does it compute the same there?

    python bench/export_table.py [--models stories260k,minilm] [--schemes w8a8,w4a16-g32] [--out FILE]

QUANTAILOR_DATA points at the real models (docs/BENCHMARKS.md); GPT-2 and Qwen3-MoE are made from their configs, with
random weights. Integers come from rounding (`rtn`): which ones they are changes nothing here. A cell says whether all
integers of the files are the model's, and the largest difference of their logits, relative to the largest; or why the
format refused. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import quantailor as qt
from quantailor.environment import environment
from quantailor.formats.receipt import ExportReceipt
from quantailor.verbs.exporting import WRITERS, export
from quantailor.verbs.model import Model, default_probe

DATA = Path(os.environ.get("QUANTAILOR_DATA", Path(__file__).parents[2] / "shared" / "data"))
MIXED = "mixed 4/8"
SCHEMES = ("w8a8", "w4a16-g32", "w2a16-g32", MIXED)


def real(name: str) -> Callable[[Path], Model]:
    return lambda _folder: qt.load(DATA / "models" / name)


def minilm(_folder: Path) -> Model:
    """The published encoder with a new head of two classes."""
    torch.manual_seed(0)
    return qt.load(DATA / "models" / "minilm-l6-v2", task="classification", num_labels=2)


def from_config(make: Callable[[int], Any]) -> Callable[[Path], Model]:
    """A random model with the tokenizer of stories260k."""

    def made(folder: Path) -> Model:
        tokenizer = AutoTokenizer.from_pretrained(DATA / "models" / "stories260k")
        torch.manual_seed(0)
        make(len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return qt.load(folder)

    return made


def gpt2(vocab_size: int) -> GPT2LMHeadModel:
    sizes = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 256}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, initializer_range=0.2, **sizes))


def qwen3_moe(vocab_size: int) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    return Qwen3MoeForCausalLM(config)


MODELS: dict[str, Callable[[Path], Model]] = {
    "stories260k": real("stories260k"),
    "tinystories-llama-4m": real("tinystories-llama-4m"),
    "minilm classifier": minilm,
    "GPT-2 from config": from_config(gpt2),
    "Qwen3-MoE from config": from_config(qwen3_moe),
}


def quantized(source: Model, scheme: str) -> Model:
    """`mixed 4/8`: w4a16-g32, and w8a16 for what comes last in a block, the down projections."""
    model = copy.deepcopy(source)
    if scheme != MIXED:
        return qt.quantize(model, scheme, method="rtn")
    names = {n.rpartition(".")[2] for n, _ in source.model.named_modules()}
    down = next((n for n in ("down_proj", "c_proj", "o_proj") if n in names), "dense")
    if source.task == "classification":
        down = "output.dense"
    rule = qt.Rule(qt.Scheme.parse("w8a16"), pattern=f"*.{down}")
    return qt.quantize(model, "w4a16-g32", method="rtn", rules=[rule])


def cell(receipt: ExportReceipt) -> str:
    if receipt.refused:
        return f"refused: {receipt.refused}"
    logits = "not run" if receipt.max_logit_difference is None else f"{receipt.max_logit_difference:.1e}"
    return f"{'equal' if receipt.integers_equal else 'NOT EQUAL'}, {logits}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            source = MODELS[name](Path(folder) / "float")
            source.probe = default_probe(source)
            for scheme in options.schemes.split(","):
                out = Path(folder) / f"out-{len(rows)}"
                start = time.perf_counter()
                found = {receipt.format: receipt for receipt in export(quantized(source, scheme), out)}
                seconds = time.perf_counter() - start
                sizes = {n: sum((out / f).stat().st_size for f in r.files) for n, r in found.items()}
                cells = {n: {**r.to_json(), "size_bytes": sizes[n]} for n, r in found.items()}
                rows.append({"model": name, "scheme": scheme, "seconds": seconds, "formats": cells})
                print(f"{name} | {scheme} | " + " | ".join(cell(found[n]) for n in WRITERS), flush=True)
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here).stdout
    document = {
        "question": "the same integers and outputs in every format",
        "columns": list(WRITERS),
        "rows": rows,
        "commit": commit.strip(),
        "environment": environment(),
        "seed": 0,
        "command": f"python bench/export_table.py --models '{options.models}' --schemes '{options.schemes}'",
    }
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
