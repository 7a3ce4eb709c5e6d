"""How much memory does it take to quantize a 1.1 B Llama from disk?

Writes a random model of TinyLlama's shape (hidden 2048, ffn 5632, 22 layers, 32 heads on 4, 32,000 tokens, bfloat16) a
tensor at a time into a temporary folder, then quantizes it with GPTQ at w4a16-g128 in a process of its own. What counts
is that process's peak resident memory above what it had after its imports, beside the size of a float32 block, the
bound of the cache, the solver's H = X^T X of the widest layer and the whole model. Linux only: the peak is VmHWM, since
`ru_maxrss` outlives exec and would start at what this script needed.

    python bench/ptq_memory.py [--layers 22] [--cache-mib 256]

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, PreTrainedTokenizerFast

from quantailor.api import environment

HIDDEN, FFN, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 4, 32000
CHILD = """
import json, re, time
import torch, transformers
import quantailor.api as api
from quantailor.cost.size import weight_file_bytes
torch.set_num_threads({threads})
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before, start = peak(), time.monotonic()
words = [[(i * 7919 + j * 104729) % 31990 + 3 for j in range({context})] for i in range({samples})]
data = [" ".join(f"w{{n}}" for n in row) for row in words]
done = api.quantize_folder({folder!r}, {scheme!r}, {out!r}, method={method!r}, data=data, samples={samples},
                           context={context}, cache_bytes={cache})
print(json.dumps({{"before": before, "peak": peak(), "seconds": time.monotonic() - start,
                  "in_memory_because": done.in_memory_because, "bytes_on_disk": weight_file_bytes(done.out)}}))
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, in the order they are written."""
    kv = HIDDEN * KV_HEADS // HEADS
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        block = f"model.layers.{i}"
        for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN)):
            result[f"{block}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
        result[f"{block}.mlp.gate_proj.weight"] = result[f"{block}.mlp.up_proj.weight"] = (FFN, HIDDEN)
        result[f"{block}.mlp.down_proj.weight"] = (HIDDEN, FFN)
        result[f"{block}.input_layernorm.weight"] = result[f"{block}.post_attention_layernorm.weight"] = (HIDDEN,)
    return result | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make(folder: Path, layers: int) -> int:
    """The model folder, one tensor in memory at a time. Returns the bytes of its weights."""
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, VOCABULARY)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=2048
    ).save_pretrained(folder)
    header, end = {}, 0
    for name, shape in shapes(layers).items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    generator = torch.Generator().manual_seed(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for shape in shapes(layers).values():
            tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
            file.write(tensor.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--cache-mib", type=int, default=1024)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--scheme", default="w4a16-g128")
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        folder.mkdir()
        start = time.monotonic()
        model_bytes = make(folder, o.layers)
        print(f"made {model_bytes / 1e9:.2f} GB in {time.monotonic() - start:.0f} s", flush=True)
        code = CHILD.format(
            folder=str(folder), scheme=o.scheme, out=str(Path(place) / "out"), method=o.method, samples=o.samples,
            context=o.context, cache=o.cache_mib * 2**20, threads=torch.get_num_threads(),
        )  # fmt: skip
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if ran.returncode:
            sys.exit(ran.stderr)
        found = json.loads(ran.stdout.splitlines()[-1])
    block = 4 * sum(torch.Size(s).numel() for name, s in shapes(1).items() if ".layers.0." in name)
    above, bound = found["peak"] - found["before"], o.cache_mib * 2**20
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    document = {
        "question": "peak memory of quantizing from disk",
        "command": f"python bench/ptq_memory.py --layers {o.layers} --samples {o.samples} --context {o.context} "
        f"--cache-mib {o.cache_mib} --method {o.method} --scheme {o.scheme}",
        "commit": commit,
        "environment": environment(),
        "model_bytes": model_bytes,
        "float32_block_bytes": block,
        "cache_bound_bytes": bound,
        "activations_bytes": o.samples * o.context * HIDDEN * 2,
        "one_hessian_bytes": 4 * FFN * FFN,
        "peak_above_imports_bytes": above,
        "block_plus_bound_bytes": block + bound,
        "within": above <= block + bound,
        "hessians_above_block": (above - block) / (4 * FFN * FFN),
        **found,
    }
    mb = {name: f"{document[name] / 1e6:,.0f} MB" for name in document if name.endswith("_bytes")}
    print(
        f"peak above imports {mb['peak_above_imports_bytes']}: float32 block {mb['float32_block_bytes']}, cache bound "
        f"{mb['cache_bound_bytes']} (activations {mb['activations_bytes']}), one H {mb['one_hessian_bytes']}; "
        f"the model {mb['model_bytes']}; {found['seconds']:.0f} s"
    )
    if o.out:
        o.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
