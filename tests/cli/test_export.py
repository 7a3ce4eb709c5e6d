"""`quantailor export` as a shell sees it."""

import json

import pytest

from quantailor.cli import main
from quantailor.cli.export import export
from quantailor.errors import QualityGateFailed, UsageError
from quantailor.formats.receipt import ExportReceipt
from quantailor.verbs import exporting
from tests.cli.shell import shell, untouched


@pytest.fixture(autouse=True)
def registered():
    if "export" not in [command.name for command in main.app.registered_commands]:
        main.app.command("export")(export)


@pytest.fixture(autouse=True)
def stubs(monkeypatch):
    """onnx writes one file, gguf refuses: what the formats themselves do has its own tests."""

    def onnx(folder, model):
        (folder / "model.onnx").write_bytes(b"graph")
        return ExportReceipt("onnx", (), 14, True, 1e-7, ("a note",))

    def gguf(folder, model):
        raise UsageError("model.layers.0: its grid has no block; use w4a16-g32")

    monkeypatch.setitem(exporting.WRITERS, "onnx", onnx)
    monkeypatch.setitem(exporting.WRITERS, "gguf", gguf)


def test_one_document_with_every_receipt(w4, tmp_path):
    ran = shell("export", w4, "--out", tmp_path / "out", "--json", "--quiet")
    assert ran.status == 0 and ran.err == ""
    assert [entry["format"] for entry in ran.document["formats"]] == ["hf", "onnx", "gguf"]
    assert ran.document["formats"][2]["refused"] == "model.layers.0: its grid has no block; use w4a16-g32"
    assert ran.document["formats"] == json.loads((tmp_path / "out" / "export.json").read_text())["formats"]


def test_lines_for_people(w4, tmp_path):
    ran = shell("export", w4, "--out", tmp_path / "out", "--quiet")
    lines = ran.out.splitlines()
    assert ran.status == 0
    assert lines[0] == "hf: 14 layers, the same integers in all; logits differ by 0 of the largest"
    assert "onnx: 14 layers, the same integers in all; logits differ by 1e-07 of the largest" in lines
    assert "  a note" in lines
    assert "gguf: refused: model.layers.0: its grid has no block; use w4a16-g32" in lines
    assert lines[-1] == f"saved to {tmp_path / 'out'}, the proofs in {tmp_path / 'out' / 'export.json'}"


def test_a_format_that_was_asked_for_and_refused_is_status_2(w4, tmp_path):
    ran = shell("export", w4, "--formats", "hf, gguf", "--out", tmp_path / "out", "--json", "--quiet")
    assert ran.status == 2
    assert [entry["format"] for entry in ran.document["formats"]] == ["hf", "gguf"], "one document all the same"
    assert "gguf was asked for and refused: model.layers.0" in ran.error
    assert (tmp_path / "out" / "hf" / "config.json").exists()


def test_all_refused_is_status_2_and_nothing_appears(w4, tmp_path):
    ran = shell("export", w4, "--formats", "gguf", "--out", tmp_path / "out", "--json", "--quiet")
    assert ran.status == 2 and ran.document["exit_code"] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_is_status_5_and_nothing_appears(w4, tmp_path, monkeypatch):
    def fails(folder, model):
        raise QualityGateFailed("a.b: integers in the ONNX file are not the model's")

    monkeypatch.setitem(exporting.WRITERS, "onnx", fails)
    ran = shell("export", w4, "--out", tmp_path / "out", "--quiet")
    assert ran.status == 5 and "a.b: integers" in ran.error and ran.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("formats", ["", "onxn", "hf,,onnx", "HF"])
def test_unknown_formats_are_status_2(formats, w4, tmp_path):
    ran = shell("export", w4, "--formats", formats, "--out", tmp_path / "out", "--quiet")
    assert ran.status == 2 and "is none of hf, onnx, onnx-cache, gguf" in ran.error


def test_a_float_model_is_status_2_and_no_folder_is_status_3(tiny_lm, tmp_path):
    assert shell("export", tiny_lm, "--out", tmp_path / "out", "--quiet").status == 2
    assert shell("export", tmp_path / "nowhere", "--out", tmp_path / "out", "--quiet").status == 3


def test_an_earlier_result_stays(w4, earlier):
    with untouched(earlier):
        ran = shell("export", w4, "--out", earlier, "--quiet")
    assert ran.status == 2 and "exists" in ran.error
