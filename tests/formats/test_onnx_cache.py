"""A decoder in ONNX with the keys and values of earlier positions: it generates what the model generates."""

import pytest
import torch

from quantailor import api
from quantailor.errors import UsageError
from quantailor.formats.onnx_trace import past_shapes
from quantailor.verbs.exporting import export
from tests.formats.making import quantized

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
onnx_check = pytest.importorskip("quantailor.formats.onnx_check")


@pytest.fixture(scope="module")
def written(lm, tmp_path_factory):
    """(the packed model, its file, the receipt)"""
    model = api.pack(quantized(lm, "w4a16-g32", method="rtn"))
    out = tmp_path_factory.mktemp("cache") / "out"
    (receipt,) = export(model, out, ["onnx-cache"])
    return model.model.eval(), out / "onnx-cache" / "model.onnx", receipt


def test_the_receipt_tells_of_the_cache(written):
    _, _, receipt = written
    assert receipt.integers_equal and receipt.max_logit_difference < 1e-5
    assert any("greedy tokens" in note and "[16, 16]" in note for note in receipt.notes)
    assert any("past_key_values.N.key" in note for note in receipt.notes)
    assert not any("no cache" in note for note in receipt.notes)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 7), (3, 2)])
def test_greedy_tokens_equal_transformers_own(written, rows, length):
    model, path, _ = written
    prompt = torch.randint(3, 80, (rows, length))
    theirs = onnx_check.generate(onnx_check.session(path, onnx_check.SESSION), prompt, 12)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ours = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[:, length:]
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize(("first", "then"), [(0, 9), (1, 8), (5, 4), (8, 1)])
def test_a_text_in_two_parts_gives_the_logits_of_the_whole(written, first, then):
    model, path, _ = written
    ids = torch.randint(3, 80, (2, first + then))
    running = onnx_check.session(path, onnx_check.SESSION)
    names = [value.name for value in running.get_outputs()]
    with torch.no_grad():
        whole = model(ids).logits
    feeds = {}
    if first:
        part = {"input_ids": ids[:, :first], "attention_mask": torch.ones(2, first, dtype=torch.int64)}
        logits, *cache = onnx_check.outputs(running, part, names)
        assert (logits - whole[:, :first]).abs().max() <= 1e-5 * whole.abs().max()
        feeds = {n.replace("present", "past_key_values"): v for n, v in zip(names[1:], cache)}
    feeds = {"input_ids": ids[:, first:], "attention_mask": torch.ones_like(ids), **feeds}
    logits, *cache = onnx_check.outputs(running, feeds, names)
    assert (logits - whole[:, first:]).abs().max() <= 1e-5 * whole.abs().max()
    assert all(tensor.shape[2] == first + then for tensor in cache)


def test_padding_on_the_left_is_not_looked_at(written):
    """The mask reaches over the cache."""
    model, path, _ = written
    ids = torch.randint(3, 80, (1, 6))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    running = onnx_check.session(path, onnx_check.SESSION)
    (theirs,) = onnx_check.outputs(running, {"input_ids": padded, "attention_mask": mask}, ["logits"])
    with torch.no_grad():
        ours = model(input_ids=padded, attention_mask=mask).logits
    assert (theirs[:, 3:] - ours[:, 3:]).abs().max() <= 1e-5 * ours.abs().max()


def test_a_classifier_has_no_cache(classifier):
    with pytest.raises(UsageError, match="keeps no keys and values"):
        past_shapes(classifier.model)


def test_openvino_reads_the_same_file(lm, tmp_path):
    """With groups that divide each row: it takes no shorter last block, which the receipt says."""
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: it reads the file where it is")
    packed = api.pack(quantized(lm, "w4a16-g4", method="rtn"))
    export(packed, tmp_path / "out", ["onnx-cache"])
    model, path = packed.model.eval(), tmp_path / "out" / "onnx-cache" / "model.onnx"
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    ids = torch.randint(3, 80, (2, 6))
    feeds = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    for value in compiled.inputs:
        if value.any_name.startswith("past_key_values."):
            shape = value.partial_shape
            feeds[value.any_name] = torch.zeros(2, shape[1].get_length(), 0, shape[3].get_length()).numpy()
    theirs = torch.from_numpy(compiled(feeds)["logits"])
    with torch.no_grad():
        ours = model(ids).logits
    assert (theirs - ours).abs().max() <= 1e-4 * ours.abs().max()
