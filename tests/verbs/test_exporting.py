"""One model in three formats: what is published, what is refused, and what stops it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from quantailor import api
from quantailor.errors import QualityGateFailed, UntrustedInput, UsageError
from quantailor.evaluate.parity import digests
from quantailor.formats.receipt import ExportReceipt
from quantailor.store.manifest import hash_folder, verify
from quantailor.verbs import exporting
from quantailor.verbs.exporting import export
from tests.formats.making import edited, put


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Only a power failure can tell."""
    monkeypatch.setattr("os.fsync", lambda fd: None)


@pytest.fixture(scope="module")
def w4(tmp_path_factory, tiny_lm):
    return api.save(api.quantize(tiny_lm, "w4a16-g32", method="rtn"), tmp_path_factory.mktemp("source") / "w4")


@pytest.fixture
def stubs(monkeypatch):
    """onnx writes one file, gguf refuses: what the formats themselves do has its own tests."""

    def onnx(folder, model):
        (folder / "model.onnx").write_bytes(b"graph")
        return ExportReceipt("onnx", (), 3, True, 1e-7, ("a note",))

    def gguf(folder, model):
        (folder / "half.gguf").write_bytes(b"half")
        raise UsageError("model.layers.0: its grid has no block")

    monkeypatch.setitem(exporting.WRITERS, "onnx", onnx)
    monkeypatch.setitem(exporting.WRITERS, "gguf", gguf)


def test_three_formats_with_the_same_integers(w4, tmp_path):
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    pytest.importorskip("gguf", reason="the gguf extra is not installed")
    receipts = export(w4, tmp_path / "out")
    assert [receipt.format for receipt in receipts] == ["hf", "onnx", "gguf"]
    source = api.load(w4)
    for receipt in receipts:
        assert receipt.refused is None and receipt.integers_equal, receipt
        assert receipt.layers == len(source.state.inventory.quantized)
        assert receipt.max_logit_difference < (1e-5 if receipt.format != "gguf" else 1e-2)  # its scales are fp16
        assert all((tmp_path / "out" / name).is_file() for name in receipt.files) and receipt.files
    manifest = verify(tmp_path / "out")
    assert set(manifest["files"]) == {"export.json", *(name for receipt in receipts for name in receipt.files)}
    document = json.loads((tmp_path / "out" / "export.json").read_text())
    assert document["formats"] == [receipt.to_json() for receipt in receipts]
    assert document["source"] == {"folder": "w4", "hash": hash_folder(w4)} and document["scheme"] == "w4a16-g32"


def test_hf_is_a_folder_that_check_proves(w4, tmp_path):
    (receipt,) = export(w4, tmp_path / "out", ["hf"])
    assert digests(api.load(tmp_path / "out" / "hf").model) == digests(api.load(w4).model)
    assert api.check(tmp_path / "out" / "hf").equal
    assert "transformers" in receipt.notes[0] and "hf/quantailor.safetensors" in receipt.files
    ours, theirs = (load_file(folder / "quantailor.safetensors") for folder in (w4, tmp_path / "out" / "hf"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_in_memory_is_packed_and_left_as_it_is(tiny_lm, tmp_path):
    model = api.quantize(tiny_lm, "w8a8", method="rtn")
    (receipt,) = export(model, tmp_path / "out", ["hf"])
    assert receipt.layers == 14 and not model.is_packed
    assert "stock transformers with compressed-tensors" in receipt.notes[0]


def test_what_one_format_cannot_say_the_others_do(w4, tmp_path, stubs):
    receipts = export(w4, tmp_path / "out")
    assert [(r.format, r.refused) for r in receipts][1:] == [
        ("onnx", None),
        ("gguf", "model.layers.0: its grid has no block"),
    ]
    assert receipts[1].files == ("onnx/model.onnx",) and receipts[1].notes == ("a note",)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["MANIFEST.json", "export.json", "hf", "onnx"]
    assert verify(tmp_path / "out")["details"] == {"formats": ["hf", "onnx"]}


def test_nothing_appears_where_all_refuse(w4, tmp_path, stubs):
    with pytest.raises(UsageError, match=r"^gguf: model.layers.0: its grid has no block$"):
        export(w4, tmp_path / "out", ["gguf"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [QualityGateFailed("a.b: integers are not the model's"), KeyboardInterrupt()])
def test_nothing_appears_where_a_file_is_wrong(error, w4, tmp_path, stubs, monkeypatch):
    def fails(folder, model):
        (folder / "model.onnx").write_bytes(b"graph")
        raise error

    monkeypatch.setitem(exporting.WRITERS, "onnx", fails)
    with pytest.raises(type(error)):
        export(w4, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_hf_folder_that_reads_back_otherwise_is_an_error(w4, tmp_path, monkeypatch):
    written = exporting.folders.write_folder

    def altered(folder, model, *args, **options):
        other = api.load(w4).model
        next(m for n, m in other.named_modules() if n.endswith("q_proj")).packed.words[0, 0] += 1
        return written(folder, other, *args, **options)

    monkeypatch.setattr(exporting.folders, "write_folder", altered)
    with pytest.raises(QualityGateFailed, match=r"model\.layers\.0\.self_attn\.q_proj: integers differ after reading"):
        export(w4, tmp_path / "out", ["hf"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "formats, message",
    [
        (["onxn"], "format 'onxn' is none of hf, onnx, onnx-cache, gguf"),
        ("hf,pt", "format 'pt' is none of hf, onnx, onnx-cache, gguf"),
        ([], "no format to export to"),
        ([""], "format '' is none of"),
    ],
)
def test_unknown_formats_stop_before_the_work(formats, message, w4, tmp_path):
    with pytest.raises(UsageError, match=message):
        export(w4, tmp_path / "out", formats)
    assert list(tmp_path.iterdir()) == []


def test_a_format_named_twice_is_written_once(w4, tmp_path, stubs):
    assert [r.format for r in export(w4, tmp_path / "out", "onnx,hf,onnx")] == ["onnx", "hf"]


def test_a_float_model_is_an_error(tiny_lm, tmp_path):
    with pytest.raises(UsageError, match="the model is float, and export quantizes nothing; quantize it first"):
        export(tiny_lm, tmp_path / "out")


def test_the_source_is_never_written_to(w4, tmp_path, stubs):
    with pytest.raises(UsageError, match="is the input"):
        export(w4, w4, overwrite=True)
    with pytest.raises(UsageError, match="lies inside the input"):
        export(w4, w4 / "out")


def test_an_earlier_result_stays_unless_it_may_be_replaced(w4, tmp_path, stubs):
    export(w4, tmp_path / "out", ["hf"])
    with pytest.raises(UsageError, match="exists; choose another --out or pass --overwrite"):
        export(w4, tmp_path / "out", ["onnx"])
    export(w4, tmp_path / "out", ["onnx"], overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["MANIFEST.json", "export.json", "onnx"]


def test_a_damaged_source_is_told(w4, tmp_path):
    copy = shutil.copytree(w4, tmp_path / "copy")
    with open(copy / "quantailor.safetensors", "r+b") as file:
        file.seek(-3, 2)
        file.write(b"\xff")
    with pytest.raises(UntrustedInput, match="has changed: its sha256"):
        export(copy, tmp_path / "out")
    bent = edited(w4, tmp_path / "bent", receipt=put("w4a16-g64", "inventory", 1, "spec"))
    with pytest.raises(UntrustedInput):
        export(bent, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_a_refusal_with_the_way_out(w4, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxruntime" else object())
    receipts = export(w4, tmp_path / "out", ["hf", "onnx"])
    assert receipts[1].refused == "ONNX needs the package onnxruntime; install it with: pip install 'quantailor[onnx]'"
