"""What `bench` tells, on models too small for its figures: that they are there, and belong to what runs."""

import json

import pytest
import torch

from quantailor import api
from quantailor.cli import bench as command
from quantailor.errors import UsageError
from quantailor.evaluate import speed
from quantailor.evaluate.speed import Product, Speed, bytes_a_token, seconds_of
from quantailor.kernels import decode
from quantailor.kernels.native import library as native
from quantailor.models.structure import modules_of
from quantailor.nn.packed import QuantLinear
from quantailor.verbs import benching
from quantailor.verbs.model import placed
from tests.formats.making import texts


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    monkeypatch.setattr(speed, "_PROBE_BYTES", 2**16)
    monkeypatch.setattr(speed, "_LEAST_SECONDS", 0.0)


@pytest.fixture(scope="module")
def lm(tiny_lm):
    return api.pack(api.quantize(tiny_lm, "w4a16-g32", data=texts(8, seed=1), samples=4, context=32, method="rtn"))


def test_a_language_model(lm):
    found = api.bench(lm, prompt_tokens=decode.MOST_ROWS + 4, new_tokens=3, rounds=2, with_engines=False)
    assert [row.engine for row in found.rows] == ["quantailor", "float32"]
    for row in found.rows:
        assert set(row.speeds) == {"prefill tokens", "decode tokens"}
        assert all(0 < s.low <= s.median <= s.high for s in row.speeds.values())
        assert row.share_of_limit is not None and row.share_of_limit > 0
    ours, plain = (row.bytes_a_token for row in found.rows)
    assert ours is not None and plain is not None and ours < plain
    assert {(p.rows, p.takes) for p in found.products} == {
        (1, "packed kernel" if native.library() is not None and decode.has_kernel() else "float blocks"),
        (decode.MOST_ROWS + 4, "float blocks"),
    }
    assert sum(p.layers for p in found.products if p.rows == 1) == len(list(modules_of(lm.model, QuantLinear)))
    assert found.decoding.startswith(("one native call", "through transformers' own loop: "))
    document = json.loads(json.dumps(found.to_json()))
    assert document["threads"] == torch.get_num_threads() and document["left_out"]["OpenVINO"] == "not asked for"
    text = command._text(found)
    assert "packed kernel" in text or "float blocks" in text
    assert "fastest decode tokens: " in text and "share of the memory's limit" in text
    assert not any(m.serves for _, m in modules_of(lm.model, QuantLinear))


def test_a_classifier_and_the_engines(tiny_bert):
    pytest.importorskip("onnxruntime")
    model = api.quantize(
        tiny_bert,
        "w8a8",
        data=[{"text": "a b c", "label": 0}, {"text": "d e f", "label": 1}],
        samples=2,
        context=16,
        method="rtn",
    )
    found = api.bench(model, prompt_tokens=8, batches=(1, 2), rounds=1)
    names = [row.engine for row in found.rows]
    assert names[:3] == ["quantailor", "float32", "ONNX Runtime"]
    assert all(set(row.speeds) == {"examples at batch 1", "examples at batch 2"} for row in found.rows)
    assert {p.takes for p in found.products} == {"integer product"} and {p.rows for p in found.products} == {8, 16}
    assert set(found.fastest) == {"examples at batch 1", "examples at batch 2"}
    assert all(row.share_of_limit is None for row in found.rows)


def test_without_native_code_the_reason_is_in_the_table(lm, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "why_not", lambda: "QUANTAILOR_NATIVE=0 switches our own kernels off")
    found = api.bench(lm, prompt_tokens=4, new_tokens=2, rounds=1, with_float=False, with_engines=False)
    one_row = [p for p in found.products if p.rows == 1]
    assert {(p.takes, p.why) for p in one_row} == {("float blocks", "QUANTAILOR_NATIVE=0 switches our own kernels off")}
    assert found.native == "QUANTAILOR_NATIVE=0 switches our own kernels off"
    assert found.left_out["float32"] == "not asked for"


def test_mistakes(lm, tiny_lm):
    for model, options, message in (
        (tiny_lm, {}, "the model is float, and bench shows what quantizing gave"),
        (lm, {"new_tokens": 1}, "new_tokens=1"),
        (lm, {"prompt_tokens": 250, "new_tokens": 10}, "260 tokens are more than the model's 256 positions"),
    ):
        with pytest.raises(UsageError, match=message):
            api.bench(model, **options)


def test_bytes_that_a_token_reads(lm):
    """Every packed weight, norms, and whatever head is float; not the table, of which one row is read."""
    model = lm.model
    held = {id(m.packed): m.packed for _, m in modules_of(model, QuantLinear)}.values()
    expected = sum(b.numel() * b.element_size() for p in held for b in p.buffers())
    rest = [p for n, p in model.named_parameters() if "embed_tokens" not in n]
    rest += [b for n, b in model.named_buffers() if ".packed." not in n]
    distinct = {t.data_ptr(): t for t in rest}.values()
    assert bytes_a_token(model) == expected + sum(t.numel() * t.element_size() for t in distinct)


def test_what_was_slower_is_told():
    p = Product(
        "w4a16", 4, 4, 1, 9, "float blocks", "", {"float weight": 0.1, "float blocks": 2.0, "packed kernel": 1.0}
    )
    assert not p.is_fastest and Product(**{**vars(p), "takes": "packed kernel"}).is_fastest
    assert str(Speed.of([1.0, 3.0, 2.0])) == "2 (1 to 3)"
    calls: list[int] = []
    assert seconds_of(lambda: calls.append(1), least=0.0) >= 0 and len(calls) == 2


def test_inputs_go_where_the_model_is(tiny_bert, lm, monkeypatch):
    seen, classifier = [], api.load(tiny_bert)
    monkeypatch.setattr(benching, "device_of", lambda model: torch.device("meta"))
    monkeypatch.setattr(speed, "serving_speed", lambda model, prompt, tokens: seen.append(prompt) or (1.0, 1.0))
    monkeypatch.setattr(classifier.model, "forward", lambda **inputs: seen.extend(inputs.values()))
    for model in (lm, classifier):
        benching._torch_run(model, 4, 2, (1,), served=True)()
    assert len(seen) > 2 and all(x.is_meta for x in seen)


def test_a_device_that_is_not_there(lm):
    with pytest.raises(UsageError, match=r"device='nowhere'.*use one that torch sees"):
        placed(lm, "nowhere")
    assert placed(lm, "cpu") is lm
