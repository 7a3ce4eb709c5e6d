"""Does the fast path say what the proven one says, token for token, and what do the integers weigh?

    python bench/greedy.py [--prompts 50] [--tokens 64] [--schemes ...] [--out bench/results/greedy.json]

A trained Llama of 4 M parameters, packed by each scheme (min-max ranges, which take no data); the first 16 tokens of
that many TinyStories texts, continued greedily, ends ignored: by the layers as `check` proves them, and as served. Told
are the texts that are the same token for token, and the largest difference of logits over the prompts beside the
largest logit. Bytes are those of the quantized layers' tensors beside the same weights in float32. "half" are half
scales (`convert --half-scales`). QUANTAILOR_DATA points at model and text. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from seeds import command, commit

import quantailor as qt
from quantailor.api import environment
from quantailor.formats.gguf_layers import with_half_scales
from quantailor.models.generation import continued, decoder_of
from quantailor.models.serving import serving
from quantailor.models.structure import modules_of
from quantailor.nn.packed import QuantLinear

DATA = Path(os.environ.get("QUANTAILOR_DATA", Path(__file__).parents[2] / "shared" / "data"))
SCHEMES = ("w8a16", "w4a16-g32", "w4a16-g32 half", "w4a16-g128", "w4a16-g32-asym", "w3a16-g32", "w2a16-g32", "nf4")
PROMPT = 16


def packed(folder: Path, scheme: str, work: Path) -> qt.Model:
    """As it is loaded from disk."""
    name, _, half = scheme.partition(" ")
    place = work / name
    if not place.exists():
        qt.save(qt.quantize(folder, name, method="rtn"), place)
    model = qt.load(place)
    return dataclasses.replace(model, model=with_half_scales(model.model)[0]) if half else model


def compare(model: qt.Model, prompts: list[torch.Tensor], tokens: int) -> dict[str, Any]:
    """The proven path first, then the one that serves."""
    net, same, worst, first = model.model, 0, 0.0, []
    proven, logits = [], []
    with torch.inference_mode():
        for ids in prompts:
            proven.append(continued(net, ids, tokens, ends=False, laid_out=False))
            logits.append(net(input_ids=ids).logits)
        with serving(net) as choices:
            decoder, why = decoder_of(net)
            for ids, expected, of_prompt in zip(prompts, proven, logits):
                found = continued(net, ids, tokens, decoder=decoder, ends=False)
                differs = (found != expected).flatten().nonzero()
                same += not len(differs)
                first += [int(differs[0]) - ids.shape[1]] if len(differs) else []
                off = (net(input_ids=ids).logits - of_prompt).abs().max() / of_prompt.abs().max()
                worst = max(worst, float(off))
    ways = sorted({f"{choice.few_rows}: {choice.layers} layers" for choice in choices})
    return {"same": same, "first_different": first, "worst_logit": worst, "decoder": why or "native", "ways": ways}


def weight(net: torch.nn.Module) -> dict[str, float]:
    """Bytes of the quantized layers' tensors, and beside float32."""
    layers = [layer for _, layer in modules_of(net, QuantLinear)]
    size = sum(t.numel() * t.element_size() for layer in layers for t in layer.packed.buffers())
    of_float = sum(4 * layer.in_features * layer.out_features for layer in layers)
    return {"bytes": size, "of_float32": size / of_float}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder, found = DATA / "models" / "tinystories-llama-4m", {}
    texts = (DATA / "text" / "tinystories" / "valid.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    with tempfile.TemporaryDirectory() as work:
        for scheme in options.schemes:
            model, start = packed(folder, scheme, Path(work)), time.process_time()
            read = (model.tokenizer(text.strip())["input_ids"][:PROMPT] for text in texts)
            prompts = [torch.tensor([ids]) for ids in read if len(ids) == PROMPT][: options.prompts]
            row = compare(model, prompts, options.tokens) | weight(model.model) | {"prompts": len(prompts)}
            found[scheme] = row | {"cpu_seconds": time.process_time() - start}
            print(
                f"{scheme:16} {row['same']} of {len(prompts)} the same, logits within {row['worst_logit']:.1e}, "
                f"{row['of_float32']:.3f} of float32's bytes; {'; '.join(row['ways'])}",
                flush=True,
            )
    document = {
        "question": "greedy tokens of the fast path beside the proven one",
        "prompt_tokens": PROMPT,
        "new_tokens": options.tokens,
        "schemes": found,
        "environment": environment(),
        "commit": commit(),
        "command": command(),
    }
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
