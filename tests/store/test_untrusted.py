"""A stranger's folder: each attack and each damage, with its own line."""

import json
import os
import random
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from quantailor.errors import UntrustedInput
from quantailor.store.header import MAX_TENSORS
from quantailor.store.untrusted import _first_not_finite, check_finite, scan_model_folder
from tests.store.test_header import mutated

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 4}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path):
    """One file of weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def sharded(folder):
    """Two shards and their index."""
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.ones(2, 3)}, folder / SHARDS[0])
    save_file({"b": torch.ones(4, dtype=torch.bfloat16)}, folder / SHARDS[1])
    index(folder, {"a": SHARDS[0], "b": SHARDS[1]})
    return folder


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder, **options) -> str:
    with pytest.raises(UntrustedInput) as error:
        scan_model_folder(folder, **options)
    assert error.value.exit_code == 3 and str(error.value).isprintable() and len(str(error.value)) < 2000
    return str(error.value)


# What passes


def test_facts_of_one_file(folder):
    files = scan_model_folder(folder)
    assert (files.folder, files.config, files.weight_files) == (folder, CONFIG, (folder / "model.safetensors",))
    assert {name: (fact.dtype, fact.shape, fact.file.name) for name, fact in files.tensors.items()} == {
        "a": ("F32", (2, 3), "model.safetensors"),
        "b": ("BF16", (4,), "model.safetensors"),
    }
    assert scan_model_folder(str(folder)) == files


def test_facts_of_shards(sharded):
    files = scan_model_folder(sharded)
    assert files.weight_files == tuple(sharded / shard for shard in SHARDS)
    assert [(name, fact.file.name) for name, fact in files.tensors.items()] == [("a", SHARDS[0]), ("b", SHARDS[1])]


def test_an_index_of_one_file_that_is_model_safetensors(folder):
    index(folder, {"a": "model.safetensors", "b": "model.safetensors"})
    assert set(scan_model_folder(folder).tensors) == {"a", "b"}


def test_weights_may_go_by_our_name(folder):
    (folder / "model.safetensors").rename(folder / "quantailor.safetensors")
    for name in (None, "quantailor"):
        assert scan_model_folder(folder, weights_name=name).weight_files == (folder / "quantailor.safetensors",)
    assert "has no weights: no model.safetensors, no index of one" in refused(folder, weights_name="model")
    assert "weights_name=../x is not a plain name; use one of model, quantailor" in refused(folder, weights_name="../x")


def test_weights_by_both_names_are_ambiguous_unless_one_is_asked_for(folder):
    save_file({"c": torch.ones(1)}, folder / "quantailor.safetensors")
    assert "has both model.safetensors and quantailor.safetensors; remove the one that is not meant" in refused(folder)
    assert set(scan_model_folder(folder, weights_name="quantailor").tensors) == {"c"}


def test_real_files_of_tools_beside_them_are_fine(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "link").symlink_to("/etc/passwd")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"x")
    (folder / "training_args.bin").write_bytes(b"x")
    assert scan_model_folder(folder).folder == folder


# What is missing


def test_no_folder_no_files_no_config_no_weights(folder, tmp_path):
    assert (
        "org/name cannot be read (No such file or directory); give the path of a model's folder, or fetch"
        in refused("org/name")
    )
    assert "is a file, not a folder; give the folder it lies in" in refused(folder / "config.json")
    (tmp_path / "empty").mkdir()
    assert "empty is empty; give the folder that holds config.json" in refused(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    assert "has no weights: no model.safetensors or quantailor.safetensors, no index of one; download" in refused(
        folder
    )
    (folder / "config.json").unlink()
    assert "has no config.json; give the folder that holds it" in refused(folder)


def test_the_configuration_is_checked(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 1_000_000}))
    start = time.perf_counter()
    assert "config.json has num_hidden_layers = 1000000, which must be a whole number from 0 to 2048" in refused(folder)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth", "last.ckpt", "model.pkl"]
)
def test_pickles_are_named_and_never_opened(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_text(f"cos\nsystem\n(S'touch {tmp_path}/canary'\ntR.")  # a pickle that runs `touch`
    (folder / "training_args.bin").write_bytes(b"x")
    told = refused(folder)
    if name.startswith("pytorch_model"):
        assert f"{name} is a pickle" in told
    assert "is a pickle, which can run code; convert it to safetensors with transformers' from_pretrained and" in told
    assert not (tmp_path / "canary").exists()


# Names and links that lead out


OUTSIDE = ["../x", "/etc/passwd", "..", ".", "", "sub/a.safetensors", "a\\b.safetensors", "a\0.safetensors"]
OUTSIDE += [
    "../secret/s.safetensors",
    ".hidden.safetensors",
    "a\n.safetensors",
    "config.json",
    "x.bin",
    "\ud800.safetensors",
]


@pytest.mark.parametrize("name", [*OUTSIDE, 5, None, ["a"], {}])
def test_an_index_names_only_files_right_here(sharded, tmp_path, name):
    (tmp_path / "secret").mkdir()
    save_file({"b": torch.ones(4)}, tmp_path / "secret" / "s.safetensors")
    index(sharded, {"a": SHARDS[0], "b": name})
    told = refused(sharded)
    assert "index.json puts tensor b in " in told
    assert "which is not the plain name of a *.safetensors file in the same folder; download or copy" in told


def test_an_index_names_only_files_that_are_there(sharded):
    for name in ("gone.safetensors", "x" * 300 + ".safetensors"):
        index(sharded, {"a": SHARDS[0], "b": name})
        assert " is missing, and model.safetensors.index.json lists it; download or copy" in refused(sharded)
    (sharded / "dir.safetensors").mkdir()
    index(sharded, {"a": SHARDS[0], "b": "dir.safetensors"})
    assert "dir.safetensors is not a regular file" in refused(sharded)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 50_000, "{", '{"a": NaN']
)
def test_an_index_must_be_one(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refused(sharded)


def test_an_index_has_no_more_tensors_than_a_model_may(sharded):
    index(sharded, {str(i): SHARDS[0] for i in range(MAX_TENSORS + 1)})
    assert "has no weight_map of 1 to 100000 tensors" in refused(sharded)


def test_index_and_shards_must_agree(sharded):
    index(sharded, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]})
    assert f"{SHARDS[1]} has tensor b, which model.safetensors.index.json puts in {SHARDS[0]}; download" in refused(
        sharded
    )
    index(sharded, {"a": SHARDS[0]})
    assert set(scan_model_folder(sharded).tensors) == {"a"}  # a shard that no index lists is not read
    index(sharded, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]})
    assert f"{SHARDS[1]} lacks tensor c, which model.safetensors.index.json puts there; download" in refused(sharded)
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, sharded / SHARDS[1])
    index(sharded, {"a": SHARDS[0], "b": SHARDS[1]})
    assert f"{SHARDS[1]} has tensor a, which model.safetensors.index.json puts in {SHARDS[0]}" in refused(sharded)


def test_a_file_beside_an_index_that_does_not_list_it_is_ambiguous(sharded):
    save_file({"a": torch.ones(1)}, sharded / "model.safetensors")
    assert "has model.safetensors, and model.safetensors.index.json that does not list it; remove" in refused(sharded)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused_unless_asked_for(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    told = refused(folder)
    assert f"{name} is a symbolic link to {tmp_path}/elsewhere, outside its folder; put the file itself there" in told
    assert told.endswith("or pass --follow-symlinks if you trust it")
    assert set(scan_model_folder(folder, follow_symlinks=True).tensors) == {"a", "b"}


def test_links_in_subfolders_and_to_folders_are_refused_too(folder, tmp_path):
    (folder / "additional_chat_templates").symlink_to("/etc")
    assert "additional_chat_templates is a symbolic link to /etc" in refused(folder)
    scan_model_folder(folder, follow_symlinks=True)
    (folder / "additional_chat_templates").unlink()
    (folder / "sub").mkdir()
    (folder / "sub" / "x").symlink_to("/etc/passwd")
    assert "sub/x is a symbolic link to /etc/passwd" in refused(folder)


def test_the_cache_of_the_hub_links_to_its_own_blobs(sharded, tmp_path):
    root = tmp_path / "models--org--name"
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(sharded.iterdir())):
        path.rename(root / "blobs" / f"hash{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash{i}")
    files = scan_model_folder(snapshot)
    assert files.weight_files == tuple(snapshot / shard for shard in SHARDS)
    check_finite(files)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("/etc/passwd")
    assert "tokenizer.json is a symbolic link to /etc/passwd" in refused(snapshot)


def test_a_pipe_is_refused_without_waiting(folder):
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    assert "tokenizer.json is not a regular file" in refused(folder)


# Damage


def test_a_cut_file_is_named(sharded):
    raw = (sharded / SHARDS[1]).read_bytes()
    for length in (0, 4, 8, 40, len(raw) - 1):
        (sharded / SHARDS[1]).write_bytes(raw[:length])
        told = refused(sharded)
        assert f"{SHARDS[1]} " in told and "cut short" in told and told.endswith("; download or copy it again")


def test_mutated_headers_in_a_folder_are_refused_or_change_nothing_that_the_index_names(sharded):
    rng, raw, before = random.Random(1), (sharded / SHARDS[0]).read_bytes(), scan_model_folder(sharded)
    num_refused = 0
    for _ in range(200):
        (sharded / SHARDS[0]).write_bytes(mutated(rng, raw))
        try:
            after = scan_model_folder(sharded)
        except UntrustedInput:
            refused(sharded)
            num_refused += 1
        else:
            assert set(after.tensors) == set(before.tensors)
    assert num_refused > 150


# Numbers


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_first_bad_number_is_named_with_tensor_file_and_place(sharded, dtype):
    index(sharded, {"a": SHARDS[0], "b": SHARDS[1], "bad\n": SHARDS[1], "z": SHARDS[1]})
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = torch.ones(3, 5)
        weight[1, 2], weight[2, 4] = bad, float("nan")
        save_file({"b": torch.ones(2), "bad\n": weight.to(dtype), "z": weight.clone()}, sharded / SHARDS[1])
        with pytest.raises(UntrustedInput) as error:
            check_finite(scan_model_folder(sharded))
        told = str(error.value)
        assert (
            told.startswith(f"{sharded}/{SHARDS[1]} has {bad} in") and told.isprintable() and error.value.exit_code == 3
        )
        assert r"in tensor 'bad\n' at element 7, counted flat" in told and told.endswith("; use a sound copy")


def test_no_place_is_overlooked():
    """aminmax on every length and place around its vector widths, against isfinite."""
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for length in (1, 3, 8, 31, 64, 65, 100):
            for place in range(length):
                for bad in (float("nan"), float("inf"), -float("inf")):
                    x = torch.full((length,), -1.5, dtype=dtype)
                    assert _first_not_finite(x) is None
                    x[place] = bad
                    found = _first_not_finite(x)
                    assert found is not None and found[0] == place


def test_large_empty_and_extreme_tensors_that_are_sound(folder):
    x = torch.zeros(2**20 + 3)
    tensors = {
        "large": x.clone(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.0),
        "extreme": torch.tensor(
            [torch.finfo(torch.float32).max, torch.finfo(torch.float32).smallest_normal, -3e38, 1e-45]
        ),
        "int": torch.full((4,), -1, dtype=torch.int64),
        "half": torch.tensor([65504.0, -65504.0], dtype=torch.float16),
        "e4m3": torch.tensor([448.0, -448.0]).to(torch.float8_e4m3fn),
        "e8m0": torch.tensor([1.0, 2.0]).to(torch.float8_e8m0fnu),
    }
    save_file(tensors, folder / "model.safetensors")
    check_finite(scan_model_folder(folder))
    x[-1] = float("nan")
    save_file(tensors | {"large": x}, folder / "model.safetensors")
    with pytest.raises(UntrustedInput, match=r"has nan in tensor large at element 1048578, counted flat"):
        check_finite(scan_model_folder(folder))
    save_file(
        tensors | {"e8m0": torch.tensor([255], dtype=torch.uint8).view(torch.float8_e8m0fnu)},
        folder / "model.safetensors",
    )
    with pytest.raises(UntrustedInput, match=r"has nan in tensor e8m0 at element 0"):
        check_finite(scan_model_folder(folder))


def test_a_file_damaged_after_the_scan_is_named(folder):
    files = scan_model_folder(folder)
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UntrustedInput, match=r"model.safetensors cannot be read \(.*\); download or copy it again$"):
        check_finite(files)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UntrustedInput, match=r"model.safetensors cannot be read \(.*\); download or copy it again$"):
        check_finite(files)


def test_scanning_needs_no_torch():
    code = "import sys, quantailor; before = 'torch' in sys.modules; import quantailor.store.untrusted, "
    code += "quantailor.store.manifest; assert before or 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
