"""CAGE and the freezing of oscillating weights, in a real run."""

import copy
from types import SimpleNamespace

import pytest
import torch

from quantailor.errors import UsageError
from quantailor.models.prepare import FAKE_QUANT
from quantailor.models.structure import modules_of
from quantailor.qat.settings import Settings
from quantailor.qat.stabilizer import Stabilizer
from quantailor.qat.train import train


@pytest.fixture
def run(simulated_at, lm, train_data):
    def go(scheme="w2a16-g32", **settings):
        model = copy.deepcopy(simulated_at(scheme).model)
        looks = iter(range(1000, 0, -1))
        options = Settings(**{"steps": 16, "batch_size": 4, "evaluations": 1, "learning_rate": 1e-2, **settings})
        report = train(model, train_data, lambda m: (float(next(looks)),), options, teacher=lm.model)
        return model, report

    return go


def off_grid(model):
    """Mean distance of the weights from their grid, in steps."""
    total = count = 0.0
    for _, m in modules_of(model, FAKE_QUANT):
        steps = (m.weight - m.fake_weight()).detach().flatten(1)
        scale = m.weight_quantizer.scale.detach().abs().expand(-1, -1, 32).flatten(1)[:, : steps.shape[1]]
        total += float((steps / scale).abs().sum())
        count += steps.numel()
    return total / count


def test_the_pull_brings_weights_to_their_grid(run):
    free, pulled = (off_grid(run(cage=strength)[0]) for strength in (0.0, 300.0))
    assert pulled < 0.3 * free


def test_one_step_of_the_pull_is_the_formula(simulated_at):
    model = copy.deepcopy(simulated_at("w4a16-g32").model)
    stabilizer = Stabilizer(model, Settings(cage=8.0))
    layer = next(iter(stabilizer.layers.values()))
    before, grid = layer.weight.detach().clone(), layer.fake_weight().detach()

    state = SimpleNamespace(global_step=5, max_steps=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    stabilizer.on_optimizer_step(None, state, None, optimizer=optimizer)
    torch.testing.assert_close(layer.weight.detach(), before - 0.02 * 8.0 * 5 / 20 * (before - grid))


def test_what_oscillates_is_frozen_onto_its_integer(run):
    _, report = run(freeze_oscillating=0.015, learning_rate=3e-2)
    told = next(note for note in report.notes if "oscillate" in note)
    frozen = float(told.partition("; ")[2].partition("%")[0])
    assert 0 < frozen < 100

    _, counted = run(freeze_oscillating=1.0, learning_rate=3e-2)
    assert "0.00% were frozen" in next(note for note in counted.notes if "oscillate" in note)


def test_a_frozen_weight_stays_on_its_integer(simulated_at):
    model = copy.deepcopy(simulated_at("w4a16-g32").model)
    stabilizer = Stabilizer(model, Settings(freeze_oscillating=0.01))
    name, layer = next(iter(stabilizer.layers.items()))
    tracked = stabilizer.tracked[name]
    tracked.frozen[0, 0] = True
    q = int(tracked.target[0, 0])
    with torch.no_grad():
        layer.weight[0, 0] += 10 * float(layer.weight_quantizer.scale.abs().max())
        layer.weight_quantizer.log_scale.fill_(0.2)
    stabilizer.on_optimizer_step(None, None, None)
    assert int(layer.weight_quantizer.integers(layer.weight_ON)[0, 0]) == q
    assert layer.weight[0, 0].item() == pytest.approx(q * layer.weight_quantizer.scale[0, 0, 0].item())


@pytest.mark.parametrize("settings", [{"cage": 1.0}, {"freeze_oscillating": 0.1}])
def test_without_a_weight_on_a_grid_it_is_refused(lm, train_data, settings):
    with pytest.raises(UsageError, match="act on weights with a grid, and none is trained"):
        train(copy.deepcopy(lm.model), train_data, lambda m: (1.0,), Settings(kl_weight=0, task_weight=1, **settings))
