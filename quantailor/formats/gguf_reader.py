"""The container of a GGUF file, judged before anything is allocated for what it promises.

    header    "GGUF", u32 version (2 or 3), u64 number of tensors, u64 number of metadata entries
    metadata  key, u32 type, value; strings and arrays carry a u64 length
    tensors   name, u32 dimensions, u64 each (innermost first), u32 type, u64 offset
    data      each tensor at a multiple of the alignment, one after the other

The public reader of version 0.19 allocates whatever a file of 49 bytes asks for; this one reads a count only if the
rest of the file could hold it. Nothing is imported, run or followed.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantailor.errors import UntrustedInput
from quantailor.formats.gguf_blocks import BYTES, Blocks, decode
from quantailor.store.paths import open_regular, shown

MAX_TENSORS = 100_000
MAX_ENTRIES = 100_000
MAX_HEADER_BYTES = 256_000_000
MAX_STRINGS = 4_000_000  # vocabularies have 10^5 tokens, and merges twice that
MAX_ALIGNMENT = 2**20

# Type number -> (name, values a block, bytes a block); all that ggml had by 2026, so that others can be named.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
READ = (*FLOATS, *BYTES)

_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,63}")
_KEY = re.compile(r"[!-~]{1,65535}")


@dataclass(frozen=True)
class GGUFTensor:
    """What the file says of one tensor; `shape` as torch has it, outermost first; its bytes begin at `start`."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A file that passed. Values of `metadata`: int, float, bool, str, list of str, or a numpy array."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def read(self, name: str) -> Tensor | Blocks:
        """A float tensor in its own type, or a matrix in blocks (more dimensions are flattened to rows).

        Raises: UntrustedInput if its type is none of those read here, or a value or scale is not finite.
        """
        info = self.tensors[name]
        if info.kind not in READ:
            raise self._bad(
                f"has tensor {name} as {info.kind}, which is not read; convert the file to Q8_0, Q4_0 or F16 first"
            )
        with open_regular(self.path) as file:
            file.seek(info.start)
            raw = file.read(info.num_bytes)
        if len(raw) != info.num_bytes:
            raise self._bad(f"ends inside tensor {name}; download or copy it again")
        if info.kind in FLOATS:
            values = torch.frombuffer(bytearray(raw), dtype=FLOATS[info.kind]).reshape(info.shape)
            if not bool(torch.isfinite(values).all()):
                raise self._bad(f"holds NaN or Inf in tensor {name}; use a sound copy")
            return values
        rows = info.num_bytes * 32 // BYTES[info.kind] // info.shape[-1]
        try:
            return decode(info.kind, np.frombuffer(raw, np.uint8).reshape(rows, -1))
        except ValueError as error:
            raise self._bad(f"has tensor {name} in which {error}; use a sound copy") from error

    def _bad(self, what: str) -> UntrustedInput:
        return UntrustedInput(f"{shown(self.path)} {what}")


def open_gguf(path: str | Path) -> GGUFFile:
    """Header, metadata and tensor list of one GGUF file. No tensor is read.

    Raises: UntrustedInput naming the file and the first rule that it breaks.
    """
    path = Path(path)
    with open_regular(path) as file:
        return _Reader(path, file).file()


class _Reader:
    """One pass over the header. Every count is held against the bytes that are left before it is believed."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path, self._file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0
        self.strings = 0

    def file(self) -> GGUFFile:
        if self._take(4) != b"GGUF":
            raise self._bad("does not begin with GGUF: it is no such file")
        version = self._number("<u4")
        if version not in (2, 3):
            big = version & 0xFFFF == 0
            raise self._bad("is big-endian" if big else f"is of version {version}; 2 and 3 are read")
        num_tensors, num_entries = self._number("<u8"), self._number("<u8")
        for count, least, limit, what in (
            (num_tensors, 24, MAX_TENSORS, "tensors"),
            (num_entries, 13, MAX_ENTRIES, "metadata entries"),
        ):
            if count > limit or count * least > self.size - self.at:
                raise self._bad(f"promises {count} {what}, more than it could hold or than {limit}")
        metadata = self._metadata(num_entries)
        if type(metadata.get("split.count", 1)) is not int or metadata.get("split.count", 1) > 1:
            raise self._bad("is one part of several; join them with llama.cpp's gguf-split first")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._bad(f"has alignment {shown(alignment)}, which is no power of two from 8 to {MAX_ALIGNMENT}")
        listed = [self._tensor() for _ in range(num_tensors)]
        return GGUFFile(self.path, version, metadata, self._placed(listed, alignment))

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            if not _KEY.fullmatch(key) or key in metadata:
                raise self._bad(f"has a metadata key {shown(repr(key))}, empty, unprintable or there twice")
            metadata[key] = self._value(self._number("<u4"), key)
        return metadata

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            value = np.frombuffer(self._take(np.dtype(_SCALARS[kind]).itemsize), _SCALARS[kind])[0].item()
            return value
        if kind == _BOOL:
            return self._bools(1, key)[0].item()
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._bad(f"has metadata {shown(key)} of the unknown type {kind}")
        inner, length = self._number("<u4"), self._number("<u8")
        if inner == _STRING:
            self.strings += length
            if length * 8 > self.size - self.at or self.strings > MAX_STRINGS:
                raise self._bad(f"has {length} strings in {shown(key)}, more than it could hold or than {MAX_STRINGS}")
            return [self._string() for _ in range(length)]
        if inner == _BOOL:
            return self._bools(length, key)
        if inner not in _SCALARS:
            raise self._bad(f"has in {shown(key)} an array of type {inner}, which is unknown or nested")
        return np.frombuffer(self._take(length * np.dtype(_SCALARS[inner]).itemsize), _SCALARS[inner])

    def _bools(self, count: int, key: str) -> np.ndarray:
        raw = np.frombuffer(self._take(count), np.uint8)
        if raw.size and raw.max() > 1:
            raise self._bad(f"has in {shown(key)} a truth value of {raw.max()}")
        return raw.astype(bool)

    def _tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """(name, kind, shape, bytes, offset from the data's beginning)."""
        name = self._string()
        if not _NAME.fullmatch(name):
            raise self._bad(f"has a tensor called {shown(repr(name))}; names are up to 63 letters, digits, _ . and -")
        num_dims = self._number("<u4")
        if not 1 <= num_dims <= 4:
            raise self._bad(f"has tensor {name} with {num_dims} dimensions; 1 to 4 are possible")
        inner_first = [self._number("<u8") for _ in range(num_dims)]
        number, offset = self._number("<u4"), self._number("<u8")
        if number not in TYPES:
            raise self._bad(f"has tensor {name} of the unknown type {number}")
        kind, block, block_bytes = TYPES[number]
        num_elements = 1
        for length in inner_first:
            num_elements *= length
        if num_elements == 0 or num_elements // block * block_bytes > self.size:
            raise self._bad(f"has tensor {name} of shape {inner_first[::-1]}, which is empty or more than the file")
        if inner_first[0] % block:
            raise self._bad(f"has tensor {name} with rows of {inner_first[0]}, no whole {kind} blocks of {block}")
        return name, kind, tuple(inner_first[::-1]), num_elements // block * block_bytes, offset

    def _placed(
        self, listed: list[tuple[str, str, tuple[int, ...], int, int]], alignment: int
    ) -> dict[str, GGUFTensor]:
        """As llama.cpp has it: in the order of the list, without gaps but for the alignment."""
        begin = -(-self.at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        due = end = 0
        for name, kind, shape, num_bytes, offset in listed:
            if name in tensors:
                raise self._bad(f"has tensor {name} twice")
            if offset != due:
                raise self._bad(f"has tensor {name} at offset {offset} where {due} is due")
            end = offset + num_bytes
            if begin + end > self.size:
                raise self._bad(f"ends before tensor {name} does: it is cut short")
            due = -(-end // alignment) * alignment
            tensors[name] = GGUFTensor(name, kind, shape, begin + offset, num_bytes)
        if tensors and self.size > begin + due:
            raise self._bad(f"has {self.size - begin - due} bytes after its last tensor")
        return tensors

    def _number(self, kind: str) -> int:
        size = 4 if kind == "<u4" else 8
        return int(struct.unpack("<I" if size == 4 else "<Q", self._take(size))[0])

    def _string(self) -> str:
        raw = self._take(self._number("<u8"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._bad(f"has text that is not UTF-8 before byte {self.at}") from error

    def _take(self, count: int) -> bytes:
        if count > self.size - self.at or self.at + count > MAX_HEADER_BYTES:
            raise self._bad(f"asks for {count} bytes at byte {self.at} of {self.size}, or has too long a header")
        raw = self._file.read(count)
        if len(raw) != count:
            raise self._bad("became shorter while it was read")
        self.at += count
        return raw

    def _bad(self, what: str) -> UntrustedInput:
        return UntrustedInput(f"{shown(self.path)} {what}; download or copy it again")
