import pytest
from torch import nn

from quantailor.models.structure import blocks, modules_of, replace
from tests.models import zoo


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: zoo.llama(layers=3), ["model.layers.0", "model.layers.1", "model.layers.2"]),
        (zoo.bert, ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        (zoo.gpt2, ["transformer.h.0", "transformer.h.1"]),
        (zoo.qwen3_moe, ["model.layers.0", "model.layers.1"]),
        (zoo.t5, ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
        (zoo.cnn, [""]),
        (zoo.mlp, [""]),
    ],
)
def test_blocks_by_name_and_in_order(make, names):
    model = make()
    found = blocks(model)
    assert [name for name, _ in found] == names
    assert all(module is model.get_submodule(name) for name, module in found)


def test_a_model_that_is_a_list_of_blocks():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(3)))
    assert [name for name, _ in blocks(model)] == ["0", "1", "2"]


def test_a_module_is_replaced_wherever_it_hangs():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "deep": nn.Sequential(nn.ReLU(), shared), "other": nn.Linear(3, 3)})
    new, other = nn.Identity(), model["other"]
    replace(model, "a", new)
    assert model["a"] is new and model["deep"][1] is new and model["other"] is other
    replace(model, "deep.0", other)
    assert model["deep"][0] is other


def test_a_shared_module_comes_once():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.ReLU()})
    assert [name for name, _ in modules_of(model, nn.Linear)] == ["a"]
    assert [name for name, _ in modules_of(model, (nn.Linear, nn.ReLU))] == ["a", "c"]
