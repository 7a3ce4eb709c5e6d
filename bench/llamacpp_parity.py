"""Does llama.cpp compute with our integers what we compute with them?

    python bench/llamacpp_parity.py --python VENV/bin/python [--data DIR] [--schemes w8a16-g32,w4a16-g32] [--out FILE]

VENV holds llama-cpp-python, built with GGML_NATIVE=OFF (its AMX paths crash on some machines). Each model is quantized,
given fp16 scales (so that both sides hold the same numbers), written as GGUF, and run on both sides: the greedy
continuation of ten prompts with llama.cpp's defaults, and the logits along validation text. Rows of the table:

    blocks     the quantized file against our model
    rounded    the same, with the inputs of our packed layers rounded as llama.cpp does: to 8 bits, in blocks of 32
    float32    the same numbers as a float32 file, which llama.cpp does not round inputs for: the control
    first      a file in which only the first value projection is in blocks, against ours with its input so rounded

If float32 and first agree to float precision, then integers, scales, row order, tokenizer and all the rest of the file
are right, and what blocks differs by is that rounding, which no file can switch off. (In a deep model one rounding that
flips moves the next layer's inputs, so rounded explains a part of it only.) A table, then one JSON line.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from quantailor import api
from quantailor.formats import gguf
from quantailor.formats.gguf_layers import with_half_scales
from quantailor.models.prepare import PACKED
from quantailor.models.structure import modules_of, replace

FIRST = "model.layers.0.self_attn.v_proj"
WORKER = Path(__file__).with_name("llamacpp_worker.py")
PROMPTS = (
    "Once upon a time, there was a little girl named Lily.",
    "Tom and his dog went to the park.",
    "The sun was shining and",
    "One day, a small bird",
    'Mom said, "Let\'s go home."',
    "In the forest there lived an old bear who",
    "Ben had a red ball. He",
    "It was raining, so Sara",
    "The cat looked at the fish and",
    '"I am sorry," said the boy.',
)


def llamacpp(python: str, file: Path, prompts: tuple[str, ...], rows: list[list[int]], new_tokens: int) -> tuple:
    """(the worker's answer, logits of each row), from a process of its own: a crash there is an error here."""
    with tempfile.TemporaryDirectory() as folder:
        logits = Path(folder) / "logits.npz"
        request = {
            "file": str(file),
            "prompts": list(prompts),
            "rows": rows,
            "new_tokens": new_tokens,
            "logits": str(logits),
        }
        run = subprocess.run(
            [python, str(WORKER)], input=json.dumps(request), capture_output=True, text=True, timeout=280
        )
        if run.returncode:
            raise SystemExit(f"llama.cpp failed with status {run.returncode}: {run.stderr.strip()[-400:]}")
        held = np.load(logits)
        return json.loads(run.stdout.splitlines()[-1]), [held[name] for name in held.files]


@torch.inference_mode()
def greedy(model, tokens: list[int], count: int) -> list[int]:
    """Our own greedy continuation, with a cache, not stopping at an end token."""
    ids, past, generated = torch.tensor([tokens]), None, []
    for _ in range(count):
        out = model(input_ids=ids, past_key_values=past, use_cache=True)
        past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        generated.append(int(ids))
    return generated


@torch.inference_mode()
def logits_of(model, row: list[int]) -> np.ndarray:
    return model(input_ids=torch.tensor([row])).logits[0].float().numpy()


def dequantized(model, keep: str):
    """A copy in which all packed layers but `keep` are ordinary float layers with the same numbers."""
    model = copy.deepcopy(model)
    for name, module in list(modules_of(model, PACKED)):
        if name == keep:
            continue
        linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        linear.weight.data = module.packed.dequantize()
        if module.bias is not None:
            linear.bias.data = module.bias
        replace(model, name, linear)
    return model


@contextmanager
def rounded_inputs(model):
    """The inputs of packed layers as llama.cpp's 8-bit products see them: q = round(x * 127 / max |x|), a fp16 scale
    for each 32 (ggml's quantize_row_q8_0)."""

    def rounded(_, inputs):
        (x,) = inputs
        blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
        largest = blocks.abs().amax(-1, keepdim=True)
        q = torch.round(blocks * torch.where(largest > 0, 127 / largest, 0.0))
        return ((q * (largest / 127).half().float()).flatten(-2)[..., : x.shape[-1]],)

    handles = [module.register_forward_pre_hook(rounded) for _, module in modules_of(model, PACKED)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def agreement(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict:
    """Over all positions: how many argmaxes are equal, the correlation, and how close the unequal ones were."""
    a, b = np.concatenate(ours), np.concatenate(theirs)
    unequal = np.flatnonzero(a.argmax(-1) != b.argmax(-1))
    top = np.sort(a[unequal], -1)[:, ::-1]
    return {
        "positions": len(a),
        "argmax_equal": int(len(a) - len(unequal)),
        "correlation": float(np.corrcoef(a.ravel().astype(np.float64), b.ravel().astype(np.float64))[0, 1]),
        "max_difference": float(np.abs(a - b).max()),
        "rms_difference": float(np.sqrt(np.mean((a - b) ** 2))),
        "largest_logit": float(np.abs(a).max()),
        "largest_lead_of_an_unequal_argmax": float((top[:, 0] - top[:, 1]).max()) if len(unequal) else None,
    }


def compare(python: str, model, tokenizer, file: Path, rows: list[list[int]], new_tokens: int) -> dict:
    """One file on both sides. `rows`: tokens to take logits along."""
    receipt = gguf.write(model, file, tokenizer=tokenizer, overwrite=True)
    ours_tokens = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    answer, logits = llamacpp(python, file, PROMPTS if new_tokens else (), rows, new_tokens)
    with rounded_inputs(model):
        rounded = [logits_of(model, row) for row in rows]
    found = {
        "layers": receipt.layers,
        "max_scale_difference": receipt.max_scale_difference,
        "size_bytes": file.stat().st_size,
        "plain": agreement([logits_of(model, row) for row in rows], logits),
        "rounded": agreement(rounded, logits),
        "llama_cpp": answer["version"],
    }
    if not new_tokens:
        return found
    pairs = list(zip([greedy(model, tokens, new_tokens) for tokens in ours_tokens], answer["generated"]))
    firsts = [next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), None) for pair in pairs]
    return found | {
        "prompts": len(PROMPTS),
        "new_tokens": new_tokens,
        "prompts_tokenized_equally": sum(a == b for a, b in zip(ours_tokens, answer["tokens"])),
        "texts_equal": sum(first is None for first in firsts),
        "first_unequal_token": [first for first in firsts if first is not None],
        "sample": answer["texts"][0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=os.environ.get("QUANTAILOR_LLAMACPP", sys.executable))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QUANTAILOR_DATA", "../shared/data")))
    parser.add_argument("--models", default="stories260k,tinystories-llama-4m")
    parser.add_argument("--schemes", default="w8a16-g32,w4a16-g32,w4a16-g32-asym")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, help="keep the JSON document here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    print(f"{'model':22} {'scheme':16} {'file':9} {'texts':>7} {'argmax':>9} {'correlation':>12} {'rms diff':>9}")
    for name in options.models.split(","):
        for scheme in options.schemes.split(","):
            results += files_of(options, name, scheme)
    document = {"question": __doc__.splitlines()[0], "environment": api.environment(), "results": results}
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def line(name: str, scheme: str, kind: str, texts: str, found: dict) -> None:
    argmax = f"{found['argmax_equal']}/{found['positions']}"
    numbers = f"{argmax:>9} {found['correlation']:>12.8f} {found['rms_difference']:>9.2g}"
    print(f"{name:22} {scheme:16} {kind:9} {texts:>7} {numbers}")


def files_of(options: argparse.Namespace, name: str, scheme: str) -> list[dict]:
    """The quantized file, its float32 control and the one with a single layer in blocks."""
    text = options.data / "text" / "tinystories"
    quantized = api.quantize(
        options.data / "models" / name, scheme, data=text / "train.txt", samples=32, context=128, method=options.method
    )
    model, _ = with_half_scales(api.pack(quantized).model)
    words = (text / "valid.txt").read_text()
    rows = [quantized.tokenizer(words[i * 1500 : (i + 1) * 1500])["input_ids"][:200] for i in range(4)]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, keep in (("blocks", None), ("first", FIRST), ("float32", "")):
            held = model if keep is None else dequantized(model, keep)
            new_tokens = 0 if kind == "first" else options.new_tokens
            result = compare(options.python, held, quantized.tokenizer, Path(folder) / f"{kind}.gguf", rows, new_tokens)
            found.append({"model": name, "scheme": scheme, "method": options.method, "file": kind, **result})
            texts = f"{result['texts_equal']}/{result['prompts']}" if new_tokens else ""
            if kind != "first":
                line(name, scheme, kind, texts, result["plain"])
            if kind != "float32":
                line(name, scheme, "rounded" if kind == "blocks" else "first", "", result["rounded"])
    return found


if __name__ == "__main__":
    main()
