"""Weights read on one thread and hashed on another: the same tensors, the same verdicts, and nobody waits for ever."""

import hashlib
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantailor.errors import UntrustedInput
from quantailor.store import reading as module
from quantailor.store import tensors as reader
from quantailor.store.manifest import verify, write_manifest
from quantailor.store.reading import reading
from quantailor.store.tensors import write_model_tensors


@pytest.fixture(params=[1, 3])
def folder(tmp_path, request):
    """One file, or shards, whose tensors are longer than a piece that is read."""
    folder = tmp_path / "model"
    folder.mkdir()
    torch.manual_seed(0)
    parts = {f"t{n}": torch.randn(40 + n, 33).to(t) for n, t in enumerate((torch.float32, torch.bfloat16, torch.int8))}
    parts |= {"empty": torch.zeros(0, 4), "one": torch.tensor(7)}
    save_file(parts, tmp_path / "all.safetensors", metadata={"format": "pt"})
    size = {1: 10**9, 3: 4000}[request.param]
    write_model_tensors(folder, reader.read_header(tmp_path / "all.safetensors"), shard_bytes=size)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    write_manifest(folder, kind="model", details={})
    return folder


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(reader, "_READ", 1000)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def flip(path, place):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 4
    path.write_bytes(raw)


def test_the_same_tensors_and_digests(folder):
    expected = {name: tensor for path in shards(folder) for name, tensor in load_file(path).items()}
    with reading(folder) as found:
        assert set(found) == set(expected) and len(found) == 5
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())
        found.wait_for_digests()
        for path in shards(folder):
            assert found.digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.manifest == verify(folder)


@pytest.mark.parametrize("place", [4, -1], ids=["first tensor", "last byte"])
def test_damage_is_told_in_place_of_what_it_led_to(folder, place):
    path = shards(folder)[-1]
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    flip(path, header + place if place >= 0 else place)
    with pytest.raises(UntrustedInput, match="has changed: its sha256"), reading(folder) as found:
        assert list(found.values())
        raise ValueError("what damage led to")
    with pytest.raises(UntrustedInput, match="has changed: its sha256"), reading(folder):
        pass
    with reading(folder, verify_hashes=False) as found:
        assert len(list(found.values())) == 5
    assert found.manifest == {}


def test_damage_that_scanning_meets_is_still_damage(folder):
    path = shards(folder)[0]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UntrustedInput, match=r"MANIFEST\.json says"), reading(folder):
        pass
    with pytest.raises(UntrustedInput, match="cut short or damaged"), reading(folder, verify_hashes=False):
        pass


def test_an_error_of_a_sound_folder_stays_itself(folder):
    for verified in (True, False):
        with pytest.raises(KeyError, match="mine"), reading(folder, verify_hashes=verified):
            raise KeyError("mine")


@pytest.mark.parametrize("verified", [True, False])
def test_a_file_cut_while_it_is_read_ends_every_wait(folder, monkeypatch, verified):
    path = shards(folder)[-1]
    scan = module.scan_model_folder

    def scanned(place):
        files = scan(place)
        path.write_bytes(path.read_bytes()[:-1])
        return files

    monkeypatch.setattr(module, "scan_model_folder", scanned)
    told = pytest.raises(UntrustedInput, match=r"bytes, and MANIFEST|was cut short")
    with told, reading(folder, verify_hashes=verified) as found:
        assert list(found.values())


def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch):
    def broken(*_):
        raise OSError("the disk says no")

    monkeypatch.setattr(module, "filled", broken)
    with pytest.raises(UntrustedInput, match="cannot be read: the disk says no"), reading(folder) as found:
        assert list(found.values())


def test_digests_are_of_what_was_read_however_late(folder, monkeypatch):
    """Who changes tensors waits; the digest, slow here, has then seen them unchanged."""

    class Slow:
        def __init__(self):
            self.inner = hashlib.sha256()
            self.hexdigest = self.inner.hexdigest

        def update(self, piece):
            time.sleep(0.002)
            self.inner.update(piece)

    monkeypatch.setattr(module, "hashlib", SimpleNamespace(sha256=Slow))
    with reading(folder) as found:
        tensors = list(found.values())
        found.wait_for_digests()
        for tensor in tensors:
            tensor.zero_()
    assert found.manifest


def test_leaving_by_an_interrupt_reads_no_further(folder, monkeypatch):
    read = []
    slow = reader.filled

    def filled(file, fact, seen=None):
        read.append(fact)
        time.sleep(0.1)
        return slow(file, fact, seen)

    monkeypatch.setattr(module, "filled", filled)
    with pytest.raises(KeyboardInterrupt), reading(folder):
        raise KeyboardInterrupt
    assert len(read) < 5
