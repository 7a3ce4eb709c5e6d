"""Hybrids: what trains moves, and everything else is, bit for bit, what PTQ left."""

import copy

import pytest
import torch
from torch import nn

from quantailor.errors import UsageError
from quantailor.models.prepare import FAKE_QUANT
from quantailor.models.structure import modules_of
from quantailor.qat.freezing import frozen, owners, train_only, train_ranges
from quantailor.qat.groups import kinds_of
from quantailor.qat.settings import Settings
from quantailor.qat.train import train

OPTIONS = {"steps": 3, "batch_size": 4, "evaluations": 1, "learning_rate": 3e-3}


def falling():
    """A score that falls with each look, so that the last iterate is the one that is kept."""
    scores = iter(range(100, 0, -1))
    return lambda model: (float(next(scores)),)


def everything(model):
    """Every parameter, buffer and integer by name."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, layer in modules_of(model, FAKE_QUANT):
        found[f"{name} integers"] = layer.weight_quantizer.integers(layer.weight_ON)
    return {name: tensor.detach().clone() for name, tensor in found.items()}


@pytest.fixture
def moved(simulated_at, lm, train_data):
    """moved(scheme, **settings) -> (names of what training moved, names of all there is)."""

    def run(scheme="w4a8-static", **settings):
        model = copy.deepcopy(simulated_at(scheme).model)
        before = everything(model)
        train(model, train_data, falling(), Settings(**{**OPTIONS, **settings}), teacher=lm.model)
        after = everything(model)
        assert before.keys() == after.keys() and all(p.requires_grad for p in model.parameters())
        return {name for name in before if not torch.equal(before[name], after[name])}, set(before)

    return run


def test_without_a_hybrid_weights_and_ranges_move(moved):
    found, names = moved()
    assert {n for n in names if n.endswith("proj.weight")} <= found
    assert any(n.endswith("integers") for n in found) and any("input_quantizer.log_scale" in n for n in found)


@pytest.mark.parametrize("gradient", ["lsq", "pact"])
def test_ranges_train_and_no_weight_no_integer_no_norm_moves(moved, gradient):
    found, names = moved(trains="ranges", gradient=gradient)
    ranges = {n for n in names if n.endswith("input_quantizer.log_scale")}
    assert len(ranges) == 14 and found == ranges


def test_chosen_layers_train_and_the_rest_is_what_ptq_left(moved):
    found, names = moved(train_only=("*.down_proj", "model.layers.1.self_attn"))
    chosen = {n for n in names if ".down_proj" in n or "layers.1.self_attn." in n}
    assert found < chosen, "nothing outside them"
    assert {n for n in chosen if n.endswith((".weight", "log_scale"))} <= found, "all that trains in them"


def test_both_together_train_the_ranges_of_the_chosen_layers(moved):
    found, _ = moved(trains="ranges", train_only=("*.down_proj",))
    assert found == {f"model.layers.{i}.mlp.down_proj.input_quantizer.log_scale" for i in (0, 1)}


def test_epochs_count_the_rows(simulated_at, lm, train_data):
    model = copy.deepcopy(simulated_at("w4a16-g32").model)
    options = {**OPTIONS, "steps": None, "epochs": 0.5, "batch_size": 5, "accumulate": 2}
    report = train(model, train_data, falling(), Settings(**options), teacher=lm.model)
    assert report.steps == -(-len(train_data) // 20)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"train_only": ("*.no_proj",)},
            r"train_only '\*.no_proj' names nothing that trains here; names look like model",
        ),
        ({"train_only": ("*.down_proj", "lm_hat")}, "train_only 'lm_hat' names nothing"),
        ({"train_only": ("model.layers.0.*",), "freeze_lower": 0.5}, r"train_only 'model.layers.0.\*' names nothing"),
    ],
)
def test_a_pattern_without_effect_is_refused(moved, settings, told):
    with pytest.raises(UsageError, match=told):
        moved(**settings)


def test_ranges_need_a_static_scheme(simulated_at):
    with pytest.raises(UsageError, match="there are none; use a -static scheme"):
        train_ranges(copy.deepcopy(simulated_at("w8a8").model))


def test_a_pattern_names_a_layer_and_all_within():
    assert owners("a.b.weight") == ["a", "a.b", "a.b.weight"]
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    stopped = train_only(model, ["1"])
    assert {id(p) for p in stopped} == {id(p) for p in model[0].parameters()}
    assert set(kinds_of(model)) == {"1.weight", "1.bias"}


def test_averages_of_a_frozen_norm_are_used_and_held():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).train()
    x = torch.randn(4, 1, 5, 5) + 3
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad(), frozen(model, Settings(train_only=("2", "3"))):
        model.train()
        found = model[:2](x)
        model(x)
        expected = copy.deepcopy(model[:2]).eval()(x)
    assert torch.equal(found, expected)
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"3.running_mean", "3.running_var", "3.num_batches_tracked"}
    assert all(p.requires_grad for p in model.parameters())


def nodes_of(tensor):
    """How many operations backward will run."""
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [nxt for nxt, _ in node.next_functions]
    return len(seen)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "w8a8-static"])
def test_nothing_is_recorded_below_a_frozen_prefix(simulated_at, train_data, scheme):
    """What reaches the first block that trains carries no gradient, so backward ends there."""
    model = copy.deepcopy(simulated_at(scheme).model).train()
    batch = next(iter(train_data.batches(2)))
    entering = []
    model.model.layers[1].register_forward_pre_hook(lambda m, args: entering.append(args[0].requires_grad))
    whole = nodes_of(model(**batch).loss)
    with frozen(model, Settings(freeze_lower=0.5)):
        half = nodes_of(model(**batch).loss)
    assert entering == [True, False] and half < 0.62 * whole
