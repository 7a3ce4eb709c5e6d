"""Which model at which scheme can be said in which format, and does it compute the same there?

    python bench/export_table.py [--llamacpp VENV/bin/python] [--cache DIR] [--models A,B] [--schemes A,B] [--out FILE]

QUANTAILOR_DATA points at the real models (docs/BENCHMARKS.md); GPT-2 and Qwen3-MoE are made from their configs, with
random weights; MiniLM gets a head that is fine-tuned a little on SST-2 and kept in the cache. Integers come from
rounding (`rtn`): which ones they are changes nothing here. VENV holds llama-cpp-python (bench/llamacpp_parity.py).
Rows that the cache has are not made again, so a run that was cut short goes on; each names the commit that made it.

    hf       stock transformers with compressed-tensors loads the folder: logits against ours with products of reals
             (`as_stock`) and against our product of integers; our own layout is read through `import quantailor.hf`
    onnx     ONNX Runtime against ours
    gguf     llama.cpp against ours with fp16 scales: argmaxes and correlation; it rounds activations to 8 bits itself
    jitter   how far our own logits move when the embeddings are moved by one unit in the last place

Differences are the largest of all logits, relative to the largest logit. The last line is JSON.
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
from llamacpp_parity import agreement, llamacpp, logits_of
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import quantailor as qt
import quantailor.hf
from quantailor import api
from quantailor.environment import environment
from quantailor.evaluate.jitter import own_jitter
from quantailor.evaluate.measuring import measuring
from quantailor.formats import gguf
from quantailor.formats.gguf_layers import with_half_scales
from quantailor.formats.stock import flat_inputs, stock_logits
from quantailor.numerics.measures import relative_max_difference
from quantailor.verbs.exporting import export
from quantailor.verbs.model import Model, default_probe

DATA = Path(os.environ.get("QUANTAILOR_DATA", Path(__file__).parents[2] / "shared" / "data"))
MIXED = "mixed 4/8"
SCHEMES = ("w8a8", "w4a16-g32", "w2a16-g32", MIXED)
COLUMNS = ("hf", "onnx", "gguf")
HEAD_STEPS = 24


def real(name: str) -> Callable[[Path, Path], Model]:
    def made(_folder: Path, _cache: Path) -> Model:
        model = qt.load(DATA / "models" / name)
        text = (DATA / "text" / "tinystories" / "valid.txt").read_text()
        rows = [model.tokenizer(text[i * 2000 :][:1500])["input_ids"][:96] for i in range(3)]
        ids = torch.tensor(rows)
        model.probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return model

    return made


def minilm(_folder: Path, cache: Path) -> Model:
    """The published encoder, its new head of two classes (and the rest) trained for some steps on SST-2."""
    kept = cache / f"minilm-sst2-{HEAD_STEPS}"
    if not kept.exists():
        settings = qt.Settings(steps=HEAD_STEPS, batch_size=16, learning_rate=2e-4, evaluations=1)
        source, task = DATA / "models" / "minilm-l6-v2", DATA / "tasks" / "sst2"
        dev = [json.loads(line) for line in (task / "dev.jsonl").read_text().splitlines()[:64]]
        settings_of = {"scheme": "float", "eval_data": dev, "settings": settings, "context": 64}
        trained = qt.train(source, task / "train.jsonl", teacher=None, **settings_of)
        api.save(trained, kept)
    model = qt.load(kept)
    lines = (DATA / "tasks" / "sst2" / "dev.jsonl").read_text().splitlines()[:8]
    batch = model.tokenizer([json.loads(line)["sentence"] for line in lines], padding=True, return_tensors="pt")
    model.probe = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model


def from_config(make: Callable[[int], Any]) -> Callable[[Path, Path], Model]:
    """A random model with the tokenizer of stories260k."""

    def made(folder: Path, _cache: Path) -> Model:
        tokenizer = AutoTokenizer.from_pretrained(DATA / "models" / "stories260k")
        torch.manual_seed(0)
        make(len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = qt.load(folder)
        model.probe = default_probe(model)
        return model

    return made


def gpt2(vocab_size: int) -> GPT2LMHeadModel:
    sizes = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2}
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


MODELS: dict[str, Callable[[Path, Path], Model]] = {
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


def stock_cell(folder: Path, packed: Model) -> dict[str, Any]:
    """The exported folder, loaded by transformers itself."""
    auto = AutoModelForSequenceClassification if packed.task == "classification" else AutoModelForCausalLM
    theirs = auto.from_pretrained(folder).eval()
    method = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("quant_method")
    with measuring(theirs), measuring(packed.model):
        logits, ours = (m(**packed.probe).logits.float() for m in (theirs, packed.model))
    there = packed.probe["attention_mask"].bool()
    kept = (lambda t: t[there]) if logits.dim() == 3 else (lambda t: t)
    stock = method == "compressed-tensors"
    as_stock = stock_logits(packed.model, packed.probe) if stock else ours
    return {
        "reader": "stock transformers" if stock else "transformers after import quantailor.hf",
        "against_products_of_reals": relative_max_difference(kept(logits), kept(as_stock)),
        "against_products_of_integers": relative_max_difference(kept(logits), kept(ours)),
        "flat_inputs": flat_inputs(packed.model, packed.probe) if stock else [],
    }


def llamacpp_cell(python: str, packed: Model, folder: Path) -> dict[str, Any]:
    """The same integers with fp16 scales on both sides, along the rows of the probe."""
    model, _ = with_half_scales(packed.model)
    file = folder / "half.gguf"
    gguf.write(model, file, tokenizer=packed.tokenizer)
    rows = packed.probe["input_ids"].tolist()
    answer, logits = llamacpp(python, file, (), rows, 0)
    return {**agreement([logits_of(model, row) for row in rows], logits), "llama_cpp": answer["version"]}


def made_cells(source: Model, scheme: str, python: str | None, folder: Path) -> dict[str, Any]:
    packed = qt.pack(quantized(source, scheme))
    packed.model.eval()
    out = folder / "out"
    found = {receipt.format: receipt for receipt in export(packed, out, COLUMNS)}
    cells: dict[str, Any] = {}
    for name, receipt in found.items():
        size = sum((out / f).stat().st_size for f in receipt.files)
        cells[name] = {**receipt.to_json(), "size_bytes": size}
    cells["hf"]["stock"] = stock_cell(out / "hf", packed)
    if python and not found["gguf"].refused:
        cells["gguf"]["llama.cpp"] = llamacpp_cell(python, packed, folder)
    return {"formats": cells, "jitter": own_jitter(packed.model, packed.probe)}


def verdict(name: str, cell: dict[str, Any], jitter: float) -> str:
    """`met`, `refused`, `jitter` (no more than three times what the model itself moves) or `missed`."""
    if cell["refused"]:
        return "refused"
    if not cell["integers_equal"]:
        return "missed"
    if name == "gguf":
        ran = cell.get("llama.cpp")
        if ran is None:
            return "not run"
        return "met" if ran["argmax_equal"] == ran["positions"] and ran["correlation"] >= 0.999 else "missed"
    value = cell["stock"]["against_products_of_reals"] if name == "hf" else cell["max_logit_difference"]
    if value <= (1e-5 if name == "hf" else 1e-4):
        return "met"
    return "jitter" if value <= 3 * jitter else "missed"


def shown(name: str, cell: dict[str, Any]) -> str:
    if cell["refused"]:
        return f"refused: {cell['refused']}"
    integers = "equal" if cell["integers_equal"] else "NOT EQUAL"
    if name == "hf":
        return f"{integers}, {cell['stock']['against_products_of_reals']:.1e}"
    if name == "gguf" and "llama.cpp" in cell:
        ran = cell["llama.cpp"]
        return f"{integers}, argmax {ran['argmax_equal']}/{ran['positions']}, correlation {ran['correlation']:.6f}"
    return f"{integers}, {cell['max_logit_difference']:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--llamacpp", default=os.environ.get("QUANTAILOR_LLAMACPP"))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "quantailor-export-table")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.cache.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here).stdout
    done = options.cache / "rows.jsonl"
    known = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    rows: list[dict[str, Any]] = []
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            source = None
            for scheme in options.schemes.split(","):
                row = next((r for r in known if (r["model"], r["scheme"]) == (name, scheme)), None)
                if row is None:
                    source = source or MODELS[name](Path(folder) / "float", options.cache)
                    start = time.perf_counter()
                    with tempfile.TemporaryDirectory() as work:
                        made = made_cells(source, scheme, options.llamacpp, Path(work))
                    row = {"model": name, "scheme": scheme, "commit": commit.strip(), "seconds": 0.0, **made}
                    row["seconds"] = time.perf_counter() - start
                    row["verdicts"] = {n: verdict(n, c, row["jitter"]) for n, c in row["formats"].items()}
                    with done.open("a") as stream:
                        stream.write(json.dumps(row) + "\n")
                rows.append(row)
                cells = " | ".join(f"{shown(n, row['formats'][n])} [{row['verdicts'][n]}]" for n in COLUMNS)
                print(f"{name} | {scheme} | {cells} | jitter {row['jitter']:.1e}", flush=True)
    document = {
        "question": "the same integers and outputs in every format",
        "columns": COLUMNS,
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
