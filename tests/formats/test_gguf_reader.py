"""A stranger's file: what is sound is read, and everything else is one line, at once and without memory."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from quantailor.errors import UntrustedInput
from quantailor.formats import gguf_reader
from quantailor.formats.gguf_blocks import Blocks
from quantailor.formats.gguf_reader import TYPES, open_gguf
from tests.formats.gguf_oracle import block_bytes, container, entry, info, text

FLOATS = struct.pack("<4f", 1, -2, 0.5, 8) + bytes(16)
Q4 = block_bytes("Q4_0", [(i % 16) - 8 for i in range(32)], 0.5) + bytes(14)
SOUND = container(
    [entry("general.architecture", "llama"), entry("a.list", ["x", "yé"]), entry("a.numbers", [1, 2, 3])],
    [info("one", [4], 0, 0), info("two.weight", [32, 1], 2, 32)],
    FLOATS + Q4,
)


def read(tmp_path, raw):
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    return open_gguf(path)


def test_a_sound_file_is_read(tmp_path):
    file = read(tmp_path, SOUND)
    assert file.metadata["general.architecture"] == "llama" and file.metadata["a.list"] == ["x", "yé"]
    assert file.metadata["a.numbers"].tolist() == [1, 2, 3]
    assert torch.equal(file.read("one"), torch.tensor([1, -2, 0.5, 8]))
    two = file.read("two.weight")
    assert isinstance(two, Blocks) and two.q[0].tolist() == [(i % 16) - 8 for i in range(32)]
    assert file.tensors["two.weight"].shape == (1, 32)


def test_types_are_those_of_the_public_package():
    gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
    assert {n: sizes for n, (_, *sizes) in TYPES.items()} == {
        int(kind): list(sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()
    }
    assert all(gguf.GGMLQuantizationType(number).name == name for number, (name, *_) in TYPES.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_floats_keep_their_type(tmp_path, dtype):
    values = torch.randn(3, 8).to(dtype)
    kind = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}[dtype]
    raw = values.view(torch.int16 if dtype != torch.float32 else torch.int32).numpy().tobytes()
    data = raw + bytes(-len(raw) % 32)
    read_again = read(tmp_path, container((), [info("w", [8, 3], kind, 0)], data)).read("w")
    assert read_again.dtype == dtype and torch.equal(read_again, values)


HUGE = 2**60
BOMB = container((), (), counts=(0, 1))[:24] + text("a") + struct.pack("<IIQ", 9, 8, HUGE)  # of 49 bytes


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "asks for 4 bytes"),
        (b"GGUF", "asks for 4 bytes"),
        (b"GGML" + SOUND[4:], "does not begin with GGUF"),
        (container(version=1), "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + SOUND[8:], "big-endian"),
        (BOMB, "strings in a, more than"),
        (container(counts=(HUGE, 0)), "promises"),
        (container(counts=(0, HUGE)), "promises"),
        (container([struct.pack("<Q", HUGE)], counts=(0, 0)) + b"", None),
        (container([struct.pack("<Q", HUGE) + bytes(40)], counts=(0, 1)), "asks for"),
        (container([text("a") + struct.pack("<IIQ", 9, 4, HUGE)], counts=(0, 1)), "asks for"),
        (container([text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(32)], counts=(0, 1)), "unknown or nested"),
        (container([text("a") + struct.pack("<I", 77)], counts=(0, 1)), "unknown type 77"),
        (container([text("a") + struct.pack("<IB", 7, 2)]), "truth value of 2"),
        (container([entry("a", 1), entry("a", 2)]), "there twice"),
        (container([entry("", 1)]), "empty"),
        (container([entry("a\nb", 1)]), "unprintable"),
        (container([entry("a", "x"), text("b") + struct.pack("<I", 8) + text(b"\xff\xfe")]), "not UTF-8"),
        (container([entry("general.alignment", 0)]), "alignment"),
        (container([entry("general.alignment", 24)]), "alignment"),
        (container([entry("general.alignment", 2**31)]), "alignment"),
        (container([entry("general.alignment", "32")]), "alignment"),
        (container([entry("split.count", 3)]), "one part of several"),
        (container((), [info("w", [4], 0, 0), info("w", [4], 0, 32)], bytes(64)), "w twice"),
        (container((), [info("w", [4], 0, 32)], bytes(64)), "offset 32 where 0 is due"),
        (container((), [info("w", [4], 0, 0), info("v", [4], 0, 0)], bytes(64)), "offset 0 where 32 is due"),
        (container((), [info("w", [4], 0, HUGE)], bytes(64)), "where 0 is due"),
        (container((), [info("w", [4096], 0, 0)], bytes(64)), "more than the file"),
        (container((), [info("w", [12], 0, 0)], bytes(40)), "cut short"),
        (container((), [info("w", [4], 0, 0)], bytes(64)), "32 bytes after its last tensor"),
        (container((), [info("w", [0], 0, 0)], bytes(32)), "empty"),
        (container((), [info("w", [2**63, 2**63, 4], 0, 0)], bytes(32)), "more than the file"),
        (container((), [info("w", [33], 2, 0)], bytes(64)), "no whole Q4_0 blocks"),
        (container((), [info("w", [], 0, 0)], bytes(32)), "0 dimensions"),
        (container((), [info("w", [1] * 5, 0, 0)], bytes(32)), "5 dimensions"),
        (container((), [info("w", [4], 5, 0)], bytes(32)), "unknown type 5"),
        (container((), [info("../w", [4], 0, 0)], bytes(32)), "a tensor called"),
        (container((), [info("w\0x", [4], 0, 0)], bytes(32)), "a tensor called"),
        (container((), [info("w" * 64, [4], 0, 0)], bytes(32)), "a tensor called"),
        (container((), [info("", [4], 0, 0)], bytes(32)), "a tensor called"),
    ],
)
def test_what_is_not_sound_is_refused_in_one_line(tmp_path, raw, why):
    if why is None:  # bytes that no count speaks of: harmless where no tensor follows
        assert read(tmp_path, raw).tensors == {}
        return
    with pytest.raises(UntrustedInput) as caught:
        read(tmp_path, raw)
    assert why in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("cut", [*range(0, 200, 7), 250])
def test_every_cut_is_found(tmp_path, cut):
    with pytest.raises(UntrustedInput):
        read(tmp_path, SOUND[: min(cut, len(SOUND) - 1)])


def test_values_that_are_no_numbers_are_refused(tmp_path):
    bad = struct.pack("<f", float("nan")) + bytes(28)
    with pytest.raises(UntrustedInput, match="NaN or Inf in tensor w"):
        read(tmp_path, container((), [info("w", [4], 0, 0)], bad)).read("w")
    bad = struct.pack("<e", float("inf")) + bytes(30)
    with pytest.raises(UntrustedInput, match="tensor w in which a block's scale is NaN or Inf"):
        read(tmp_path, container((), [info("w", [32], 2, 0)], bad)).read("w")


def test_a_type_that_is_not_read_is_named(tmp_path):
    file = read(tmp_path, container((), [info("w", [256], 12, 0)], bytes(160)))
    with pytest.raises(UntrustedInput, match=r"w as Q4_K, which is not read"):
        file.read("w")


def test_links_to_devices_and_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path, tmp_path / "none"):
        with pytest.raises(UntrustedInput):
            open_gguf(path)


def test_counts_are_limited_even_where_the_file_could_hold_them(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_reader, "MAX_STRINGS", 3)
    with pytest.raises(UntrustedInput, match="than 3"):
        read(tmp_path, container([entry("a", ["", "", "", ""])]))
    monkeypatch.setattr(gguf_reader, "MAX_HEADER_BYTES", 60)
    with pytest.raises(UntrustedInput, match="too long a header"):
        read(tmp_path, container([entry("a", "x" * 50)]))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["header", "data"])
def test_mutated_files_are_refused_in_one_line_or_read_as_they_are(tmp_path, tiny_lm, part):
    """250 files each, by fixed seeds, in a process with limited memory: no crash, none over 5 s, one line each.

    Where only the header was changed and the file is taken, its tensors are the original's.
    """
    pytest.importorskip("gguf", reason="the gguf extra is not installed")
    job = {"model": str(tiny_lm), "folder": str(tmp_path), "part": part, "count": 250}
    run = subprocess.run(
        [sys.executable, "-m", "tests.formats.gguf_fuzzing"], input=json.dumps(job), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["files"] == 250 and result["wrong"] == []
    assert result["slowest_s"] < 5 and result["grown_mb"] < 300, result
    assert result["refused"] >= (200 if part == "header" else 20), result
    assert np.isfinite(result["slowest_s"])
