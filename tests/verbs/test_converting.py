"""`convert`: anyone's integers into another format, the same ones; refused by layer name where they do not fit."""

import hashlib

import pytest
import torch

from quantailor import api
from quantailor.errors import UsageError
from quantailor.evaluate.parity import digests
from quantailor.formats.receipt import ExportReceipt
from quantailor.kernels import decode
from quantailor.verbs import exporting
from tests.formats import foreign_making as make
from tests.formats.making import bytes_of, quantized


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, tiny_lm):
    cases = {
        "gptq": make.gptq(symmetric=True),
        "act-order": make.gptq(symmetric=True, act_order=True),
        "awq": make.awq(),
        "nf4": make.nf4(),
        "compressed": make.compressed(),
    }
    return {
        name: make.write(tmp_path_factory.mktemp(name) / "model", tiny_lm, *case)[0] for name, case in cases.items()
    }


def integers(path) -> dict:
    """Digests of the integers alone, and float32 weights of every layer."""
    model = api.load(path).model
    return {name: parts["integers"] for name, parts in digests(model).items()}


@pytest.mark.parametrize("source", ["gptq", "compressed"])
def test_through_every_format_and_back(theirs, tmp_path, source):
    pytest.importorskip("gguf", reason="the gguf extra is not installed")
    steps = [("own", "own"), ("hf", "hf"), ("gguf", "file.gguf"), ("hf", "hf-again"), ("own", "own-again")]
    now, first = theirs[source], integers(theirs[source])
    for to, name in steps:
        receipt = api.convert(now, tmp_path / name, to)
        assert receipt.integers_equal and receipt.layers == 14 and receipt.max_logit_difference <= 1e-5
        now = tmp_path / name
        assert integers(now) == first, f"the same integers after {to}"
    for name, module in api.load(theirs[source]).model.named_modules():
        if name.endswith("_proj"):
            assert torch.equal(module.weight, api.load(now).model.get_submodule(name).weight) or source == "compressed"
            break


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else bytes_of(path)


@pytest.mark.parametrize("to", ["hf", "own", "gguf"])
def test_converting_twice_gives_the_same_bytes(theirs, tmp_path, to):
    if to == "gguf":
        pytest.importorskip("gguf", reason="the gguf extra is not installed")
    name = "model.gguf" if to == "gguf" else "model"
    api.convert(theirs["gptq"], tmp_path / "1" / name, to)
    api.convert(tmp_path / "1" / name, tmp_path / "2" / name, to)
    api.convert(tmp_path / "2" / name, tmp_path / "3" / name, to)
    assert sha(tmp_path / "2" / name) == sha(tmp_path / "3" / name)
    if to == "gguf":
        assert sha(tmp_path / "1" / name) == sha(tmp_path / "2" / name)


REFUSED = [
    ("act-order", "hf", "model.layers.0.self_attn.q_proj: its groups are in act-order.*--to own"),
    ("act-order", "gguf", "model.layers.0.self_attn.q_proj: GGUF cannot hold .*act-order.*w4a16-g32"),
    ("act-order", "onnx", "model.layers.0.self_attn.q_proj: its groups are in act-order"),
    ("awq", "hf", "model.layers.0.self_attn.q_proj: its grid .*not symmetric.*--to own"),
    ("nf4", "gguf", "model.layers.0.self_attn.q_proj: GGUF cannot hold .*NF4.*w4a16-g32"),
]


@pytest.mark.parametrize(("source", "to", "told"), REFUSED)
def test_a_grid_that_does_not_fit_is_refused_by_layer_name(theirs, tmp_path, source, to, told):
    if to == "onnx":
        pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
        pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    out = tmp_path / ("model.gguf" if to == "gguf" else "model")
    with pytest.raises(UsageError, match=told):
        api.convert(theirs[source], out, to)
    assert list(tmp_path.iterdir()) == []


def test_onnx_is_written_with_its_receipt(theirs, tmp_path, monkeypatch):
    monkeypatch.setitem(exporting.WRITERS, "onnx", lambda folder, model: ExportReceipt("onnx", (), 14, True, 0.0))
    assert api.convert(theirs["gptq"], tmp_path / "out", "onnx").layers == 14
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"export.json", "MANIFEST.json"}


def test_bad_places_and_names(theirs, tiny_lm, tmp_path):
    for to, out, told in (
        ("gguf", "model", "one file; name it such as .*model.gguf"),
        ("hf", "model.gguf", "a folder"),
        ("tflite", "model", "none of hf, own, gguf, onnx"),
    ):
        with pytest.raises(UsageError, match=told):
            api.convert(theirs["gptq"], tmp_path / out, to)
    with pytest.raises(UsageError, match="convert quantizes nothing"):
        api.convert(tiny_lm, tmp_path / "out", "hf")
    with pytest.raises(UsageError, match="never written to"):
        api.convert(theirs["gptq"], theirs["gptq"] / "model.gguf", "gguf")


def test_half_scales_are_said_kept_and_served(tmp_path, tiny_lm):
    """The integers stay, every scale is a number of half precision, and serving reads them as such."""
    packed = api.pack(quantized(api.load(tiny_lm), "w4a16-g32"))
    before = {name: m.packed.scale.clone() for name, m in packed.model.named_modules() if hasattr(m, "packed")}
    receipt = api.convert(packed, tmp_path / "half", "own", half_scales=True)
    plain = api.convert(packed, tmp_path / "plain", "own")
    assert "scales were rounded to fp16" in receipt.notes[0] and not any("fp16" in note for note in plain.notes)
    assert integers(tmp_path / "half") == integers(tmp_path / "plain")
    model = api.load(tmp_path / "half").model
    for name, scale in before.items():
        module = model.get_submodule(name)
        assert torch.equal(module.packed.scale, scale.half().float()) and not torch.equal(module.packed.scale, scale)
        stored = module.packed.stored().with_half_scale()
        assert (stored.half_scale is None) == (not decode.has_kernel())
    with pytest.raises(UsageError, match="half_scales is about a quantized model's scales"):
        api.convert(tiny_lm, tmp_path / "x.gguf", "gguf", half_scales=True)
