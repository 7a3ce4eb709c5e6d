"""Bias correction against its promise, measured by whole passes of the float and of the quantized model."""

import copy

import pytest
import torch
from torch import nn

from quantailor import ptq
from quantailor.models.prepare import FAKE_QUANT, prepare
from quantailor.models.structure import modules_of
from quantailor.nn.fake_quant import fake_quantized
from quantailor.observers.weights import weight_scale
from quantailor.ptq.bias import BiasCorrection
from quantailor.ptq.driver import calibrate
from quantailor.recipe import Recipe
from quantailor.spec import Scheme
from tests.models import zoo

# Layers of the blocks: what the walk finishes.
INSIDE = {"bert": "encoder.layer", "gpt2": "transformer.h"}


def means(model, names, batches):
    """{name: mean output [O] over the tokens that count}, by whole passes."""
    outputs = {name: [] for name in names}
    handles = []
    for name in names:
        handles.append(model.get_submodule(name).register_forward_hook(lambda _m, _a, y, n=name: outputs[n].append(y)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    found = {}
    for name, ys in outputs.items():
        rows = [
            y[b, t] if y.dim() == 3 else y.view(*batch["attention_mask"].shape, -1)[b, t]
            for y, batch in zip(ys, batches)
            for b, t in batch["attention_mask"].nonzero().tolist()
        ]
        found[name] = torch.stack(rows).double().mean(0)
    return found


def solved(model, method, batches, scheme="w3a8-g32"):
    model = copy.deepcopy(model)
    prepare(model, Recipe(Scheme.parse(scheme)))
    return model, calibrate(model, batches, lambda _: ptq.method(method))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_every_mean_in_the_blocks_is_that_of_the_float_model(name):
    """Layer after layer, block after block: what came before a layer was corrected before it."""
    original = getattr(zoo, name)()
    with torch.no_grad():
        for parameter_name, parameter in original.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    batches = [zoo.tokens(9, 5), zoo.tokens(7, 7, 3, side="left")]
    before, _ = solved(original, "rtn", batches)
    after, state = solved(original, "rtn+bias", batches)
    names = [n for n, m in modules_of(after, FAKE_QUANT) if INSIDE[name] in n]
    assert len(names) >= 8
    expected, shifted, found = (means(m, names, batches) for m in (original, before, after))
    for layer in names:
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-4, atol=2e-5)
        assert float((shifted[layer] - expected[layer]).abs().max()) > 1e-3
        assert 0 < state.layers[layer]["bias_correction"] < 2


def test_nothing_but_biases_moves():
    original, batches = zoo.bert(), [zoo.tokens(9, 5)]
    before, _ = solved(original, "gptq", batches, "w3a16-g32")
    after, _ = solved(original, "gptq+bias", batches, "w3a16-g32")
    first = next(n for n, _ in modules_of(after, FAKE_QUANT) if INSIDE["bert"] in n)
    one, other = (m.get_submodule(first) for m in (before, after))
    assert torch.equal(one.weight_quantizer.integers(one.weight_ON), other.weight_quantizer.integers(other.weight_ON))
    assert not torch.equal(one.bias, other.bias)
    names = {n for n, _ in after.named_parameters()}
    assert names == {n for n, _ in before.named_parameters()}
    for name in names:
        if "LayerNorm" in name or ("embeddings" in name and "weight_quantizer" not in name):
            assert torch.equal(before.get_parameter(name), after.get_parameter(name)), name


def test_a_layer_without_a_bias_is_left_and_says_so():
    original, batches = zoo.llama(), [zoo.tokens(9, 5)]
    before, _ = solved(original, "rtn", batches)
    after, state = solved(original, "rtn+bias", batches)
    for (name, one), (_, other) in zip(before.named_parameters(), after.named_parameters()):
        assert torch.equal(one, other), name
    reports = [report for name, report in state.layers.items() if ".layers." in name]
    assert len(reports) == 14 and all("has no bias" in report["bias_correction"] for report in reports)


class Block(nn.Module):
    """A convolution and two Linears that share its output; a third that nothing reaches."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.left, self.right, self.idle = nn.Linear(4, 5), nn.Linear(4, 6), nn.Linear(4, 2)

    def forward(self, x):
        y = self.conv(x).flatten(2).transpose(1, 2)
        return torch.cat([self.left(y), self.right(y)], -1)


def block():
    """(the float block, the fake-quantized one, its layers by full names)."""
    torch.manual_seed(3)
    twin = Block()
    rounded = copy.deepcopy(twin)
    for name in ("conv", "left", "right", "idle"):
        layer = fake_quantized(getattr(rounded, name), Scheme.parse("w2a16"))
        layer.weight_quantizer.set_scale(*weight_scale(layer.weight_ON, layer.weight_quantizer.spec))
        setattr(rounded, name, layer)
    return twin, rounded, {f"m.0.{name}": getattr(rounded, name) for name in ("conv", "left", "right", "idle")}


def runs_of(module, xs):
    return [lambda x=x: module(x) for x in xs]


@torch.no_grad()
def test_channels_of_a_convolution_and_a_layer_that_nothing_reaches():
    twin, rounded, layers = block()
    xs = [torch.randn(2, 3, 6, 7) + 1, torch.randn(1, 3, 6, 7) - 2]
    idle, start = rounded.idle.bias.clone(), rounded.conv.bias.clone()
    difference = sum((twin.conv(x) - rounded.conv(x)).sum((0, 2, 3)) for x in xs) / (3 * 4 * 5)
    report = BiasCorrection().finish(rounded, twin, layers, runs_of(rounded, xs), runs_of(twin, xs), [None] * 2)
    torch.testing.assert_close(rounded.conv.bias, start + difference)
    size = torch.cat([twin.conv(x).square().flatten() for x in xs]).mean().sqrt()
    assert report["m.0.conv"]["bias_correction"] == pytest.approx(float(difference.abs().max() / size), rel=1e-4)
    expected, found = (torch.cat([m(x).flatten(0, 1) for x in xs]).mean(0) for m in (twin, rounded))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(rounded.idle.bias, idle) and "no calibration data" in report["m.0.idle"]["bias_correction"]


@torch.no_grad()
def test_other_rows_or_a_mean_that_is_not_finite_leave_the_bias():
    twin, rounded, layers = block()
    before = {name: layer.bias.clone() for name, layer in layers.items()}
    xs, fewer = [torch.randn(2, 3, 6, 7)], [torch.randn(1, 3, 6, 7)]
    report = BiasCorrection().finish(rounded, twin, layers, runs_of(rounded, xs), runs_of(twin, fewer), [None])
    assert "other rows" in report["m.0.left"]["bias_correction"]
    bad = [torch.full((1, 3, 6, 7), torch.nan)]
    report = BiasCorrection().finish(rounded, twin, layers, runs_of(rounded, bad), runs_of(twin, bad), [None])
    assert "not finite" in report["m.0.left"]["bias_correction"]
    assert all(torch.equal(layer.bias, before[name]) for name, layer in layers.items())
