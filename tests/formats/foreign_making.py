"""Folders as other tools write them, packed the slow obvious way from the formats' documentation.

Each maker gives (folder, float weights that the packed ones stand for), so that a reader is held against arithmetic
and not against another reader.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
Parts = tuple[dict[str, Tensor], Tensor]


def to_words(values: list[int], bits: int) -> list[int]:
    """A little-endian stream of fields, cut into signed 32-bit words."""
    stream = sum(int(v) << (bits * i) for i, v in enumerate(values))
    words = [(stream >> (32 * k)) & 0xFFFFFFFF for k in range(-(-len(values) * bits // 32))]
    return [w - (1 << 32) if w >= 1 << 31 else w for w in words]


def int32(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def llama(**changes: Any) -> LlamaForCausalLM:
    """2 layers, hidden 64, ffn 96 (three groups of 32), 303 tokens."""
    sizes = {"vocab_size": 303, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**{**sizes, **heads, **tokens, "initializer_range": 0.1, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def write(
    out: Path, tokenizer: Path, quantization: dict[str, Any], pack: Callable[[str, int, int], Parts], **changes: Any
) -> tuple[Path, LlamaForCausalLM]:
    """A folder whose block layers `pack(name, O, N)` made, and the float model with the weights that they stand for."""
    model = llama(**changes)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parts, weight = pack(name, module.out_features, module.in_features)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{part}": value.contiguous() for part, value in parts.items()}
            module.weight.data = weight.float()
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "dtype": "float32", "quantization_config": quantization}
    (out / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out)
    return out, model


def drawn(name: str, rows: int, length: int, groups: int, bits: int, *, symmetric: bool, lowest_zero: int = 1):
    """(u [O, N], scale float16 [O, G], zero [O, G]) of a layer, by its name."""
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    u = torch.randint(0, 2**bits, (rows, length), generator=g)
    scale = ((torch.rand(rows, groups, generator=g) * 0.02 + 0.01) * 16 / 2**bits).to(torch.float16)
    zero = torch.randint(lowest_zero, 2**bits, (rows, groups), generator=g)
    return u, scale, torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero


def dequantized(u: Tensor, scale: Tensor, zero: Tensor, index: Tensor) -> Tensor:
    """(u - zero) * scale, each input with its group's."""
    return (u.double() - zero[:, index].double()).float() * scale[:, index].float()


def gptq(
    bits: int = 4, group_size: int = 32, *, symmetric: bool = False, act_order: bool = False, version: int = 1, **more
) -> tuple[dict[str, Any], Callable[[str, int, int], Parts]]:
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": act_order,
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }

    def pack(name: str, rows: int, length: int) -> Parts:
        groups = 1 if group_size == -1 else length // group_size
        u, scale, zero = drawn(name, rows, length, groups, bits, symmetric=symmetric, **more)
        index = torch.arange(length) // (length // groups)
        if act_order:
            index = index[torch.randperm(length, generator=torch.Generator().manual_seed(length))]
        held = zero - 1 if version == 1 else zero
        if version == 1 and int(zero.min()) == 0:  # borrow within each word, as subtracting a constant does
            words = np.array([to_words(row, bits) for row in zero.T.tolist()], dtype=np.int64)
            ones = np.array(to_words([1] * (words.shape[1] * 32 // bits), bits), dtype=np.int64)
            qzeros = torch.from_numpy((words - ones) & 0xFFFFFFFF).to(torch.int32)
        else:
            qzeros = int32([to_words(row, bits) for row in held.T.tolist()])
        parts = {
            "qweight": int32([to_words(row, bits) for row in u.tolist()]).T,
            "qzeros": qzeros,
            "scales": scale.T,
            "g_idx": index.to(torch.int32),
        }
        return parts, dequantized(u, scale, zero, index)

    return config, pack


def awq(group_size: int = 32) -> tuple[dict[str, Any], Callable[[str, int, int], Parts]]:
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}

    def words(values: Tensor) -> Tensor:
        """[R, O] -> [R, O / 8]: field i of word c is output 8 c + AWQ_ORDER[i]."""
        result = []
        for row in values.tolist():
            turned = [[row[8 * c + AWQ_ORDER[i]] for i in range(8)] for c in range(len(row) // 8)]
            result.append([to_words(eight, 4)[0] for eight in turned])
        return int32(result)

    def pack(name: str, rows: int, length: int) -> Parts:
        u, scale, zero = drawn(name, rows, length, length // group_size, 4, symmetric=False, lowest_zero=0)
        index = torch.arange(length) // group_size
        parts = {"qweight": words(u.T), "qzeros": words(zero.T), "scales": scale.T}
        return parts, dequantized(u, scale, zero, index)

    return config, pack


def compressed(
    bits: int = 4,
    strategy: str = "group",
    *,
    symmetric: bool = True,
    act_order: bool = False,
    dense: bool = True,
    inputs: dict[str, Any] | None = None,
    kind: str = "pack-quantized",
    targets: tuple[str, ...] = ("Linear",),
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Any], Callable[[str, int, int], Parts]]:
    """`dense` False: as 0.17 packs 3 bits, whole fields in a word."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False}
    weights |= {"group_size": 32} if strategy == "group" else {}
    weights |= {"actorder": "group"} if act_order else {}
    group = {"targets": list(targets), "weights": weights, "input_activations": inputs, "output_activations": None}
    config = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {**group, "format": kind}},
    }
    middle = 2 ** (bits - 1)

    def words(values: list[int]) -> list[int]:
        if dense:
            return to_words(values, bits)
        each = 32 // bits
        return [to_words(values[i : i + each], bits)[0] for i in range(0, len(values), each)]

    def pack(name: str, rows: int, length: int) -> Parts:
        groups = length // 32 if strategy == "group" else 1
        u, scale, zero = drawn(name, rows, length, groups, bits, symmetric=symmetric, lowest_zero=0)
        scale = scale.to(scale_dtype)
        if strategy == "tensor":
            scale, zero = scale[:1].expand(rows, 1), zero[:1].expand(rows, 1)
        index = torch.arange(length) // (length // groups)
        if act_order:
            index = index[torch.randperm(length, generator=torch.Generator().manual_seed(length))]
        parts: dict[str, Tensor] = {"weight_scale": scale[0] if strategy == "tensor" else scale}
        if kind == "pack-quantized":
            parts["weight_packed"] = int32([words(row) for row in u.tolist()])
            parts["weight_shape"] = torch.tensor([rows, length])
            if not symmetric:
                parts["weight_zero_point"] = int32([words(column) for column in zero.T.tolist()]).T
        else:
            parts["weight"] = (u - middle).to(torch.int8)
            if not symmetric:
                held = (zero - middle).to(torch.int8)
                parts["weight_zero_point"] = held[0] if strategy == "tensor" else held
        if act_order:
            parts["weight_g_idx"] = index.to(torch.int32)
        if inputs is not None and not inputs["dynamic"]:
            parts["input_scale"] = torch.tensor([0.04])
        return parts, dequantized(u, scale, zero, index)

    return config, pack


NF4_TABLE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


def nf4(*, doubled: bool = False, block: int = 32) -> tuple[dict[str, Any], Callable[[str, int, int], Parts]]:
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": doubled,
    }

    def pack(name: str, rows: int, length: int) -> Parts:
        g = torch.Generator().manual_seed(sum(map(ord, name)))
        flat = torch.randint(0, 16, (rows * length,), generator=g)
        held = torch.tensor([int(a) * 16 + int(b) for a, b in zip(flat[::2], flat[1::2])], dtype=torch.uint8)
        state = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": [rows, length]}
        parts: dict[str, Tensor] = {"weight": held[:, None], "weight.quant_map": NF4_TABLE.clone()}
        count = rows * length // block
        if doubled:
            table = torch.sort(torch.rand(256, generator=g) * 2 - 1).values
            codes = torch.randint(0, 256, (count,), generator=g).to(torch.uint8)
            nested = torch.rand(-(-count // 256), generator=g) * 0.01 + 0.01
            absmax = torch.tensor([float(table[int(c)] * nested[i // 256] + 0.1) for i, c in enumerate(codes)])
            parts |= {"weight.absmax": codes, "weight.nested_absmax": nested, "weight.nested_quant_map": table}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}
        else:
            absmax = torch.rand(count, generator=g) * 0.1 + 0.1
            parts["weight.absmax"] = absmax
        raw = json.dumps(state).encode()
        parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(raw), dtype=torch.uint8)
        weight = NF4_TABLE[flat] * absmax.repeat_interleave(block)
        return parts, weight.reshape(rows, length)

    return config, pack


def int8(threshold: float = 6.0) -> tuple[dict[str, Any], Callable[[str, int, int], Parts]]:
    config = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": threshold,
        "bnb_4bit_quant_type": "fp4",
    }

    def pack(name: str, rows: int, length: int) -> Parts:
        g = torch.Generator().manual_seed(sum(map(ord, name)))
        q = torch.randint(-127, 128, (rows, length), generator=g).to(torch.int8)
        largest = torch.rand(rows, generator=g) * 0.3 + 0.1
        parts = {"weight": q, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return parts, q.float() * largest[:, None] / 127

    return config, pack


ALL: dict[str, Callable[[], tuple[dict[str, Any], Callable[[str, int, int], Parts]]]] = {
    "gptq": lambda: gptq(act_order=True),
    "awq": awq,
    "compressed-tensors": lambda: compressed(symmetric=False),
    "bitsandbytes": lambda: nf4(doubled=True),
}
