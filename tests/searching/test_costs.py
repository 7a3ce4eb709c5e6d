"""Bytes against what a packed layer holds."""

import pytest
import torch
from torch import nn

from quantailor.models.prepare import pack_model, prepare
from quantailor.recipe import Recipe
from quantailor.searching.costs import packed_bytes, packed_nanoseconds
from quantailor.spec import Scheme


@pytest.mark.parametrize(
    "scheme", ["w2a16-g32", "w3a16-g64", "w4a16", "w5a16-g16-asym", "w8a16", "w8a8", "nf4-dq", "w1.58a8"]
)
@pytest.mark.parametrize("shape", [(64, 172), (48, 64)])
def test_bytes_are_those_of_the_packed_layer(scheme, shape):
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    prepare(model, Recipe(Scheme.parse(scheme)))
    held = {k: v for k, v in pack_model(model).state_dict().items() if "packed" in k}
    assert packed_bytes(Scheme.parse(scheme).weight, *shape) == sum(v.numel() * v.element_size() for v in held.values())


def test_the_figures_of_a_round_layer():
    assert packed_bytes(Scheme.parse("w4a16-g64").weight, 256, 256) * 8 == 256 * 256 * 4.5
    assert packed_bytes(Scheme.parse("w2a16-g32").weight, 256, 256) * 8 == 256 * 256 * 3
    assert packed_bytes(None, 3, 5) == 60 and packed_bytes(None, 3, 5, float_bytes=2) == 30


def test_time_is_positive_and_the_layer_is_left_alone():
    layer = nn.Linear(64, 32)
    before = layer.weight.clone()
    for scheme in ("float", "w4a16-g32", "w8a8"):
        assert packed_nanoseconds(layer, Scheme.parse(scheme), repeats=3) > 0
    assert type(layer) is nn.Linear and torch.equal(layer.weight, before)
