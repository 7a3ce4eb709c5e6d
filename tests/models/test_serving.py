"""The fast path while a model serves: near the proven one, gone afterwards, and open about what it takes."""

import pytest
import torch

from quantailor import api
from quantailor.demo import MODEL
from quantailor.kernels import decode
from quantailor.kernels.native import library as native
from quantailor.models.serving import choices, serving
from quantailor.models.structure import modules_of
from quantailor.nn.packed import QuantLinear, packed
from tests.formats.making import texts
from tests.nn.layers import linear, quantized

SCHEMES = ["w8a16", "w4a16-g32", "w4a16-g32-asym", "w3a16-g32", "w2a16-g32-balanced", "w1.58a16-g32", "w1a16-g32"]
SCHEMES += ["nf4", "nf4-dq", "w5a16-g32", "w4a8-g32"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [*SCHEMES, "w8a8", "w8a8-static", "w4a16-g128"])
def test_a_packed_layer_that_was_turned_into_another_type_as_a_whole(scheme, dtype):
    """Its scales are of that type then, half the bytes that native code reads of float32 ones."""
    torch.manual_seed(0)
    layer, x = linear(length=256)
    model = torch.nn.Sequential(packed(quantized(layer, scheme, x))).eval()
    expected = model(x)
    model, x = model.to(dtype), x.to(dtype)
    most = float(expected.abs().max())
    with torch.inference_mode():
        proven = model(x)
        with serving(model):
            served = model(x)
    assert proven.dtype == served.dtype == dtype
    for found in (proven, served):
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.02 * most)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_of_the_fast_path(tiny_lm, scheme):
    model = api.pack(api.quantize(tiny_lm, scheme, data=texts(8, seed=1), samples=4, context=32, method="rtn"))
    ids = torch.arange(3, 3 + 96).reshape(1, 96)  # more rows than the packed kernel takes
    with torch.inference_mode():
        few, many = model.model(input_ids=ids[:, :5]).logits, model.model(input_ids=ids).logits
        with serving(model.model) as told:
            fast_few, fast_many = model.model(input_ids=ids[:, :5]).logits, model.model(input_ids=ids).logits
        again = model.model(input_ids=ids[:, :5]).logits
    assert (fast_few - few).abs().max() <= 1e-3 * few.abs().max()
    assert (fast_many - many).abs().max() <= 1e-5 * many.abs().max()
    assert torch.equal(again, few) and not any(m.serves for _, m in modules_of(model.model, QuantLinear))
    assert sum(c.layers for c in told) == len(list(modules_of(model.model, QuantLinear)))
    kernel = native.library() is not None and decode.has_kernel()
    expected = {"w5a16-g32": "float blocks", "w4a8-g32": "integer product"}
    assert {c.few_rows for c in told} == {expected.get(scheme, "packed kernel" if kernel else "float blocks")}


def test_a_layer_that_needs_gradients_takes_none_of_it(tiny_lm):
    model = api.pack(
        api.quantize(tiny_lm, "w4a16-g32", data=texts(8, seed=1), samples=4, context=32, method="rtn")
    ).model
    layer = next(m for _, m in modules_of(model, QuantLinear))
    x = torch.randn(1, layer.in_features, requires_grad=True)
    with serving(model):
        layer(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, layer.weight.sum(0, keepdim=True), atol=1e-4)


def test_without_native_code_it_says_so_and_runs(tiny_lm, monkeypatch):
    model = api.pack(
        api.quantize(tiny_lm, "w4a16-g32", data=texts(8, seed=1), samples=4, context=32, method="rtn")
    ).model
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "why_not", lambda: "QUANTAILOR_NATIVE=0 switches our own kernels off")
    assert [(c.few_rows, c.why) for c in choices(model)] == [
        ("float blocks", "QUANTAILOR_NATIVE=0 switches our own kernels off")
    ]
    ids = torch.arange(3, 8)[None]
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        with serving(model):
            assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)


def test_text_comes_as_it_is_made():
    model = api.pack(
        api.quantize(MODEL, "w8a16", data=["To be or not to be."] * 8, samples=4, context=32, method="rtn")
    )
    pieces: list[str] = []
    text = api.generate(model, "def read", max_new_tokens=24, fast=True, on_text=pieces.append)
    assert text == api.generate(model, "def read", max_new_tokens=24)
    assert "def read" + "".join(pieces) == text and len(pieces) > 3
