"""The header of a safetensors file, judged before anything is allocated for what it promises.

    8 bytes   little-endian length of the header, at most 100 MB
    header    {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"key": "text"}}
    data      the tensors one after the other, without gaps, to the last byte of the file

What is accepted here, the safetensors library accepts too, and reads the same; it accepts a little more (a name twice).
Source: the format section of https://github.com/safetensors/safetensors (README.md).
"""

import json
import os
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from quantailor.errors import UntrustedInput
from quantailor.store.jsonio import MAX_DEPTH, depth_of, without_strings
from quantailor.store.paths import open_regular, shown

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 100_000
MAX_DIMS = 64  # torch has no more

_DTYPES_BY_BITS = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "U16 I16 F16 BF16",
    32: "U32 I32 F32",
    64: "U64 I64 F64 C64",
}
BITS = {dtype: bits for bits, dtypes in _DTYPES_BY_BITS.items() for dtype in dtypes.split()}


@dataclass(frozen=True)
class TensorFact:
    """What a header says of one tensor; `dtype` in the format's own words (`BF16`); its bytes begin at `start`."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int = 0

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * BITS[self.dtype] // 8


def read_header(path: Path, *, follow: bool = True) -> dict[str, TensorFact]:
    """The tensors of one safetensors file, sorted by name, without reading their data.

    Raises: UntrustedInput naming the file and the first rule that it breaks.
    """
    with open_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _bad(path, f"is {size} bytes and its header says {length}: it is cut short or no safetensors file")
        if length > MAX_HEADER_BYTES:
            raise _bad(path, f"has a header of {length} bytes, more than {MAX_HEADER_BYTES}")
        entries = _parse(path, file.read(length))
    _check_metadata(path, entries.pop("__metadata__", None))
    facts, spans = {}, []
    for name, entry in entries.items():
        facts[name], span = _fact(path, name, entry, 8 + length)
        spans.append((*span, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise _bad(path, f"has tensor {shown(name)} at byte {start} where {end} is due")
        end = stop
    if end != size - 8 - length:
        raise _bad(
            path, f"holds {size - 8 - length} bytes of data and its header says {end}: it is cut short or damaged"
        )
    return dict(sorted(facts.items()))


def _bad(path: Path, what: str) -> UntrustedInput:
    return UntrustedInput(f"{shown(path)} {what}; download or copy it again")


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    structure = without_strings(raw)
    if structure.count(b"{") > MAX_TENSORS + 2 or structure.count(b",") > 16 * MAX_TENSORS:  # of 11 dimensions each
        raise _bad(path, f"has a header of more than {MAX_TENSORS} tensors")
    if depth_of(structure, MAX_DEPTH) > MAX_DEPTH:
        raise _bad(path, f"has a header that nests deeper than {MAX_DEPTH} levels")
    if b"-" in structure:  # a sign or a negative exponent: "-0", too, reads differently in two parsers
        raise _bad(path, "has a header with a negative number")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise _bad(path, f"has a header that says {shown(twice)} twice")
        return found

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except UntrustedInput:  # is a ValueError itself
        raise
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"has a header that is not JSON ({shown(error)})") from error
    if not isinstance(entries, dict):
        raise _bad(path, "has a header that is not a JSON object")
    return entries


def _check_metadata(path: Path, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "has a header whose __metadata__ is not an object of texts")
    if not all(_is_unicode(text) for pair in metadata.items() for text in pair):
        raise _bad(path, "has a header whose __metadata__ is not Unicode")


def _fact(path: Path, name: str, entry: Any, data: int) -> tuple[TensorFact, tuple[int, int]]:
    """One entry, and where its bytes are, counted from `data`."""
    what = f"has tensor {shown(name)}"
    if not _is_unicode(name):
        raise _bad(path, f"{what}, a name that is not Unicode")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"{what} with {shown(entry)} in place of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _bad(path, f"{what} of the unknown dtype {shown(dtype)}")
    if not _is_counts(shape) or len(shape) > MAX_DIMS:
        raise _bad(path, f"{what} of shape {shown(shape)}, which is not a list of at most {MAX_DIMS} whole numbers")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _bad(path, f"{what} with data_offsets {shown(offsets)}, which are not [start, end]")
    num_elements = 1
    for length in shape:
        num_elements *= length
        if length >= 2**63 or num_elements >= 2**63:
            raise _bad(path, f"{what} of shape {shown(shape)}, which no machine can hold")
    if num_elements * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise _bad(path, f"{what}, {dtype} {shape}, in {offsets[1] - offsets[0]} bytes, which does not fit its shape")
    return TensorFact(dtype, tuple(shape), path, data + offsets[0]), (offsets[0], offsets[1])


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _is_unicode(text: str) -> bool:
    """A lone surrogate is none, and could not even be printed."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
