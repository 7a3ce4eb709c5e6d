"""What trains, in which group, how fast."""

import copy

import pytest

from quantailor.errors import UsageError
from quantailor.qat.groups import depths, freeze_lower, freeze_matrices, kinds_of, parameter_groups
from quantailor.qat.settings import Settings


@pytest.fixture
def model(simulated_at):
    return copy.deepcopy(simulated_at("w8a8-static").model)


def test_depths_are_embeddings_blocks_and_what_follows(model):
    found, last = depths(model)
    assert last == 2
    for name, depth in found.items():
        expected = 0 if "embed" in name else 1 if ".layers.0." in name else 2
        assert depth == expected, name
    assert {0, 1, 2} == set(found.values()) and found["model.norm.weight"] == 2


def test_rates_fall_with_depth(model):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, Settings(layer_decay=0.5, weight_decay=0.1), (1e-3, 4e-4))
    seen = []
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            top = 4e-4 if name.endswith("log_scale") else 1e-3
            expected = top * (0.25 if "embed" in name else 0.5 if ".layers.0." in name else 1.0)
            assert group["lr"] == pytest.approx(expected), name
            matrix = not name.endswith("log_scale") and parameter.dim() == 2
            assert group["weight_decay"] == (0.1 if matrix else 0.0)
    assert sorted(seen) == sorted(names.values()), "every parameter once"


def test_without_decay_a_kind_is_one_group(model):
    groups = parameter_groups(model, Settings(), (1e-3, 4e-4))
    assert [group["kind"] for group in groups] == ["matrices", "vectors", "scales", "ranges"]


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_the_lower_blocks_and_the_embeddings_stop(model, share):
    stopped = freeze_lower(model, share)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".layers.0." not in name and "embed" not in name), name
    assert {id(p) for p in stopped} == {id(p) for p in model.parameters() if not p.requires_grad}


def test_a_share_of_no_block_is_refused(model):
    with pytest.raises(UsageError, match=r"freeze_lower=0.3 of 2 blocks is none; use at least 0.5"):
        freeze_lower(model, 0.3)
    assert freeze_lower(model, 0.0) == [] and all(p.requires_grad for p in model.parameters())


def test_scales_only_leaves_scales_and_vectors(model):
    freeze_matrices(model)
    left = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.endswith("log_scale") or "norm" in n for n in left) and len(left) == 28 + 5
    assert set(kinds_of(model).values()) == {"scales", "ranges", "vectors"}


def test_nf4_has_no_scale_that_could_train_alone(simulated_at):
    with pytest.raises(UsageError, match="has no scale that learns"):
        freeze_matrices(copy.deepcopy(simulated_at("nf4").model))
