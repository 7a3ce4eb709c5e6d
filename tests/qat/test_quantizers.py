"""Stand-ins give other gradients on the same grid, and leave no trace."""

import copy

import pytest
import torch

from quantailor.errors import UsageError
from quantailor.evaluate.run import evaluate
from quantailor.models.prepare import FAKE_QUANT, pack_model
from quantailor.models.structure import modules_of
from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.qat.quantizers import clipping_penalty, stand_ins
from quantailor.qat.settings import Settings
from quantailor.qat.train import train

SCHEMES = {"ste": "w8a8-static", "pact": "w8a8-static", "lsq+": "w4a16-g32-asym"}


def layers(model):
    return dict(modules_of(model, FAKE_QUANT))


def integers(model):
    return {name: m.weight_quantizer.integers(m.weight_ON) for name, m in layers(model).items()}


def asked(gradient):
    return Settings(trains="scales") if gradient == "scales" else Settings(gradient=gradient)


@pytest.mark.parametrize("gradient", ["ste", "pact", "lsq+", "scales"])
def test_the_forward_pass_is_the_same_to_the_bit_and_the_originals_come_back(simulated_at, held_out, gradient):
    model = copy.deepcopy(simulated_at(SCHEMES.get(gradient, "w4a16-g32")).model).eval()
    before = [(m.weight_quantizer, m.input_quantizer) for m in layers(model).values()]
    batch = {k: v for k, v in next(iter(held_out.batches(2))).items() if k != "labels"}
    with torch.no_grad():
        expected = model(**batch).logits
        with stand_ins(model, asked(gradient)):
            assert all(m.weight_quantizer is not old for m, (old, _) in zip(layers(model).values(), before))
            assert torch.equal(model(**batch).logits, expected)
    assert [(m.weight_quantizer, m.input_quantizer) for m in layers(model).values()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_integers_stay_whatever_the_scale_does(simulated_at):
    """Scales move by a third; the integers are those of the start, in the stand-in and, settled, in the original."""
    model = copy.deepcopy(simulated_at("w4a16-g32").model)
    start = integers(model)
    with stand_ins(model, Settings(trains="scales")) as standing:
        with torch.no_grad():
            for layer in layers(model).values():
                layer.weight_quantizer.log_scale.copy_(
                    torch.empty_like(layer.weight_quantizer.log_scale).uniform_(-0.3, 0.3)
                )
        simulated = {n: m.fake_weight() for n, m in layers(model).items()}
        assert all(torch.equal(q, start[n]) for n, q in integers(model).items())
        standing.settle()
    for name, layer in layers(model).items():
        assert type(layer.weight_quantizer) is WeightQuantizer
        assert torch.equal(layer.weight_quantizer.integers(layer.weight_ON), start[name])
        assert torch.equal(layer.fake_weight(), simulated[name])


def test_the_gradient_of_a_frozen_grid_is_exact(simulated_at):
    """d(sum c w_hat)/d log_scale = g * sum over the group of c * w_hat: nothing is rounded."""
    model = copy.deepcopy(simulated_at("w4a16-g32").model)
    layer = next(iter(layers(model).values()))
    with stand_ins(model, Settings(trains="scales")):
        w_hat = layer.fake_weight()
        c = torch.randn_like(w_hat)
        (c * w_hat).sum().backward()
        q = layer.weight_quantizer
        expected = torch.zeros_like(q.log_scale)
        for row in range(w_hat.shape[0]):
            for column in range(w_hat.shape[1]):
                expected[row, column // 32, 0] += (c[row, column] * w_hat[row, column]).detach() * q.g
        torch.testing.assert_close(q.log_scale.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gradient", ["ste", "pact", "lsq+", "scales"])
def test_what_was_trained_is_what_is_packed(simulated_at, lm, train_data, held_out, gradient):
    model = copy.deepcopy(simulated_at(SCHEMES.get(gradient, "w2a16-g32")).model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    zeros = {n: m.weight_quantizer.zero_point.clone() for n, m in layers(model).items()}
    q = integers(model)
    looks = iter(range(100, 0, -1))
    settings = {"steps": 8, "batch_size": 4, "learning_rate": 3e-3, "scale_learning_rate": 3e-2, "evaluations": 1}
    more = {"trains": "scales"} if gradient == "scales" else {"gradient": gradient}
    report = train(model, train_data, lambda m: (float(next(looks)),), Settings(**settings, **more), teacher=lm.model)

    moved = {n for n, p in model.named_parameters() if not torch.equal(p.detach(), start[n])}
    weights = {n for n in moved if n.endswith("proj.weight")}
    scales = {n for n in moved if n.endswith("weight_quantizer.log_scale")}
    ranges = {n for n in moved if n.endswith("input_quantizer.log_scale")}
    assert report.improved and all(type(m.weight_quantizer) is WeightQuantizer for m in layers(model).values())
    assert len(scales) == (0 if gradient in ("ste", "pact") else 14)
    assert len(ranges) == (14 if gradient == "pact" else 0)
    if gradient == "scales":
        assert all(torch.equal(now, q[n]) for n, now in integers(model).items()) and "model.norm.weight" in moved
        assert report.optimizer_bytes < 0.2 * 8 * sum(p.numel() for p in start.values())
    else:
        assert len(weights) == 14
    changed = [n for n, m in layers(model).items() if not torch.equal(m.weight_quantizer.zero_point, zeros[n])]
    assert bool(changed) == (gradient == "lsq+")
    simulated = evaluate(model, held_out).nats_per_token
    assert evaluate(pack_model(copy.deepcopy(model)), held_out).nats_per_token == simulated


def test_pacts_levels_are_drawn_towards_zero(simulated_at):
    model = copy.deepcopy(simulated_at("w8a8-static").model)
    assert clipping_penalty(model) is None
    with stand_ins(model, Settings(gradient="pact")):
        levels = [float(m.scale.detach()) * 127 for m in model.modules() if isinstance(m, ActivationQuantizer)]
        assert clipping_penalty(model).item() == pytest.approx(sum(level**2 for level in levels), rel=1e-5)


@pytest.mark.parametrize(
    ("scheme", "gradient", "told"),
    [("w4a16-g32", "pact", "a scheme with -static"), ("w4a16-g32", "lsq+", "a scheme with -asym")],
)
def test_a_gradient_with_nothing_to_learn_is_refused(simulated_at, scheme, gradient, told):
    model = copy.deepcopy(simulated_at(scheme).model)
    before = [m.weight_quantizer for m in layers(model).values()]
    with pytest.raises(UsageError, match=told), stand_ins(model, Settings(gradient=gradient)):
        pytest.fail("never here")
    assert [m.weight_quantizer for m in layers(model).values()] == before and all(
        p.requires_grad for p in model.parameters()
    )
