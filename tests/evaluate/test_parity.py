"""Two models that are the same are equal; one integer, scale or zero point that is not is named."""

import copy
import math

import pytest
import torch

from quantailor import api
from quantailor.evaluate.parity import compare, differing, digests, num_integers
from quantailor.models.prepare import pack_model, unpack_model
from tests.formats.making import quantized, rule

Q_PROJ, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def simulated_by(tiny_lm):
    lm, made = api.load(tiny_lm), {}

    def make(scheme: str) -> api.Model:
        if scheme not in made:
            made[scheme] = quantized(lm, scheme, [rule("model.embed_tokens", "w8a16")] if scheme == "nf4" else [])
        return made[scheme]

    return make


def pair(simulated: api.Model):
    """(simulated, packed), copies that may be damaged."""
    return copy.deepcopy(simulated.model), pack_model(copy.deepcopy(simulated.model))


@pytest.mark.parametrize(
    "scheme", ["w8a8", "w4a16-g32", "w4a8-g32", "nf4", "nf4-dq", "w3a16-asym", "w8a8-static", "w1a1"]
)
def test_simulated_and_packed_are_equal(simulated_by, scheme):
    model = simulated_by(scheme)
    left, right = pair(model)
    parity = compare(left, right, model.probe)

    assert parity.equal and parity.differing == {} and parity.top1_equal
    assert parity.max_logit_difference == 0 and set(parity.per_layer.values()) == {0.0}
    assert parity.layers == len(model.state.inventory.quantized) == len(digests(left))
    assert parity.integers == sum(math.prod(e.shape) for e in model.state.inventory if e.scheme) == num_integers(left)
    assert parity.tolerance == (1e-5 if "a16" in scheme or "nf4" in scheme else 1e-3)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "nf4-dq", "w3a16-asym", "w8a8-static"])
def test_unpacked_again_holds_the_same(simulated_by, scheme):
    left, right = pair(simulated_by(scheme))

    assert digests(unpack_model(right)) == digests(left)


def flip_integer(module):
    store = module.packed
    (store.q if store.is_int8 else store.words).view(-1)[5] ^= 1


def grow_scale(module):
    module.packed.scale.view(-1)[3] *= 1.5


def turn_scale(module):
    """Legal on a grid of 4 bits, where a scale may be negative, so that loading cannot refuse it."""
    module.packed.scale.view(-1)[3] *= -1


def shift_zero_point(module):
    module.packed.zero_point.view(-1)[0] ^= 1


def grow_input_scale(module):
    module.input_scale *= 2


@pytest.mark.parametrize(
    ("scheme", "damage", "what"),
    [
        ("w8a8", flip_integer, "integers"),
        ("w4a16-g32", flip_integer, "integers"),
        ("w8a8", grow_scale, "scales"),
        ("w4a16-g32", grow_scale, "scales"),
        ("w4a16-g32", turn_scale, "scales"),
        ("w3a16-asym", shift_zero_point, "zero points"),
        ("w8a8-static", grow_input_scale, "input scale"),
    ],
)
@pytest.mark.parametrize("layer", [Q_PROJ, DOWN])
def test_one_wrong_value_is_found_and_its_layer_named(simulated_by, scheme, damage, what, layer):
    model = simulated_by(scheme)
    left, right = pair(model)
    damage(right.get_submodule(layer))
    parity = compare(left, right, model.probe)

    assert not parity.equal and parity.differing == {layer: what}
    assert next(name for name, value in parity.per_layer.items() if value > 0) == layer, "the first that differs"
    told = parity.to_json()
    assert told["equal"] is False and told["differing"] == [{"layer": layer, "what": what}]


def test_a_layer_that_only_computes_differently_is_found_too(simulated_by):
    """The same integers, yet another output: a wrong bias, which no digest covers."""
    model = simulated_by("w4a16-g32")
    left, right = pair(model)
    right.get_submodule(Q_PROJ).register_buffer("bias", torch.ones(64))
    parity = compare(left, right, model.probe)

    assert parity.differing == {} and not parity.equal
    assert parity.max_logit_difference > parity.tolerance and parity.per_layer[Q_PROJ] > parity.tolerance


def test_outputs_that_are_not_finite_are_not_equal(simulated_by):
    model = simulated_by("w8a8")
    left, right = pair(model)
    right.model.norm.weight.data[0] = math.nan
    parity = compare(left, right, model.probe)

    assert parity.max_logit_difference == math.inf and not parity.equal


def test_a_layer_in_only_one_of_the_two_is_named(simulated_by):
    found = digests(simulated_by("w8a8").model)
    less = {name: parts for name, parts in found.items() if name != DOWN}

    assert differing(found, less) == differing(less, found) == {DOWN: "is quantized in only one of the two"}
    assert differing(found, found) == {}


def test_digests_given_take_the_place_of_the_simulated_ones(simulated_by):
    model = simulated_by("w8a8")
    left, right = pair(model)
    expected = digests(left)
    expected[Q_PROJ] = {**expected[Q_PROJ], "scales": "0" * 64}

    assert compare(left, right, model.probe, expected=expected).differing == {Q_PROJ: "scales"}


def test_modes_and_hooks_are_as_before(simulated_by):
    model = simulated_by("w8a8")
    left, right = pair(model)
    left.train()
    compare(left, right, model.probe)

    assert left.training and not right.training
    assert not any(module._forward_hooks for module in (*left.modules(), *right.modules()))
