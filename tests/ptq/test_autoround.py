"""AutoRound and Block-AP against their equations written out for one linear layer, and their promise never to end
worse."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from quantailor.models.prepare import prepare
from quantailor.nn.fake_quant import FakeQuantLinear, set_rounded
from quantailor.ptq.autoround import AutoRound
from quantailor.ptq.blockap import BlockAP
from quantailor.ptq.driver import calibrate
from quantailor.ptq.gptq import GPTQ
from quantailor.recipe import Recipe
from quantailor.spec import Scheme

RATED = BlockAP(seed=5, half=False, steps_at_2_bits=0, learning_rate=0.05, scale_share=0.2)


FEW = {AutoRound: {"steps": 20}, BlockAP: {"steps": 20, "steps_at_2_bits": 0}}


def layer(scheme="w3a16-g8", rows=5, length=20):
    """A fake-quantized layer with ragged groups (20 = 8 + 8 + 4), rounded to nearest."""
    torch.manual_seed(0)
    module = FakeQuantLinear(nn.Linear(length, rows, bias=False), Scheme.parse(scheme))
    quantizer = module.weight_quantizer
    scale = torch.full_like(quantizer.base_scale, 0.07)
    quantizer.set_scale(scale, torch.full_like(quantizer.zero_point, 3 if scheme.endswith("asym") else 0))
    set_rounded(module, quantizer.integers(module.weight_ON))
    return module


class SignDescent:
    """Algorithm 1's step: the rate falls from 1 / steps to 0, V stays within half a step."""

    def __init__(self, v, alpha, steps, method):
        self.v, self.alpha, self.steps, self.limits = v, alpha, steps, method.alpha

    def __call__(self, step, grad_v, grad_alpha):
        rate = (1 - (step - 1) / self.steps) / self.steps
        self.v.sub_(rate * grad_v.sign()).clamp_(-0.5, 0.5)
        self.alpha.sub_(rate * grad_alpha.sign()).clamp_(*self.limits)


class AdamByDefinition:
    """Adam as in Kingma and Ba 2015, Algorithm 1, on a cosine."""

    def __init__(self, v, alpha, steps, method):
        self.steps, self.betas = steps, method.betas
        self.moving = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in (v, alpha)]
        self.rates = (method.learning_rate, method.scale_share * method.learning_rate)

    def __call__(self, step, *gradients):
        (b1, b2), fall = self.betas, 0.5 * (1 + math.cos(math.pi * (step - 1) / self.steps))
        for (p, m, s), rate, g in zip(self.moving, self.rates, gradients):
            m.copy_(b1 * m + (1 - b1) * g)
            s.copy_(b2 * s + (1 - b2) * g * g)
            p.sub_(rate * fall * (m / (1 - b1**step)) / ((s / (1 - b2**step)).sqrt() + 1e-8))


def descent_by_definition(module, batches, targets, method, stepper):
    """w_hat with V and alpha a weight and a group, gradients by autograd of the plain formula."""
    steps, looks = method.steps, method.looks
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

    generator = torch.Generator().manual_seed(method.seed)
    best, kept = total(), (v.detach().clone(), alpha.detach().clone())
    take_step, order = stepper(v.data, alpha.data, steps, method), []
    for step in range(1, steps + 1):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        i = order.pop()
        loss = ((batches[i] @ weight(v, alpha).T) - targets[i]).square().mean()
        grad_v, grad_alpha = torch.autograd.grad(loss, (v, alpha))
        take_step(step, grad_v, grad_alpha)
        if step % (steps // looks) == 0 and (now := total()) < best:
            best, kept = now, (v.detach().clone(), alpha.detach().clone())
    v, alpha = kept
    base = quantizer.base_scale.squeeze(-1)
    q = (torch.round(w / base[:, group] + v) + zero_point).clamp(grid.qmin, grid.qmax)
    return q.to(torch.int8), base * alpha


@pytest.mark.parametrize("scheme", ["w3a16-g8", "w2a16-g8-asym"])
@pytest.mark.parametrize("steps", [8, 40])
@pytest.mark.parametrize("method, stepper", [(AutoRound(seed=5, half=False), SignDescent), (RATED, AdamByDefinition)])
def test_it_is_what_its_equations_say(scheme, steps, method, stepper):
    module = layer(scheme)
    method = dataclasses.replace(method, steps=steps)
    torch.manual_seed(1)
    batches = [torch.randn(12, 20) for _ in range(3)]
    float_weight = module.weight.detach() + 0.02 * torch.randn(5, 20)
    targets = [x @ float_weight.T for x in batches]
    expected_q, expected_scale = descent_by_definition(copy.deepcopy(module), batches, targets, method, stepper)
    runs = [lambda x=x: module(x) for x in batches]
    report = method.refine(module, {"layer": module}, runs, targets, [None] * 3)
    assert report["layer"]["block_loss"][1] < report["layer"]["block_loss"][0]
    assert torch.equal(module.weight_quantizer.integers(module.weight_ON), expected_q)
    torch.testing.assert_close(module.weight_quantizer.scale.squeeze(-1), expected_scale)


@pytest.mark.parametrize("method", [AutoRound(steps=12), BlockAP(steps=12)])
def test_a_start_that_cannot_be_beaten_is_kept(method):
    module = layer()
    before = module.weight_quantizer.integers(module.weight_ON), module.weight_quantizer.scale.clone()
    x = torch.randn(9, 20)
    target = module(x).detach()  # loss 0
    report = method.refine(module, {"layer": module}, [lambda: module(x)], [target], [None])
    assert report["layer"]["best_step"] == 0
    assert torch.equal(module.weight_quantizer.integers(module.weight_ON), before[0])
    assert torch.equal(module.weight_quantizer.scale, before[1])


@pytest.mark.parametrize("method", [AutoRound(steps=16), BlockAP(steps=16)])
def test_padding_does_not_count(method):
    torch.manual_seed(2)
    x = torch.randn(2, 6, 20)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    results = []
    for junk in (0.0, 100.0):
        module = layer()
        target = (x @ (module.weight.detach() + 0.03).T).clone()
        target[1, 3:] += junk
        method.refine(module, {"layer": module}, [lambda m=module: m(x)], [target], [mask])
        results.append(module.weight_quantizer.integers(module.weight_ON))
    assert torch.equal(*results)


def test_a_weight_may_leave_its_cell_only_where_nothing_binds_it():
    """A target two steps away from the start: AutoRound stays next to it, Block-AP gets there."""
    results = []
    for method in (AutoRound(steps=400, alpha=(1.0, 1.0)), BlockAP(steps=400, learning_rate=0.05)):
        module = layer("w4a16-g8")
        before = module.weight_quantizer.integers(module.weight_ON).int()
        wanted = (before + 2 * torch.where(before > 0, -1, 1)).float() * 0.07
        x = torch.eye(20)
        method.refine(module, {"layer": module}, [lambda m=module, x=x: m(x)], [x @ wanted.T], [None])
        results.append((module.weight_quantizer.integers(module.weight_ON).int() - before).abs().max())
    assert results[0] <= 1 < results[1]


def test_two_bits_get_more_steps():
    counted = {}
    for scheme in ("w2a16-g8", "w3a16-g8"):
        taken = []

        @dataclasses.dataclass(frozen=True)
        class Counting(BlockAP):
            def stepper(self, rounding, steps, taken=taken):
                return taken.append

        module = layer(scheme)
        method = Counting(steps=3, steps_at_2_bits=5)
        x = torch.randn(4, 20)
        method.refine(module, {"layer": module}, [lambda m=module, x=x: m(x)], [torch.zeros(4, 5)], [None])
        counted[scheme] = taken
    assert counted == {"w2a16-g8": [1, 2, 3, 4, 5], "w3a16-g8": [1, 2, 3]}


@pytest.mark.parametrize("kind", [AutoRound, BlockAP])
def test_in_the_driver_no_block_ends_worse(tiny_lm, kind):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    state = prepare(model, Recipe(Scheme.parse("w2a16-g32")))
    ids = torch.randint(3, 200, (4, 24), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]
    calibrate(model, batches, lambda _name, method=dataclasses.replace(kind(start=GPTQ()), **FEW[kind]): method)
    losses = [report["block_loss"] for report in state.layers.values()]
    assert losses and all(after <= before for before, after in losses)
    assert any(after < before for before, after in losses)
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_that_cannot_be_moved_is_told_of_beside_those_that_can():
    able, unable = layer(), FakeQuantLinear(nn.Linear(20, 5, bias=False), Scheme.parse("nf4"))
    x = torch.randn(4, 20)
    report = BlockAP(steps=2).refine(
        nn.ModuleList([able, unable]), {"a": able, "b": unable}, [lambda: able(x)], [torch.zeros(4, 5)], [None]
    )
    assert report["a"]["method"] == "blockap" and "NF4 has no steps" in report["b"]["blockap"]
