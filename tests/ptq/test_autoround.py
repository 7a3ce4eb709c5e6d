"""AutoRound against Algorithm 1 written out for one linear layer, and its promise never to end worse."""

import copy

import pytest
import torch
from torch import nn

from quantailor.models.prepare import prepare
from quantailor.nn.fake_quant import FakeQuantLinear, set_rounded
from quantailor.ptq.autoround import AutoRound
from quantailor.ptq.driver import calibrate
from quantailor.ptq.gptq import GPTQ
from quantailor.recipe import Recipe
from quantailor.spec import Scheme


def layer(scheme="w3a16-g8", rows=5, length=20):
    """A fake-quantized layer with ragged groups (20 = 8 + 8 + 4), rounded to nearest."""
    torch.manual_seed(0)
    module = FakeQuantLinear(nn.Linear(length, rows, bias=False), Scheme.parse(scheme))
    quantizer = module.weight_quantizer
    scale = torch.full_like(quantizer.base_scale, 0.07)
    quantizer.set_scale(scale, torch.full_like(quantizer.zero_point, 3 if scheme.endswith("asym") else 0))
    set_rounded(module, quantizer.integers(module.weight_ON))
    return module


def descent_by_definition(module, batches, targets, steps, seed, limits, looks):
    """Eq. 3-5 with V and alpha a weight and a group, gradients by autograd of the plain formula."""
    quantizer, length = module.weight_quantizer, module.in_features
    group = torch.arange(length) // 8
    w = module.weight.detach()
    zero_point = quantizer.zero_point.squeeze(-1)[:, group]
    grid = quantizer.spec.grid
    v = torch.zeros_like(w, requires_grad=True)
    alpha = torch.ones_like(quantizer.base_scale.squeeze(-1), requires_grad=True)

    def weight(v, alpha):
        base = quantizer.base_scale.squeeze(-1)[:, group]
        x = w / base + v
        q = (x + (x.round() - x).detach() + zero_point).clamp(grid.qmin, grid.qmax)
        return (q - zero_point) * base * alpha[:, group]

    def total():
        with torch.no_grad():
            w_hat = weight(v, alpha)
            return sum(float(((x @ w_hat.T) - t).square().mean()) for x, t in zip(batches, targets)) / len(batches)

    generator = torch.Generator().manual_seed(seed)
    best, kept = total(), (v.detach().clone(), alpha.detach().clone())
    for step in range(1, steps + 1):
        rate = (1 - (step - 1) / steps) / steps
        i = int(torch.randint(len(batches), (1,), generator=generator))
        loss = ((batches[i] @ weight(v, alpha).T) - targets[i]).square().mean()
        grad_v, grad_alpha = torch.autograd.grad(loss, (v, alpha))
        with torch.no_grad():
            v.sub_(rate * grad_v.sign()).clamp_(-0.5, 0.5)
            alpha.sub_(rate * grad_alpha.sign()).clamp_(*limits)
        if step % (steps // looks) == 0 and (now := total()) < best:
            best, kept = now, (v.detach().clone(), alpha.detach().clone())
    v, alpha = kept
    base = quantizer.base_scale.squeeze(-1)
    q = (torch.round(w / base[:, group] + v) + zero_point).clamp(grid.qmin, grid.qmax)
    return q.to(torch.int8), base * alpha


@pytest.mark.parametrize("scheme", ["w3a16-g8", "w2a16-g8-asym"])
@pytest.mark.parametrize("steps", [8, 40])
def test_it_is_algorithm_1(scheme, steps):
    module = layer(scheme)
    torch.manual_seed(1)
    batches = [torch.randn(12, 20) for _ in range(3)]
    float_weight = module.weight.detach() + 0.02 * torch.randn(5, 20)
    targets = [x @ float_weight.T for x in batches]
    method = AutoRound(steps=steps, seed=5)
    expected_q, expected_scale = descent_by_definition(
        copy.deepcopy(module), batches, targets, steps, 5, method.alpha, method.looks
    )
    runs = [lambda x=x: module(x) for x in batches]
    report = method.refine(module, {"layer": module}, runs, targets, [None] * 3)
    assert report["layer"]["block_loss"][1] < report["layer"]["block_loss"][0]
    assert torch.equal(module.weight_quantizer.integers(module.weight_ON), expected_q)
    torch.testing.assert_close(module.weight_quantizer.scale.squeeze(-1), expected_scale)


def test_a_start_that_cannot_be_beaten_is_kept():
    module = layer()
    before = module.weight_quantizer.integers(module.weight_ON), module.weight_quantizer.scale.clone()
    x = torch.randn(9, 20)
    target = module(x).detach()  # loss 0
    report = AutoRound(steps=12).refine(module, {"layer": module}, [lambda: module(x)], [target], [None])
    assert report["layer"]["best_step"] == 0
    assert torch.equal(module.weight_quantizer.integers(module.weight_ON), before[0])
    assert torch.equal(module.weight_quantizer.scale, before[1])


def test_padding_does_not_count():
    torch.manual_seed(2)
    x = torch.randn(2, 6, 20)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    results = []
    for junk in (0.0, 100.0):
        module = layer()
        target = (x @ (module.weight.detach() + 0.03).T).clone()
        target[1, 3:] += junk
        AutoRound(steps=16).refine(module, {"layer": module}, [lambda m=module: m(x)], [target], [mask])
        results.append(module.weight_quantizer.integers(module.weight_ON))
    assert torch.equal(*results)


def test_in_the_driver_no_block_ends_worse(tiny_lm):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    state = prepare(model, Recipe(Scheme.parse("w2a16-g32")))
    ids = torch.randint(3, 200, (4, 24), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]
    calibrate(model, batches, lambda _name, method=AutoRound(steps=20, start=GPTQ()): method)
    losses = [report["block_loss"] for report in state.layers.values()]
    assert losses and all(after <= before for before, after in losses)
    assert any(after < before for before, after in losses)
    assert all(p.requires_grad for p in model.parameters())
