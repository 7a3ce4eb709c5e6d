"""BitNet, XNOR-Net, BinaryConnect and the way in from float, in layers and in whole runs."""

import copy

import pytest
import torch
from torch import nn

from quantailor.errors import UsageError
from quantailor.evaluate.run import evaluate
from quantailor.models.prepare import FAKE_QUANT, pack_model, prepare
from quantailor.models.structure import modules_of
from quantailor.nn.fake_quant import FakeQuantLinear
from quantailor.numerics.sign import fake_quantize_sign
from quantailor.qat.low_bits import Blend, Clip, blended
from quantailor.qat.quantizers import stand_ins
from quantailor.qat.settings import Settings, resolved
from quantailor.qat.train import train
from quantailor.recipe import Recipe
from quantailor.spec import PerTensor, QuantSpec, Scheme, Ternary

SCHEMES = {"bitnet": "w1.58a8", "xnor": "w1a1", "binaryconnect": "w1a16-g32"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(44, 10)

    def forward(self, x):
        return self.layer(x)


def prepared(scheme) -> FakeQuantLinear:
    net = Net()
    with torch.no_grad():
        net.layer.weight.mul_(10)
    prepare(net, Recipe(scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme), (), "rtn"))
    return net


def test_bitnet_of_one_scale_a_matrix_is_the_paper_s_layer():
    """Eq. 1-3 with a single gamma, 8-bit tokens; the gradient of a plain linear layer on what was multiplied."""
    net = prepared(Scheme(QuantSpec(Ternary(), PerTensor()), Scheme.parse("w8a8").input))
    weight, x = net.layer.weight, torch.randn(5, 44, requires_grad=True)
    gamma = weight.detach().abs().mean()
    w_hat = gamma * (weight.detach() / gamma).round().clamp(-1, 1)
    step = x.detach().abs().amax(-1, keepdim=True) / 127.5
    x_hat = (x.detach() / step).round().clamp(-128, 127) * step
    upstream = torch.randn(5, 10)
    net.train()
    with stand_ins(net, Settings(gradient="bitnet")):
        y = net(x)
        y.backward(upstream)
        torch.testing.assert_close(y, x_hat @ w_hat.t() + net.layer.bias)
        torch.testing.assert_close(weight.grad, upstream.t() @ x_hat)
        torch.testing.assert_close(x.grad, upstream @ w_hat)
        net.eval()
        torch.testing.assert_close(net(x), y)  # on integers


def test_xnor_net_s_layer():
    """Eq. 11 for a linear layer: K = mean |x| of a row, alpha = mean |w| of an output; gradients of section 3.1."""
    net = prepared("w1a1")
    weight, x = net.layer.weight, torch.randn(5, 44, requires_grad=True)
    w = weight.detach()
    alpha, k = w.abs().mean(1, keepdim=True), x.detach().abs().mean(1, keepdim=True)
    w_hat, x_hat = alpha * w.sign(), k * x.detach().sign()
    upstream = torch.randn(5, 10)
    net.train()
    with stand_ins(net, Settings(gradient="xnor")):
        y = net(x)
        y.backward(upstream)
    torch.testing.assert_close(y, x_hat @ w_hat.t() + net.layer.bias)
    torch.testing.assert_close(weight.grad, (upstream.t() @ x_hat) * (1 / 44 + alpha * (w.abs() <= 1)))
    torch.testing.assert_close(x.grad, (upstream @ w_hat) * k * (x.detach().abs() <= 1))
    assert torch.equal(fake_quantize_sign(x.detach()), x_hat)


def test_binaryconnect_clips_to_its_levels_which_stay():
    """Algorithm 1: binarize, propagate straight through, update, clip; here two steps of plain descent."""
    net = prepared("w1a16-g32")
    quantizer, weight = net.layer.weight_quantizer, net.layer.weight
    level = (quantizer.scale / 2).expand(-1, -1, 32).flatten(1)[:, :44].clone()
    shadow, x = weight.detach().clone(), torch.randn(7, 44)
    net.train()
    with stand_ins(net, Settings(gradient="binaryconnect")):
        clip = Clip(net)
        clip.clip_(net.layer)
        shadow = shadow.clamp(-level, level)
        for _ in range(2):
            upstream = torch.randn(7, 10)
            weight.grad = None
            net(x).backward(upstream)
            torch.testing.assert_close(net.layer.fake_weight(), torch.where(shadow < 0, -level, level))
            torch.testing.assert_close(weight.grad, upstream.t() @ x)
            with torch.no_grad():
                weight -= 0.1 * weight.grad
            clip.on_optimizer_step(None, None, None)
            shadow = (shadow - 0.1 * (upstream.t() @ x)).clamp(-level, level)
            torch.testing.assert_close(weight.detach(), shadow)
    assert (weight.abs() <= level).all() and (weight.abs() == level).any()
    torch.testing.assert_close(level, (quantizer.scale / 2).expand(-1, -1, 32).flatten(1)[:, :44])


# ------------------------------------------------------------------------------------------------ lambda


def test_lambda_rises_to_one_at_its_share_of_the_run():
    assert [blended(s, 8, 0.5) for s in range(8)] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]  # min(2 step / steps, 1)
    assert blended(0, 8, 0.0) == 1 and [blended(s, 2, 1.0) for s in range(2)] == [0, 0.5]


@pytest.mark.parametrize("scheme", ["w1.58a8", "w8a8", "w2a16-g32", "w1a1", "w8a8-static"])
def test_in_training_weights_and_inputs_are_between_float_and_grid(scheme):
    net = prepared(scheme)
    if scheme == "w8a8-static":
        net.layer.input_quantizer.set_scale(torch.tensor([0.02]))
    layer, x = net.layer, torch.randn(3, 44)
    w_hat = layer.weight_quantizer(layer.weight)
    x_hat = x if layer.input_quantizer is None else layer.input_quantizer(x)
    blend = Blend(net, 0.5)
    for share in (0.0, 0.25, 1.0):
        blend.put(share)
        net.train()
        expected = (x + share * (x_hat - x)) @ (layer.weight + share * (w_hat - layer.weight)).t() + layer.bias
        torch.testing.assert_close(net(x), expected)
        if share == 0:
            torch.testing.assert_close(net(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=0)
        net.eval()
        torch.testing.assert_close(net(x), x_hat @ w_hat.t() + layer.bias, msg="what is measured is quantized")


def test_bitnet_blends_by_half_unless_told_otherwise():
    assert resolved(Settings(gradient="bitnet"), 2).blend == 0.5 and resolved(Settings(), 2).blend == 0.0
    assert resolved(Settings(gradient="bitnet", blend=0.0), 2).blend == 0.0
    with pytest.raises(UsageError, match="blend=2 is a share"):
        Settings(blend=2)


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("gradient", SCHEMES)
def test_a_run_ends_on_its_grid_and_packs_to_the_same(lm, simulated_at, train_data, held_out, gradient):
    model = copy.deepcopy(simulated_at(SCHEMES[gradient]).model)
    score = lambda m: (evaluate(m, held_out).nats_per_token,)  # noqa: E731
    settings = Settings(steps=8, batch_size=8, evaluations=2, learning_rate=5e-3, gradient=gradient)
    report = train(model, train_data, score, settings, teacher=lm.model)

    assert report.improved and evaluate(model, held_out).nats_per_token == report.best[0]
    assert all(m.share == 1 for _, m in modules_of(model, FAKE_QUANT))
    for _, m in modules_of(model, FAKE_QUANT):
        if gradient != "binaryconnect":
            mean = m.weight.detach().abs().double().mean(1)
            factor = 1 if gradient == "bitnet" else 2
            torch.testing.assert_close(m.weight_quantizer.scale.flatten().double(), factor * mean, rtol=1e-5, atol=0)
    batch = {k: v for k, v in next(iter(held_out.batches(2))).items() if k != "labels"}
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        assert torch.equal(pack_model(model)(**batch).logits, expected)


@pytest.mark.parametrize(("gradient", "scheme"), [("bitnet", "w1a1"), ("xnor", "w1.58a8"), ("binaryconnect", "w4a16")])
def test_a_gradient_for_another_grid_is_refused(lm, simulated_at, train_data, gradient, scheme):
    model = copy.deepcopy(simulated_at(scheme).model)
    with pytest.raises(UsageError, match=f"gradient='{gradient}' is for weights like those of"):
        train(model, train_data, lambda m: (1.0,), Settings(steps=1, gradient=gradient))
