"""AWQ against Eq. 5 written with loops, and its search against scoring every alpha by hand."""

import copy
import math

import pytest
import torch
from torch import nn

from quantailor import ptq
from quantailor.models.prepare import FAKE_QUANT, prepare
from quantailor.models.structure import modules_of
from quantailor.nn.fake_quant import FakeQuantLinear
from quantailor.ptq.awq import AWQ, awq_factors
from quantailor.ptq.driver import calibrate
from quantailor.recipe import Recipe
from quantailor.spec import Scheme
from tests.models import zoo
from tests.models.test_feeds import EXPECTED
from tests.ptq.test_smoothquant import check_search, prepared


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.95])
def test_factors_are_equation_5_normalized(alpha):
    x_mean = torch.rand(9) * 20
    slow = [float(x) ** alpha for x in x_mean]
    middle = math.sqrt(max(slow) * min(slow))
    torch.testing.assert_close(awq_factors(x_mean, alpha), torch.tensor([value / middle for value in slow]))


def test_channels_that_were_never_active_keep_their_scale():
    assert awq_factors(torch.tensor([4.0, 0.0, 1.0]), 1.0).tolist() == [2.0, 1.0, 0.5]
    assert awq_factors(torch.zeros(3), 0.5).tolist() == [1.0, 1.0, 1.0]


def scaling_by_hand(block, rows, channel, channels, alpha):
    """Eq. 5, with the mean magnitude over every row and column that a channel reaches."""
    sums, counts = torch.zeros(channels), torch.zeros(channels)
    for name, x in rows.items():
        for j, c in enumerate(channel(name)):
            sums[c] += x.abs().sum(0)[j]
            counts[c] += len(x)
    return awq_factors(sums / counts, alpha)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w4a16", "w3a16-g32", "w4a16-g32-asym", "w4a8-g32"])
def test_the_best_alpha_is_folded(scheme):
    part = AWQ()
    assert part.alphas == tuple(i / 20 for i in range(20))
    assert check_search(part, "awq", scaling_by_hand, scheme) >= 2


@torch.no_grad()
@pytest.mark.parametrize("name", EXPECTED)
def test_the_float_block_stays_the_same_and_every_layer_has_its_report(name):
    block, runs, layers, masks = prepared(name, "w3a16-g32")
    before = [run() for run in runs]
    report = AWQ(alphas=(0.0, 0.3, 0.7)).on_block(block, layers, runs, masks)
    assert set(report) == set(layers)
    assert all(("folded_into" in r["awq"]) != ("left" in r["awq"]) for r in report.values())
    assert any("folded_into" in r["awq"] for r in report.values())
    for run, expected in zip(runs, before):
        assert float((run() - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@torch.no_grad()
def test_a_salient_channel_is_scaled_up():
    """One input is 30 times the others: its weights' rounding error costs most, so that they are stretched."""
    norm, linear = nn.LayerNorm(32), FakeQuantLinear(nn.Linear(32, 24, bias=False), Scheme.parse("w3a16"))
    norm.weight[5] = 30.0
    linear.weight *= 0.5 + torch.rand(32)  # columns of unlike size: the salient one need not set the range
    linear.weight[:, 5] *= 0.2
    block, old = nn.Sequential(norm, linear), linear.weight.clone()
    linear.weight_quantizer.enabled = False
    x = torch.randn(200, 32)
    expected = block(x)
    report = AWQ().on_block(block, {"b.1": linear}, [lambda: block(x)], [None])["b.1"]["awq"]
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    ratio = (linear.weight / old).median(0).values
    assert ratio.argmax() == 5 and ratio[5] > 1.5 * ratio[[0, 9, 20]].max()
    assert report["error_after"] < 0.7 * report["error_before"] and report["folded_into"] == "b.0"


def test_alone_it_is_rounded_and_in_a_chain_solved():
    batches = [zoo.tokens(20, 11), zoo.tokens(7)]
    for text, solver in (("awq", "clip"), ("awq+gptq", "gptq"), ("smoothquant+awq", "clip"), ("awq+rtn", "rtn")):
        model = zoo.llama()
        state = prepare(model, Recipe(Scheme.parse("w4a16-g32")))
        chain = ptq.method(text)
        expected = copy.deepcopy(model)
        for _, module in modules_of(expected, FAKE_QUANT):
            module.weight_quantizer.enabled = False
        calibrate(model, batches, lambda _, chain=chain: chain)
        assert {report["method"] for report in state.layers.values()} == {solver}
        assert all("awq" in report for report in state.layers.values())
        assert all(("smoothquant" in report) == ("smoothquant" in text) for report in state.layers.values())
        with torch.no_grad():
            y, y_hat = expected(**batches[0]).logits, model(**batches[0]).logits
        real = batches[0]["attention_mask"].bool()
        assert 0 < float((y_hat - y)[real].norm()) < 0.5 * float(y[real].norm())
