"""GGUF's blocks and Llama's row order, written from their definitions the slow obvious way; and small models."""

import copy
import struct

import torch
from transformers import AutoModelForCausalLM

from quantailor.models.prepare import pack_model, prepare
from quantailor.recipe import Recipe, Rule
from quantailor.spec import Scheme


def block_bytes(kind, q, d, m=None):
    """One block of 32 integers, byte by byte."""
    if kind == "Q8_0":
        return struct.pack("<e32b", d, *q)
    low = {"Q4_0": -8, "Q4_1": 0}[kind]
    nibbles = bytes((q[j] - low) + 16 * (q[j + 16] - low) for j in range(16))
    return (struct.pack("<e", d) if m is None else struct.pack("<ee", d, m)) + nibbles


def values_of(kind, raw):
    """The 32 numbers of one block, as doubles."""
    (d,) = struct.unpack_from("<e", raw)
    if kind == "Q8_0":
        return [d * q for q in struct.unpack_from("<32b", raw, 2)]
    body = raw[-16:]
    u = [byte & 15 for byte in body] + [byte >> 4 for byte in body]
    if kind == "Q4_0":
        return [d * (v - 8) for v in u]
    (m,) = struct.unpack_from("<e", raw, 2)
    return [d * v + m for v in u]


def row_order(num_heads, head_dim):
    """old row of each new row: pairs that transformers keeps half a head apart lie side by side in llama.cpp."""
    order = []
    for head in range(num_heads):
        for i in range(head_dim // 2):
            order += [head * head_dim + i, head * head_dim + i + head_dim // 2]
    return order


def tiny(config, scheme=None, rules=(), seed=0):
    """A random packed model of this config; float without a scheme and rules."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).float().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    if scheme is not None or rules:
        prepare(model, Recipe(Scheme.parse(scheme or "float"), tuple(rules)))
        pack_model(model)
    return model


def rule(pattern, scheme):
    return Rule(Scheme.parse(scheme), pattern=pattern)


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key, value):
    """A metadata entry: int -> u32, float -> f32, str, bool, or a list of one of those."""
    number, raw = _typed(value)
    return text(key) + struct.pack("<I", number) + raw


def _typed(value):
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, text(value)
    kinds = [_typed(item) for item in value]
    return 9, struct.pack("<IQ", kinds[0][0], len(kinds)) + b"".join(raw for _, raw in kinds)


def info(name, shape, kind, offset):
    """A line of the tensor list; `shape` innermost first, as the file has it."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def container(entries=(), tensors=(), data=b"", *, magic=b"GGUF", version=3, counts=None):
    """A file's bytes. `entries`, `tensors`: raw parts; `counts`: what the header says, if not their numbers."""
    num_tensors, num_entries = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, num_tensors, num_entries) + b"".join([*entries, *tensors])
    return head + bytes(-len(head) % 32) + data
