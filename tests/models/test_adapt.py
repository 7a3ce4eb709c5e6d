"""Which layers get an adapter, what the base keeps, and how much would train, counted without weights."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from quantailor import api
from quantailor.errors import UsageError
from quantailor.evaluate.parity import digests
from quantailor.models.adapt import Size, activate, adapt, adapters, base_hash, base_of, sharing_copy, size_of
from quantailor.models.prepare import pack_model
from quantailor.models.structure import modules_of
from quantailor.nn.lora import LoRA, LoRALinear
from quantailor.nn.packed import QuantLinear
from quantailor.qat.best import Best
from quantailor.verbs.quantizing import quantize
from tests.formats.making import quantized, rule

QV = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def lm(tiny_lm):
    return api.load(tiny_lm)


@pytest.fixture(scope="module")
def simulated(lm):
    return quantize(lm, "w4a16-g32", method="rtn").model


@pytest.fixture
def model(simulated):
    return copy.deepcopy(simulated)


def test_the_7b_of_the_textbook():
    """r = 64, alpha = 128 on q and v of Llama-2-7B: 33.6 M trainable, 0.50 %; nothing is allocated."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config)
    size = size_of(meta, LoRA(r=64, lora_alpha=128, target_modules=QV))
    assert size == Size(trainable=2 * 32 * 64 * (4096 + 4096), total=6_738_415_616 + 33_554_432, layers=64)
    assert str(size) == "33.6 M trainable of 6.77 B parameters (0.50%), 64 layers"
    assert size_of(meta, LoRA(r=1)).layers == 7 * 32  # the linear layers of the blocks, not the head


def test_the_count_is_what_trains(model):
    before = size_of(model, LoRA(r=4, target_modules=QV))
    adapt(model, LoRA(r=4, target_modules=QV))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == before.trainable and len(trainable) == 2 * before.layers
    assert size_of(model, LoRA(r=4, target_modules=QV)) == before


def test_targets_get_an_adapter_and_the_rest_is_packed(model, simulated):
    expected = digests(simulated)
    adapt(model, LoRA(r=4, target_modules=("q_proj", "model.layers.1.mlp.up_proj")))
    names = [n for n, _ in modules_of(model, LoRALinear)]
    assert sorted(names) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert sum(1 for _ in modules_of(model, QuantLinear)) == 14 - 3
    assert digests(model) == expected and digests(pack_model(model)) == expected


@pytest.mark.parametrize("base_bits", [4, 6, 8, 12])
def test_a_base_of_any_width_starts_as_the_simulated_model(lm, base_bits):
    solved = quantized(lm, "w4a16-g32", method="qronos")  # integers that rounding the weight would not give
    expected = digests(solved.model)
    model = copy.deepcopy(solved.model)
    adapt(model, LoRA(r=2, base_bits=base_bits))
    assert digests(model) == expected
    kept = [m for _, m in modules_of(model, LoRALinear)]
    assert all(m.fraction_bits == base_bits - 4 for m in kept)
    if base_bits > 4:  # what is kept is the weight's place in its cell, to the fraction's own half step
        name, layer = next(modules_of(model, LoRALinear))
        source = solved.model.get_submodule(name)
        steps = layer.base_steps(slice(0, layer.out_features))
        weight = steps * layer.packed.scales().repeat_interleave(32, 1)[:, : layer.in_features]
        step = layer.packed.scales().abs().max()
        assert (weight - source.weight).abs().max() <= step * (0.03 + 2.0 ** (4 - base_bits))


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (LoRA(r=4, target_modules=("q_prj",)), ["'q_prj'", "q_proj"]),
        (LoRA(r=4, target_modules=("q_proj", "lm_head")), ["'lm_head'", "kept in float"]),
        (LoRA(r=4, target_modules=("embed_tokens",)), ["'embed_tokens'"]),
        (LoRA(r=40), ["r=40", "k_proj", "32"]),
        (LoRA(r=4, base_bits=3), ["base_bits=3", "4"]),
        (LoRA(r=4, base_bits=13), ["base_bits=13"]),
        (LoRA(r=4, init="loftq"), ["float weights"]),
        (LoRA(r=4, init="loftq", base_bits=8), ["loftq", "base_bits"]),
    ],
)
def test_what_does_not_suit_the_model_is_refused_by_name(model, lora, words):
    before = digests(model)
    with pytest.raises(UsageError) as caught:
        adapt(model, lora)
    assert all(word in str(caught.value) for word in words), caught.value
    assert digests(model) == before and not adapters(model)


def test_more_that_is_refused(lm, model):
    with pytest.raises(UsageError, match="cannot name"):
        adapt(model, LoRA(r=2), name="a.b")
    adapt(model, LoRA(r=2))
    with pytest.raises(UsageError, match="'default' already"):
        adapt(model, LoRA(r=2))
    with pytest.raises(UsageError, match="'other'; this model has default"):
        activate(model, "other")
    with pytest.raises(UsageError, match="no linear layer"):
        adapt(copy.deepcopy(lm.model), LoRA(r=2))
    nf4 = quantized(lm, "nf4", method="rtn").model
    with pytest.raises(UsageError, match="QLoRA"):
        adapt(nf4, LoRA(r=2))
    adapt(nf4, LoRA(r=2, inside=False))
    packed = pack_model(quantized(lm, "w4a16-g32", method="rtn").model)
    with pytest.raises(UsageError, match="holds 4 bits"):
        adapt(packed, LoRA(r=2, base_bits=8))
    assert adapt(packed, LoRA(r=2)) == ["14 layers hold integers only: the base keeps no fractions"]


def test_a_weight_that_two_layers_share_gets_no_adapter(tiny_lm):
    from quantailor.models.prepare import prepare
    from quantailor.recipe import Recipe
    from quantailor.spec import Scheme

    config = LlamaConfig.from_pretrained(tiny_lm)
    config.tie_word_embeddings = True
    tied = AutoModelForCausalLM.from_config(config)
    scheme = Scheme.parse("w4a16-g32")
    prepare(tied, Recipe(scheme, rules=(rule("lm_head", "w4a16-g32"), rule("*embed*", "w4a16-g32"))))
    with pytest.raises(UsageError, match="tied"):
        adapt(tied, LoRA(r=2, target_modules=("lm_head",)))
    adapt(tied, LoRA(r=2))
    assert isinstance(tied.lm_head, QuantLinear) and tied.lm_head.packed is tied.model.embed_tokens.packed


def test_adapters_of_one_base_are_swapped_and_train_apart(model):
    adapt(model, LoRA(r=2, target_modules=QV), name="one")
    adapt(model, LoRA(r=3), name="two")
    assert adapters(model) == ["one", "two"]
    trains = {n.split(".adapters.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {"two"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.02 if ".one." in name else -0.01)
    ids = torch.arange(20)[None]
    outputs = {}
    for name in ("one", "two", None, "one"):
        activate(model, name)
        now = model(input_ids=ids).logits
        if name in outputs:
            assert torch.equal(outputs[name], now)
        outputs[name] = now
    assert not torch.equal(outputs["one"], outputs["two"])
    assert torch.equal(base_of(model)(input_ids=ids).logits, outputs[None])
    trains = {n.split(".adapters.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {"one"}


@pytest.mark.parametrize("inside", [True, False])
def test_loftq_comes_nearer_to_the_weight_than_its_base(lm, model, inside):
    originals = {n: m.weight.detach() for n, m in lm.model.named_modules() if isinstance(m, torch.nn.Linear)}
    adapt(model, LoRA(r=8, init="loftq", inside=inside), originals=originals)
    for name, layer in modules_of(model, LoRALinear):
        adapter, weight = layer.adapters["default"], originals[name]
        base = layer.packed.dequantize()
        both = base + adapter.lora.scaling * adapter.lora_B @ adapter.lora_A
        assert (weight - both).norm() < 0.9 * (weight - base).norm()
        assert layer.fraction_bits == 0


def test_the_hash_is_the_bases(model, simulated):
    adapt(model, LoRA(r=2))
    first = base_hash(model)
    adapt(model, LoRA(r=3), name="two")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert base_hash(model) == first
    other = copy.deepcopy(simulated)
    adapt(other, LoRA(r=2, base_bits=4))  # the same integers, without fractions
    assert base_hash(other) != first
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    assert base_hash(model) != first


def test_the_best_iterate_is_the_adapter_alone(model):
    """Not a copy of the base, which does not move."""
    adapt(model, LoRA(r=2, scales=True))
    best = Best(model)
    best.offer(0, (1.0,))
    assert best.state and all(".adapters.default." in name for name in best.state)


def test_a_copy_shares_what_is_frozen(model):
    packed = pack_model(model)
    twin = sharing_copy(packed)
    adapt(twin, LoRA(r=2))
    name, layer = next(modules_of(twin, LoRALinear))
    assert layer.packed.words.data_ptr() == packed.get_submodule(name).packed.words.data_ptr()
    assert packed.model.norm.weight.requires_grad and not twin.model.norm.weight.requires_grad
    again = sharing_copy(twin)
    other = next(modules_of(again, LoRALinear))[1]
    assert other.adapters["default"].lora_B.data_ptr() != layer.adapters["default"].lora_B.data_ptr()
