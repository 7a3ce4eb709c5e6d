"""Where weights stand when training begins."""

import copy

import torch

from quantailor.models.prepare import FAKE_QUANT
from quantailor.models.structure import modules_of
from quantailor.qat.settings import Settings
from quantailor.qat.starting import off_the_edges
from quantailor.qat.train import train
from tests.formats.making import quantized


def integers(model):
    return {name: m.weight_quantizer.integers(m.weight_ON) for name, m in modules_of(model, FAKE_QUANT)}


def differing(one, other):
    return sum(int((one[name] != other[name]).sum()) for name in one) / sum(q.numel() for q in one.values())


def test_the_first_steps_do_not_throw_back_what_a_solver_found(lm, train_data):
    """GPTQ leaves many weights on edges. Steps of a twentieth of a grid step move hardly one of them into another
    cell; from the edges themselves they would move more than a few percent."""
    start = quantized(lm, "w4a16-g32", method="gptq").model
    scale = (
        torch.cat([m.weight_quantizer.scale.detach().flatten() for _, m in modules_of(start, FAKE_QUANT)])
        .abs()
        .median()
    )
    before, given = integers(start), {n: p.detach().clone() for n, p in start.named_parameters()}
    options = Settings(steps=2, batch_size=8, evaluations=1, learning_rate=float(scale) / 20, scale_learning_rate=1e-9)
    scores = iter((1.0, 0.5))
    model = copy.deepcopy(start)
    train(model, train_data, lambda m: (next(scores),), options, teacher=lm.model)
    assert differing(before, integers(model)) < 0.01
    nudged = copy.deepcopy(start)
    with torch.no_grad():
        for _, module in modules_of(nudged, FAKE_QUANT):
            module.weight.add_(torch.randn_like(module.weight).sign() * scale / 20)
    assert differing(before, integers(nudged)) > 0.03, "what the edges would have done"

    model = copy.deepcopy(start)
    scores = iter((1.0, 2.0))
    report = train(model, train_data, lambda m: (next(scores),), options, teacher=lm.model)
    assert not report.improved and all(torch.equal(p, given[n]) for n, p in model.named_parameters())


def test_what_does_not_train_or_comes_in_by_and_by_stays(lm):
    start = quantized(lm, "w4a16-g32", method="gptq").model
    for settings in (Settings(trains="scales"), Settings(blend=0.5), Settings(gradient="bitnet")):
        model = copy.deepcopy(start)
        off_the_edges(model, settings)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters()))
    model = copy.deepcopy(start)
    frozen = next(m for _, m in modules_of(model, FAKE_QUANT))
    frozen.weight.requires_grad_(False)
    kept = frozen.weight.clone()
    off_the_edges(model, Settings())
    assert torch.equal(frozen.weight, kept)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters()))
    assert differing(integers(model), integers(start)) == 0
