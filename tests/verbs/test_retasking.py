"""Two routes to another task: the same steps, the same rows, one measure."""

import copy

import pytest
import torch

from quantailor import api
from quantailor.errors import UsageError
from quantailor.models.dequantize import dequantize_model
from quantailor.models.prepare import FAKE_QUANT, PACKED
from tests.cli.shell import shell
from tests.formats.making import records, texts, trained, write_records

SETTINGS = api.Settings(steps=8, batch_size=8, learning_rate=3e-3, evaluations=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_lm):
    return api.load(trained(tiny_lm, tmp_path_factory.mktemp("trained") / "model"))


def test_a_float_model_is_tuned_first_or_quantized_at_once(tiny_bert):
    found = api.retask(
        tiny_bert,
        records(80, seed=1),
        scheme="w4a16-g32",
        method="rtn",
        samples=8,
        settings=SETTINGS,
        eval_data=records(40, seed=2),
    )
    assert (found.start, found.first.name, found.second.name) == ("float", "tune then QAT", "QAT at once")
    assert [(what, steps) for what, steps, _ in found.first.stages] == [("float", 4), ("PTQ", 0), ("QAT", 4)]
    assert [(what, steps) for what, steps, _ in found.second.stages] == [("QAT at once", 8)]
    for route in (found.first, found.second):
        assert route.model.state.scheme == api.Scheme.parse("w4a16-g32") and route.result.num_rows == 40
        assert route.stages[-1][2] == route.result.value
    assert found.change[0] == pytest.approx(found.second.result.value - found.first.result.value)
    assert found.better.result.value == max(found.first.result.value, found.second.result.value)


def test_a_quantized_model_is_restored_or_tuned_as_it_is(model):
    start = api.pack(api.quantize(model, "w3a16-g32", method="rtn"))
    found = api.retask(start, texts(40, seed=51, num_words=40), method="rtn", samples=8, settings=SETTINGS, context=32)
    assert (found.start, found.first.name, found.second.name) == ("quantized", "restore", "tune quantized")
    what, _, value = found.first.stages[0]
    assert what == "dequantized" and found.first.stages[1][2] <= value * 1.05
    assert found.better.result.value == min(found.first.result.value, found.second.result.value)
    assert found.to_json()["routes"][1]["stages"] == [
        {"what": "tune quantized", "steps": 8, "value": found.second.result.value}
    ]
    assert start.is_packed, "the given model is left as it was"


def test_a_model_says_which_routes_there_are(model):
    with pytest.raises(UsageError, match="a float model needs a scheme to go to"):
        api.retask(model, texts(9, seed=1))
    with pytest.raises(UsageError, match=r"quantized already \(w3a16-g32\) and keeps its scheme"):
        api.retask(api.quantize(model, "w3a16-g32", method="rtn"), texts(9, seed=1), scheme="w4a16-g32")
    with pytest.raises(UsageError, match="float_share=1"):
        api.retask(model, texts(9, seed=1), scheme="w8a8", float_share=1)


@pytest.mark.parametrize("scheme", ["w3a16-g32", "w8a8-static", "nf4"])
def test_dequantized_weights_are_the_grid_s(model, scheme):
    quantized = api.quantize(model, scheme, method="rtn", data=texts(4, seed=1), samples=4, context=32)
    packed = api.pack(quantized)
    restored = dequantize_model(copy.deepcopy(packed.model))
    assert not any(isinstance(m, (*FAKE_QUANT, *PACKED)) for m in restored.modules())
    assert not hasattr(restored, "quantailor_state")
    names = [n for n, m in quantized.model.named_modules() if isinstance(m, FAKE_QUANT)]
    assert len(names) == 14
    for name in names:
        expected = packed.model.get_submodule(name).packed.dequantize()
        assert torch.equal(restored.get_submodule(name).weight, expected), name


def test_the_shell_reports_both_and_saves_the_better(tiny_bert, tmp_path):
    data = write_records(tmp_path / "train.jsonl", records(60, seed=3))
    options = ("--scheme", "w8a16", "--method", "rtn", "--steps", 4, "--out", tmp_path / "out", "--quiet", "--json")
    ran = shell("retask", tiny_bert, "--data", data, *options)
    assert ran.status == 0, ran.err
    assert {route["name"] for route in ran.document["routes"]} == {"tune then QAT", "QAT at once"}
    assert api.check(tmp_path / "out").equal
