"""What is measured, against its definition a weight at a time; and that measuring changes nothing."""

import copy
import math

import pytest
import torch
from torch import nn

from quantailor.numerics import grids
from quantailor.qat.recorder import Recorder
from quantailor.qat.sampled import Sampled
from quantailor.spec import NF4

NAME = "model.layers.0.mlp.down_proj"  # 172 inputs: a shorter last group


def by_definition(layer, before, start_scale):
    """One weight after the other, in Python: q = clamp(round(w / s - offset) + z), w_hat = (q - z + offset) * s."""
    quantizer = layer.weight_quantizer
    qmin, qmax, offset = grids.limits(quantizer.spec.grid)
    size = quantizer.spec.group_size or layer.weight.shape[1]

    def integers(weight):
        found, clipped, values = [], 0, []
        for row in range(weight.shape[0]):
            for column in range(weight.shape[1]):
                group = 0 if quantizer.scale.shape[0] == 1 else row
                s = quantizer.scale[group, column // size, 0].double().item()
                z = quantizer.zero_point[group, column // size, 0].item()
                v = weight[row, column].double().item() / s - offset + z
                q = min(max(round(v), qmin), qmax)
                clipped += v < qmin - 0.5 or v > qmax + 0.5
                found.append(q)
                values.append((q - z + offset) * s)
        return found, clipped, values

    weight = layer.weight.detach()
    q, clipped, w_hat = integers(weight)
    q_before, _, _ = integers(before)
    w, count = weight.double().flatten().tolist(), weight.numel()
    size_w = math.sqrt(sum(v * v for v in w))
    moved = [(a / b).log().item() for a, b in zip(quantizer.scale.double().flatten(), start_scale.double().flatten())]
    return {
        "error": math.sqrt(sum((a - b) ** 2 for a, b in zip(w, w_hat))) / size_w,
        "clip": clipped / count,
        "flips": sum(a != b for a, b in zip(q, q_before)) / count,
        "update": (weight.double() - before.double()).norm().item() / size_w,
        "drift": sum(moved) / len(moved),
        "drift_peak": max(map(abs, moved)),
        "rms": size_w / math.sqrt(count),
        "peak": max(map(abs, w)) / (size_w / math.sqrt(count)),
    }


@pytest.mark.parametrize("scheme", ["w2a16-g32", "w4a16-g64-asym", "w8a8", "w1.58a8", "w2a16-g64-balanced", "w1a1"])
def test_measures_are_what_they_say(simulated_at, scheme, monkeypatch):
    monkeypatch.setattr("quantailor.qat.sampled._WEIGHTS", 10**6)  # all rows
    model = copy.deepcopy(simulated_at(scheme).model)
    layer = model.get_submodule(NAME)
    start, before = layer.weight_quantizer.scale.detach().clone(), layer.weight.detach().clone()
    sampled = Sampled(layer)
    sampled.begin()
    with torch.no_grad():
        layer.weight.add_(0.3 * layer.weight.std() * torch.randn_like(layer.weight))
        # the scales as they are when both sets of integers are taken: only the weights move in this step
    found = {name: float(value) for name, value in sampled.end().items()}
    for name, expected in by_definition(layer, before, start).items():
        assert found[name] == pytest.approx(expected, rel=2e-4, abs=2e-4), name
    assert 0 < found["flips"] < 1 and found["drift"] == 0


def test_drift_is_that_of_the_scales(simulated_at):
    model = copy.deepcopy(simulated_at("w4a16-g32").model)
    layer = model.get_submodule(NAME)
    sampled = Sampled(layer)
    sampled.begin()
    with torch.no_grad():
        layer.weight_quantizer.log_scale.fill_(-0.5)
        layer.weight_quantizer.log_scale[0, 0] = 2.0
    found = sampled.end()
    assert float(found["drift_peak"]) == 2.0 and -0.5 < float(found["drift"]) < -0.4
    assert float(found["clip"]) > 0.05, "smaller scales clip"


def test_flips_back_are_reversals(simulated_at):
    """Up, down, down, up by a whole step: the second and the fourth go back."""
    layer = copy.deepcopy(simulated_at("w8a8").model).get_submodule(NAME)
    with torch.no_grad():
        layer.weight.mul_(0.5)  # room on both sides
    sampled = Sampled(layer)
    step = layer.weight_quantizer.scale.detach()[:, 0]
    found = []
    for way in (1, -1, -1, 1, 0):
        sampled.begin()
        with torch.no_grad():
            layer.weight.add_(way * step)
        found.append(float(sampled.end()["reversals"]))
    assert found[0] == found[2] == found[4] == 0 and found[1] > 0.99 and found[3] > 0.99


def test_nf4_clips_nothing_and_a_float_layer_has_no_error(simulated_at):
    layer = copy.deepcopy(simulated_at("nf4").model).get_submodule(NAME)
    assert isinstance(layer.weight_quantizer.spec.grid, NF4)
    for one, has_error in ((layer, True), (nn.Linear(20, 10), False)):
        sampled = Sampled(one)
        sampled.begin()
        found = sampled.end()
        assert "clip" not in found and ("error" in found) is has_error and float(found["update"]) == 0


def test_a_large_layer_is_looked_at_in_a_few_rows():
    assert Sampled(nn.Linear(4096, 1000)).index.tolist() == torch.linspace(0, 999, 8).long().tolist()
    assert len(Sampled(nn.Linear(64, 4000)).index) == 128


def test_levels_are_shares(simulated_at):
    for scheme, bins in (("w2a16-g32", 4), ("w8a8", 16), ("w1.58a8", 3), ("w1a1", 2)):
        layer = simulated_at(scheme).model.get_submodule(NAME)
        shares = Sampled(layer).levels()
        assert len(shares) == bins and float(shares.sum()) == pytest.approx(1)
        if bins == 4:
            q = layer.weight_quantizer.integers(layer.weight)[Sampled(layer).index]
            assert shares.tolist() == pytest.approx([float((q == level).float().mean()) for level in (-2, -1, 0, 1)])


def test_ranges_are_those_of_what_entered(simulated_at, held_out):
    model = copy.deepcopy(simulated_at("w8a8-static").model).eval()
    entered: dict[str, list[torch.Tensor]] = {}
    batches = [{k: v for k, v in b.items() if k != "labels"} for b in held_out.batches(4)][:2]
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: entered.setdefault(name, []).append(args[0]))
        for name, module in model.named_modules()
        if name == NAME or name.endswith("q_proj")
    ]
    norm_out: list[torch.Tensor] = []
    handles.append(model.model.norm.register_forward_hook(lambda m, args, out: norm_out.append(out)))
    recorder = Recorder(model)
    recorder.begin()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    layers, norms = recorder.end()
    for handle in handles:
        handle.remove()
    names = list(recorder.layers)
    for name, inputs in entered.items():
        assert layers["range"][names.index(name)] == max(float(x.abs().max()) for x in inputs)
    output = norms["output"][list(recorder.norms).index("model.norm")]
    assert output == max(float(x.abs().max()) for x in norm_out)
    assert all(0 <= v < 0.2 for v in layers["input_clip"]) and layers["input_drift"] == [0.0] * len(names)
    weight = model.model.norm.weight.detach()
    assert norms["gain"][-1] == pytest.approx(float((weight**2).mean() ** 0.5))
    model(**batches[0])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules()), "the hooks are gone"


def test_a_static_scale_that_shrinks_clips_its_inputs(simulated_at, held_out):
    model = copy.deepcopy(simulated_at("w8a8-static").model).eval()
    recorder = Recorder(model)
    recorder.begin()
    with torch.no_grad():
        model.get_submodule(NAME).input_quantizer.log_scale.fill_(-10.0)
        model(**{k: v for k, v in next(iter(held_out.batches(4))).items() if k != "labels"})
    layers, _ = recorder.end()
    place = list(recorder.layers).index(NAME)
    assert layers["input_clip"][place] > 0.9 and layers["input_drift"][place] == -10.0


def test_a_float_model_is_recorded_by_its_linear_layers(lm):
    recorder = Recorder(lm.model)
    assert NAME in recorder.layers and "lm_head" in recorder.layers
    recorder.begin()
    layers, norms = recorder.end()
    assert set(layers) == {"update", "rms", "peak"} and set(norms) == {"gain"}
