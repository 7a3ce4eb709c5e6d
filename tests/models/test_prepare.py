import math

import pytest
import torch
from torch import nn

from quantailor.errors import UntrustedInput, UsageError
from quantailor.models.prepare import FAKE_QUANT, PACKED, pack_model, prepare, state_of, unpack_model
from quantailor.models.structure import modules_of
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.recipe import Keep, Recipe, Rule
from quantailor.spec import Scheme
from tests.models import zoo

BATCH = zoo.tokens(9, 4, 1)
TIED = {"llama tied": ("model.embed_tokens", "lm_head"), "masked bert": ("*word_embeddings", "*decoder")}
MODELS = {
    "llama": (zoo.llama, BATCH),
    "llama tied": (lambda: zoo.llama(tie=True), BATCH),
    "bert": (zoo.bert, BATCH),
    "masked bert": (zoo.masked_bert, BATCH),
    "albert": (zoo.albert, BATCH),
    "gpt2": (zoo.gpt2, BATCH),
    "t5": (zoo.t5, {**BATCH, "decoder_input_ids": BATCH["input_ids"]}),
    "qwen3_moe": (zoo.qwen3_moe, BATCH),
}


def run(model, inputs):
    with torch.no_grad():
        result = model(**inputs)
    return result.logits if hasattr(result, "logits") else result


def integers(model):
    return {
        name: m.packed.integers() if isinstance(m, PACKED) else m.weight_quantizer.integers(m.weight_ON)
        for name, m in modules_of(model, FAKE_QUANT + PACKED)
    }


def calibrated(model):
    """Static input scales, which `prepare` leaves open."""
    for _, module in modules_of(model, FAKE_QUANT):
        if module.input_quantizer is not None and not module.input_quantizer.spec.dynamic:
            module.input_quantizer.set_scale(torch.tensor(0.05))
    return model


def rules_for(name, scheme):
    """Embeddings and heads as well, where they are tied."""
    return tuple(Rule(Scheme.parse(scheme), pattern=pattern) for pattern in TIED.get(name, ()))


@pytest.mark.parametrize(
    "scheme",
    ["w8a8", "w8a8-static", "w4a16-g32", "w3a8-g32-asym", "nf4", "nf4-dq", "w1.58a8", "w1a1", "w2a16-balanced"],
)
@pytest.mark.parametrize("name", MODELS)
def test_prepare_pack_unpack_pack_keep_every_bit(name, scheme):
    make, inputs = MODELS[name]
    model = make()
    unquantized = run(model, inputs)
    state = prepare(model, Recipe(Scheme.parse(scheme), rules_for(name, scheme)))
    calibrated(model)
    logits, held = run(model, inputs), integers(model)
    assert torch.isfinite(logits).all() and not torch.equal(logits, unquantized)
    assert state_of(model) is state and set(held) == set(state.inventory.quantized)
    assert pack_model(model) is model
    assert not list(modules_of(model, FAKE_QUANT)) and torch.equal(run(model, inputs), logits)
    assert not any(name.endswith("log_scale") for name, _ in model.named_parameters())
    assert unpack_model(model) is model
    assert not list(modules_of(model, PACKED)) and torch.equal(run(model, inputs), logits)
    back = integers(model)
    assert set(back) == set(held) and all(torch.equal(back[n], held[n]) for n in held)
    assert torch.equal(run(pack_model(model), inputs), logits)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "nf4-dq"])
@pytest.mark.parametrize("name", ["llama", "llama tied", "bert", "gpt2"])
def test_in_bfloat16_as_well(name, scheme):
    make, inputs = MODELS[name]
    model = make().bfloat16()
    prepare(model, Recipe(Scheme.parse(scheme), rules_for(name, scheme)))
    logits = run(model, inputs)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(run(pack_model(model), inputs), logits)
    assert torch.equal(run(unpack_model(model), inputs), logits)


@pytest.mark.parametrize("make, shape", [(zoo.mlp, (7, 20)), (zoo.cnn, (4, 3, 12, 12))])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "w4a16-g32", "w4a8-g32", "nf4"])
def test_plain_modules(make, shape, scheme):
    model, x = make(), torch.randn(shape)
    prepare(model, Recipe(Scheme.parse(scheme)))
    calibrated(model)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(pack_model(model)(x), y) and torch.equal(unpack_model(model)(x), y)


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_stay_tied(name):
    make, _ = MODELS[name]
    model = make()
    prepare(model, Recipe(Scheme.parse("w8a8"), rules_for(name, "w8a8")))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert table.weight is head.weight and table.weight_quantizer is head.weight_quantizer
    assert len({id(q) for _, q in modules_of(model, WeightQuantizer)}) == len(integers(model)) - 1
    pack_model(model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert table.packed is head.packed
    unpack_model(model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert table.weight is head.weight and table.weight_quantizer is head.weight_quantizer


def test_a_module_in_two_places_is_one_afterwards():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 2))
    x = torch.randn(5, 8)
    prepare(model, Recipe(Scheme.parse("w4a16")))
    assert model[0] is model[2]
    y = model(x)
    pack_model(model)
    assert model[0] is model[2] and torch.equal(model(x), y)


def test_a_model_of_blocks_alone():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3)))
    assert len(prepare(model, Recipe(Scheme.parse("w4a16"))).inventory.quantized) == 6


def test_ragged_groups_are_noted():
    state = prepare(zoo.llama(layers=4), Recipe(Scheme.parse("w4a16-g32")))
    told = "4 layers have a shorter last group (input size no multiple of the group): model.layers.0.mlp.down_proj, "
    assert [note for note in state.notes if note.startswith(told) and note.endswith(" and 1 more")] == state.notes
    assert not prepare(zoo.llama(), Recipe(Scheme.parse("w4a16-g4"))).notes


def test_what_is_kept_is_left_alone():
    model = zoo.llama()
    before = dict(model.named_modules())
    keep = Rule(Keep("outliers"), pattern="*.down_proj")
    state = prepare(model, Recipe(Scheme.parse("w4a16"), (keep,)))
    for entry in state.inventory:
        assert (model.get_submodule(entry.name) is before[entry.name]) == (entry.scheme is None)


def test_scales_are_those_of_the_full_range_until_calibration():
    model = zoo.llama()
    prepare(model, Recipe(Scheme.parse("w4a16-g32")))
    for _, module in modules_of(model, FAKE_QUANT):
        weight = nn.functional.pad(module.weight.detach(), (0, -module.in_features % 32))
        largest = weight.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True)
        assert torch.equal(module.weight_quantizer.scale, largest / 7.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad):
    model = zoo.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = bad
    with pytest.raises(UntrustedInput, match=r"^model\.layers\.1\.mlp\.up_proj: its weight holds NaN or Inf"):
        prepare(model, Recipe(Scheme.parse("w4a16-g32")))


def test_a_float_model_has_no_state():
    assert state_of(zoo.mlp()) is None
    with pytest.raises(UsageError, match="a rule matches nothing"):
        prepare(zoo.mlp(), Recipe(Scheme.parse("w8a8"), (Rule(Keep("x"), pattern="y"),)))
