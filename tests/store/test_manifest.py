"""The manifest finds every damage, and equal folders have equal manifests."""

import json
import os
import random
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantailor
from quantailor.errors import UntrustedInput
from quantailor.store.manifest import _checksum, hash_folder, read_manifest, verify, write_manifest


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    torch.manual_seed(0)
    save_file({"a": torch.randn(3, 5), "b": torch.zeros(2, dtype=torch.bfloat16)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "sub" / "notes.txt").write_text("notes")
    write_manifest(folder, kind="model", details={"scheme": "w4a16-g32", "parent": None})
    return folder


def refused(folder, look=verify) -> str:
    with pytest.raises(UntrustedInput) as error:
        look(folder)
    assert error.value.exit_code == 3 and str(error.value).isprintable()
    return str(error.value)


def test_it_says_what_the_folder_is_and_what_wrote_it(folder):
    manifest = verify(folder)
    assert manifest == read_manifest(folder) == json.loads((folder / "MANIFEST.json").read_text())
    assert list(manifest) == ["format_version", "kind", "versions", "details", "files", "checksum"]
    assert (manifest["format_version"], manifest["kind"]) == (1, "model")
    assert manifest["details"] == {"scheme": "w4a16-g32", "parent": None}
    assert manifest["versions"]["quantailor"] == quantailor.__version__
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["versions"]) == {"quantailor", "python", "torch", "transformers", "safetensors"}
    assert list(manifest["files"]) == ["config.json", "model.safetensors", "sub/notes.txt"]
    weights = manifest["files"]["model.safetensors"]
    assert weights["size_bytes"] == (folder / "model.safetensors").stat().st_size and len(weights["sha256"]) == 64
    assert weights["tensors"] == {"a": {"dtype": "F32", "shape": [3, 5]}, "b": {"dtype": "BF16", "shape": [2]}}
    assert "tensors" not in manifest["files"]["config.json"]


def test_the_same_folder_made_again_elsewhere_has_the_same_manifest(folder, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    for path in (again / "config.json", again / "sub" / "notes.txt"):
        os.utime(path, (1, 1))
    write_manifest(again, kind="model", details={"scheme": "w4a16-g32", "parent": None})
    assert (again / "MANIFEST.json").read_bytes() == (folder / "MANIFEST.json").read_bytes()
    assert hash_folder(again) == hash_folder(folder)


def test_hidden_files_of_tools_are_no_part_of_it(folder):
    (folder / ".gitattributes").write_text("*")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    assert not any(name.startswith(".") for name in verify(folder)["files"])


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing, and MANIFEST.json lists it; download, copy"),
        (lambda f: (f / "a.txt").write_text(""), "a.txt is not in MANIFEST.json; move it out of the folder"),
        (lambda f: (f / "sub" / "b").write_text(""), "sub/b is not in MANIFEST.json; move it out of the folder"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json is 2 bytes, and MANIFEST.json says 23; download"),
        (
            lambda f: (f / "sub" / "notes.txt").write_text("Notes"),
            "notes.txt has changed: its sha256 is not the one in",
        ),
        (lambda f: (f / "MANIFEST.json").unlink(), "has no MANIFEST.json, so it is not complete or not quantailor's; "),
        (lambda f: (f / "MANIFEST.json").write_text("{"), "MANIFEST.json is not JSON"),
        (lambda f: (f / "MANIFEST.json").write_text("[]"), "MANIFEST.json is damaged or was edited"),
        (lambda f: (f / "MANIFEST.json").write_text("{}"), "MANIFEST.json is damaged or was edited"),
        (lambda f: os.mkfifo(f / "pipe"), "pipe is not a regular file"),
        (
            lambda f: (f / "link").symlink_to("/etc/passwd"),
            "link is a symbolic link to /etc/passwd, outside its folder",
        ),
        (lambda f: shutil.rmtree(f), "cannot be read (No such file or directory); give the path"),
    ],
)
def test_the_first_file_that_is_wrong_is_named(folder, damage, told):
    damage(folder)
    assert told in refused(folder)
    assert str(folder) in refused(folder)


def test_an_edited_manifest_is_found_and_a_later_one_explained(folder):
    path = folder / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"details": {"scheme": "w8a8"}}))
    assert "MANIFEST.json is damaged or was edited: its checksum is not that of its text" in refused(folder)
    path.write_text(json.dumps(manifest | {"format_version": 2}))
    told = refused(folder, read_manifest)
    assert told.endswith("has format_version 2, and this quantailor reads up to 1; upgrade quantailor")
    path.unlink()
    path.symlink_to("/etc/passwd")
    assert "MANIFEST.json is a symbolic link to /etc/passwd" in refused(folder, read_manifest)


@pytest.mark.parametrize("files", [None, [], {"a": 1}, {"../../etc/passwd": {}}, {"config.json": {"size_bytes": "23"}}])
def test_a_manifest_that_a_stranger_wrote_is_only_a_list_to_compare(folder, files):
    """Its checksum holds; it can make `verify` fail, and nothing else."""
    manifest = {"format_version": 1, "files": files, "x": float("nan")}
    (folder / "MANIFEST.json").write_text(json.dumps({**manifest, "checksum": _checksum(manifest)}))
    refused(folder)


def test_every_flipped_bit_is_found_where_the_library_sees_none(folder):
    rng, before = random.Random(0), load_file(folder / "model.safetensors")
    silent = 0
    for path in (folder / "model.safetensors", folder / "config.json", folder / "MANIFEST.json"):
        raw = path.read_bytes()
        for _ in range(100):
            bit = rng.randrange(8 * len(raw))
            damaged = bytearray(raw)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            refused(folder)
            if path.suffix == ".safetensors" and bit // 8 >= len(raw) - 64:
                load_file(path)  # no complaint
                silent += 1
        path.write_bytes(raw)
    verify(folder)
    assert silent > 15 and torch.equal(load_file(folder / "model.safetensors")["a"], before["a"])


@pytest.mark.parametrize("place", ["model.safetensors", "config.json", "sub/notes.txt", "MANIFEST.json"])
def test_every_cut_is_found(folder, place):
    raw = (folder / place).read_bytes()
    for length in (0, 1, len(raw) // 2, len(raw) - 2):
        (folder / place).write_bytes(raw[:length])
        refused(folder)


def test_details_must_be_json_and_weights_must_be_sound(folder):
    old = (folder / "MANIFEST.json").read_bytes()
    with pytest.raises(ValueError, match=r"^details\.loss = nan is not finite, .*store None or a string instead$"):
        write_manifest(folder, kind="model", details={"loss": float("nan")})
    (folder / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(UntrustedInput, match=r"model.safetensors is 8 bytes and its header says .*: it is cut short"):
        write_manifest(folder, kind="model", details={})
    assert (folder / "MANIFEST.json").read_bytes() == old


def test_the_hash_of_a_folder_tells_names_and_bytes_apart(folder):
    hashes = [hash_folder(folder)]
    (folder / "MANIFEST.json").unlink()
    assert hash_folder(folder) == hashes[0]  # a parent model need not have one
    (folder / "config.json").rename(folder / "config2.json")
    hashes.append(hash_folder(folder))
    (folder / "config2.json").write_text("{}")
    hashes.append(hash_folder(folder))
    (folder / "new").write_text("")
    hashes.append(hash_folder(folder))
    assert len(set(hashes)) == 4 and all(len(h) == 64 for h in hashes)
    (folder / "out").symlink_to("/etc/passwd")
    assert "out is a symbolic link to /etc/passwd" in refused(folder, hash_folder)
