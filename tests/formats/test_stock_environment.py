"""Our folders in an environment without quantailor: stock transformers and compressed-tensors, and what they need.

The environment is a new venv (no pip, no network). Into its site-packages go links to the files of exactly the
distributions that transformers, compressed-tensors and safetensors require, found by their metadata; quantailor is none
of them, no .pth file is linked, and the process that loads runs isolated (-I), so that neither PYTHONPATH nor the
working directory brings it back. It asserts that `quantailor` cannot be found before it loads anything.
"""

import json
import subprocess
import venv
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import save_file

from quantailor import api
from quantailor.evaluate.jitter import own_jitter
from quantailor.formats.stock import flat_inputs, stock_logits

pytest.importorskip("compressed_tensors")

CASES = {
    "w8a8": ("llama", "w8a8", {}),
    "w4a16": ("llama", "w4a16-g4", {"ragged": False}),
    "w2a16": ("llama", "w2a16-g32", {"rules": (("*.down_proj", "keep"),)}),
    "mixed": ("llama", "w4a16-g32", {"rules": (("*.down_proj", "w8a8"),), "ragged": False}),
    "w8a8 static": ("llama", "w8a8-static", {}),
    "bert w8a8": ("bert", "w8a8", {"rules": (("*.pooler.dense", "w8a8"),)}),
}


def required(*roots: str) -> set[str]:
    """The names of these distributions and of all that they need here, by their metadata; extras are left out."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            needs = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:  # of another platform
            continue
        found.add(name)
        parsed = [Requirement(need) for need in needs]
        waiting += [need.name for need in parsed if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of the environment."""
    root = tmp_path_factory.mktemp("stock") / "venv"
    venv.create(root, with_pip=False, symlinks=True)
    (site,) = root.glob("lib/python*/site-packages")
    for name in required("transformers", "compressed-tensors", "safetensors"):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            source = Path(distribution.locate_file(top)).resolve()
            if source.suffix != ".pth" and not (site / top).exists():
                (site / top).symlink_to(source)
    return root / "bin" / "python"


@pytest.fixture(scope="module")
def told(saved_as, python, tmp_path_factory) -> dict:
    """What one process of that environment says of all folders."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    names = {}
    for name, (model, scheme, options) in CASES.items():
        _, folder = saved_as(model, scheme, **options)
        packed = api.load(folder).model
        ids = torch.randint(3, 80, (3, 24), generator=torch.Generator().manual_seed(1))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            ours = packed(**inputs).logits
        (elsewhere / name).symlink_to(folder)
        kept = {f"input.{key}": value for key, value in inputs.items()}
        kept |= {"ours": ours, "as_stock": stock_logits(packed, inputs)}
        save_file({key: value.contiguous() for key, value in kept.items()}, elsewhere / f"{name}.safetensors")
        names[name] = str(elsewhere / name), own_jitter(packed, inputs), flat_inputs(packed, inputs)
    script = Path(__file__).with_name("stock_loads.py")
    command = [python, "-I", script, *(path for path, *_ in names.values())]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=elsewhere)
    assert run.returncode == 0, run.stderr[-3000:]
    document = json.loads(run.stdout.splitlines()[-1])
    folders = {name: {**document[path], "jitter": j, "flat": flat} for name, (path, j, flat) in names.items()}
    return {"path": document["path"], "distributions": document["distributions"], "folders": folders}


def test_quantailor_is_really_absent(told):
    assert not any("quantailor" in path for path in told["path"] if "venv" in path and "site-packages" not in path)
    assert "transformers" in told["distributions"] and "compressed-tensors" in told["distributions"]
    assert not {"quantailor", "peft", "onnx", "pytest"} & set(told["distributions"])


@pytest.mark.parametrize("name", CASES)
def test_it_loads_whole_and_computes_what_we_say_it_computes(told, name):
    found = told["folders"][name]
    assert not found["missing"] and not found["unexpected"]
    assert found["as_stock"] <= 1e-5 and found["as_stock_argmax"] == 1.0


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_our_integers_compute(told, name):
    """To float precision where activations are float. Where they are rounded, by as much as our own model moves when
    its embeddings are moved by one unit in the last place, give or take the luck of a few roundings."""
    found = told["folders"][name]
    rounded = "a8" in CASES[name][1] or name == "mixed"
    limit = 1e-1 if found["flat"] else 2e-2 if rounded else 1e-5  # a flat input: see `flat_inputs`
    assert found["ours"] <= limit
    if not rounded:
        assert found["jitter"] <= 1e-5


def test_a_flat_input_is_the_one_thing_that_stock_scales_otherwise(told):
    assert told["folders"]["bert w8a8"]["flat"] == ["bert.pooler.dense"]
    assert not any(told["folders"][name]["flat"] for name in CASES if name != "bert w8a8")
