"""Tensors read from and written to safetensors files one at a time, so that no file is ever whole in memory.

Reading is plain reading into memory of our own: a mapped file would count as memory for as long as it is open.
`write_tensors` copies bytes from other files; what it writes is, to the byte, what safetensors' own `save_file` would
have written of the same tensors (version 0.8: largest element types first, then by name).
"""

import json
import os
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from quantailor.errors import UntrustedInput
from quantailor.store.header import TensorFact, read_header
from quantailor.store.jsonio import write_json
from quantailor.store.paths import open_regular, shown

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}  # in the order of the library, whose files have them from last to first
_PIECE = 2**23  # bytes copied at a time
_READ = 2**25  # bytes read at a time: a thread beside may hold the interpreter for 5 ms after each
SHARD_BYTES = 50 * 10**9  # as transformers' `save_pretrained`


def read_tensor(fact: TensorFact) -> Tensor:
    """One tensor, in memory of its own. Raises: UntrustedInput on a type that torch lacks, or a file cut short."""
    with open_regular(fact.file) as file:
        return filled(file, fact)


def filled(file: BufferedReader, fact: TensorFact, seen: Callable[[memoryview], object] | None = None) -> Tensor:
    """`read_tensor` from a file that is open; `seen` is given the bytes, piece by piece, once they are read."""
    if fact.dtype not in DTYPES:
        raise UntrustedInput(f"{shown(fact.file)} holds elements of type {fact.dtype}, which cannot be computed with")
    raw = torch.empty(fact.num_bytes, dtype=torch.uint8)
    file.seek(fact.start)
    view = memoryview(raw.numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(view):
        count = file.readinto(view[done : done + _READ])
        if not count:
            raise UntrustedInput(f"{shown(fact.file)} was cut short while it was read; use a sound copy")
        if seen is not None:
            seen(view[done : done + count])
        done += count
    return raw.view(DTYPES[fact.dtype]).reshape(fact.shape)


def read_tensors(paths: tuple[Path, ...]) -> dict[str, Tensor]:
    """Every tensor of some safetensors files, by name, each in memory of its own. Raises: UntrustedInput if one cannot
    be read."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            tensors |= {name: read_tensor(fact) for name, fact in read_header(path).items()}
        except OSError as error:
            raise UntrustedInput(f"{path} cannot be read: {error}") from error
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, TensorFact]) -> None:
    """One safetensors file with these tensors, copied from where they are."""
    rank = {dtype: place for place, dtype in enumerate(DTYPES)}
    ordered = sorted(tensors.items(), key=lambda item: (-rank[item[1].dtype], item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, fact in ordered:
        header[name] = {
            "dtype": fact.dtype,
            "shape": list(fact.shape),
            "data_offsets": [end, end := end + fact.num_bytes],
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        for _, fact in ordered:
            with open_regular(fact.file) as source:
                source.seek(fact.start)
                left = fact.num_bytes
                while left:
                    piece = source.read(min(left, _PIECE))
                    if not piece:
                        raise UntrustedInput(f"{shown(fact.file)} was cut short while it was read; use a sound copy")
                    out.write(piece)
                    left -= len(piece)


def write_model_tensors(
    folder: Path, tensors: Mapping[str, TensorFact], name: str = "model", shard_bytes: int = SHARD_BYTES
) -> None:
    """`name`.safetensors in `folder`, or shards of at most `shard_bytes` (one tensor at least) and their index."""
    shards: list[dict[str, TensorFact]] = [{}]
    size = 0
    for tensor, fact in tensors.items():
        if shards[-1] and size + fact.num_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][tensor] = fact
        size += fact.num_bytes
    if len(shards) == 1:
        write_tensors(folder / f"{name}.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{name}-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(fact.num_bytes for fact in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / f"{name}.safetensors.index.json", index)


def sync(path: Path) -> None:
    """The bytes of `path` on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
