"""The header of a safetensors file: ours and the library's reading, and each rule by itself."""

import json
import random
import re
import struct
import time

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quantailor.errors import UntrustedInput
from quantailor.store.header import BITS, read_header

TENSORS = {
    "a.weight": torch.zeros(2, 3),
    "b": torch.zeros(4, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 5, dtype=torch.int8),
    "scalar": torch.tensor(1.0),
    "é 中": torch.zeros(3, dtype=torch.bool),
}


def write(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def library_reads(path):
    with safe_open(path, framework="pt") as file:
        return {n: (file.get_slice(n).get_dtype(), tuple(file.get_slice(n).get_shape())) for n in file.keys()}  # noqa: SIM118


def we_read(path):
    return {name: (fact.dtype, fact.shape) for name, fact in read_header(path).items()}


def refused(path) -> str:
    with pytest.raises(UntrustedInput) as error:
        read_header(path)
    told = str(error.value)
    assert error.value.exit_code == 3 and told.isprintable() and len(told) < 2000
    assert told.startswith(str(path)) and told.endswith("; download or copy it again")
    return told


def test_facts_are_those_of_the_file(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    facts = read_header(tmp_path / "a.safetensors")
    assert list(facts) == sorted(TENSORS)
    assert (facts["b"].dtype, facts["b"].shape, facts["b"].file) == ("BF16", (4,), tmp_path / "a.safetensors")
    assert we_read(tmp_path / "a.safetensors") == library_reads(tmp_path / "a.safetensors")


def test_every_dtype_has_the_size_that_the_library_gives_it(tmp_path):
    path = tmp_path / "a.safetensors"
    for dtype, bits in BITS.items():
        write(path, {"a": entry(dtype, (8,), (0, bits))}, b"\0" * bits)
        assert we_read(path) == library_reads(path) == {"a": (dtype, (8,))}
        write(path, {"a": entry(dtype, (8,), (0, bits + 1))}, b"\0" * (bits + 1))
        assert f"has tensor a, {dtype} [8], in {bits + 1} bytes, which does not fit its shape" in refused(path)


def test_no_dtype_of_the_library_is_unknown(tmp_path):
    write(tmp_path / "a", {"a": entry("?")}, b"0000")
    with pytest.raises(SafetensorError) as error:
        library_reads(tmp_path / "a")
    known = re.findall(r"`(\w+)`", str(error.value).partition("expected one of")[2])
    assert set(known) == set(BITS)


@pytest.mark.parametrize(
    "header, data, told",
    [
        (b"[]", b"", "has a header that is not a JSON object"),
        (b"{", b"", "has a header that is not JSON (Expecting"),
        (b'{"a": NaN}', b"", "has tensor a with nan in place of dtype, shape and data_offsets"),
        (b'{"a\xff": 1}', b"", "has a header that is not JSON ('utf-8' codec"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "has a header that is not JSON (Exceeds the limit"),
        ({"a": 1}, b"", "has tensor a with 1 in place of dtype, shape and data_offsets"),
        ({"a": {**entry(), "more": 1}}, b"0000", "in place of dtype, shape and data_offsets"),
        ({"a": entry("I4")}, b"0000", "has tensor a of the unknown dtype I4"),
        ({"a": entry(["F32"])}, b"0000", "has tensor a of the unknown dtype ['F32']"),
        ({"a": entry(shape=[True])}, b"0000", "has tensor a of shape [True], which is not a list of at most 64 whole"),
        ({"a": entry(shape=[1.0])}, b"0000", "has tensor a of shape [1.0], which is not a list of at most 64 whole"),
        ({"a": entry(shape=["1"])}, b"0000", "has tensor a of shape ['1'], which is not a list of at most 64 whole"),
        ({"a": entry(shape=[1] * 65)}, b"0000", "which is not a list of at most 64 whole numbers"),
        ({"a": entry(shape=[-1])}, b"0000", "has a header with a negative number"),
        ({"a": entry(shape=[10**12])}, b"0000", "in 4 bytes, which does not fit its shape"),
        ({"a": entry(shape=[2**62, 4, 0])}, b"0000", "which no machine can hold"),
        ({"a": entry(shape=[0, 2**64], offsets=[0, 0])}, b"", "which no machine can hold"),
        ({"a": entry(offsets=[4, 0])}, b"0000", "has tensor a with data_offsets [4, 0], which are not [start, end]"),
        ({"a": entry(offsets=[0, 4, 8])}, b"0000", "with data_offsets [0, 4, 8], which are not [start, end]"),
        ({"a": entry(), "b": entry()}, b"0000", "has tensor b at byte 0 where 4 is due"),
        ({"a": entry(), "b": entry(offsets=[5, 9])}, b"0" * 9, "has tensor b at byte 5 where 4 is due"),
        ({"a": entry()}, b"000", "holds 3 bytes of data and its header says 4: it is cut short or damaged"),
        ({"a": entry()}, b"00000", "holds 5 bytes of data and its header says 4: it is cut short or damaged"),
        ({"a": entry(), "__metadata__": {"format": 1}}, b"0000", "whose __metadata__ is not an object of texts"),
        ({"a": entry(), "__metadata__": {"format": "\ud800"}}, b"0000", "whose __metadata__ is not Unicode"),
        ({"\ud800": entry()}, b"0000", "a name that is not Unicode"),
        (b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), b"0000", "has a header that says a twice"),
        ({"a\nb\u202e": entry("?")}, b"0000", r"has tensor 'a\nb\u202e' of the unknown dtype ?"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, b"", "nests deeper than 64 levels"),
        (b'{"a":' * 50_000, b"", "nests deeper than 64 levels"),
    ],
)
def test_each_rule_names_the_file_and_what_broke_it(tmp_path, header, data, told):
    write(tmp_path / "a.safetensors", header, data)
    assert told in refused(tmp_path / "a.safetensors")


def test_lengths_that_cannot_be(tmp_path):
    path = tmp_path / "a.safetensors"
    for raw in (b"", b"1234567"):
        path.write_bytes(raw)
        assert f"is {len(raw)} bytes and its header says" in refused(path)
    for length in (3, 2**31, 2**63, 2**64 - 1):
        write(path, b"{}", length=length)
        assert f"is 10 bytes and its header says {length}: it is cut short" in refused(path)
    with open(path, "wb") as file:  # sparse: says 100 MB and one byte, and has them
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)
    assert "has a header of 100000001 bytes, more than 100000000" in refused(path)


def test_too_many_tensors_are_refused_at_once(tmp_path):
    path = tmp_path / "a.safetensors"
    start = time.perf_counter()
    write(path, {str(i): {} for i in range(100_003)})
    assert "has a header of more than 100000 tensors" in refused(path)
    write(path, b'{"a": [' + b"1," * 1_700_000 + b"1]}")
    assert "has a header of more than 100000 tensors" in refused(path)
    assert time.perf_counter() - start < 2


def mutated(rng, raw: bytes) -> bytes:
    """A file with one to three changes in its header: flips, bytes, cuts, tokens, copies, lengths; or cut short."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header, data = bytearray(raw[8:start]), raw[start:]
    tokens = [
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"0",
        b"-",
        b"e1",
        b"9" * 20,
        b"null",
        b"NaN",
        b"\\ud800",
        b"\0",
        b"F4",
    ]
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(header))
        match rng.randrange(6):
            case 0:
                header[at] ^= 1 << rng.randrange(8)
            case 1:
                header[at] = rng.randrange(256)
            case 2:
                del header[at : at + rng.randrange(1, 5)]
            case 3:
                header[at:at] = rng.choice(tokens)
            case 4:
                header[at : at + rng.randrange(1, 4)] = rng.choice(tokens)
            case 5:
                other = rng.randrange(len(header))
                header[at:at] = header[other : other + rng.randrange(1, 60)]
    length = len(header) if rng.random() < 0.8 else rng.choice((0, 1, len(header) + 1, 2**31, 2**63, start))
    return (struct.pack("<Q", length) + bytes(header) + data)[: None if rng.random() < 0.9 else rng.randrange(len(raw))]


def test_a_mutated_header_is_refused_or_read_as_the_library_reads_it(tmp_path):
    """The same facts as the library has of the damaged bytes: that a name was changed, only a manifest can tell."""
    rng, path = random.Random(0), tmp_path / "a.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    raw = path.read_bytes()
    counts = {"refused": 0, "read": 0}
    for i in range(400):
        path.write_bytes(mutated(rng, raw))
        try:
            ours = we_read(path)
        except UntrustedInput:
            refused(path)
            counts["refused"] += 1
            continue
        assert ours == library_reads(path), i
        counts["read"] += 1
    assert counts["refused"] > 300 and counts["read"] > 5
