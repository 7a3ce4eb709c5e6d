"""Fused experts, taken apart: the same outputs, and layers like any others."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from quantailor import api
from quantailor.models.experts import SplitExperts, experts_of, split_experts
from quantailor.nn.packed import QuantLinear
from tests.formats.making import bytes_of, rule, texts


@pytest.fixture(scope="module")
def moe(tmp_path_factory, tiny_lm):
    """A random Qwen3-MoE: 2 layers of 6 experts, 2 a token, hidden 64, inner 32; the last expert is never chosen."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("moe") / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.save_pretrained(folder)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config)
    for layer in model.model.layers:  # of four opposite experts two are always liked better than one that gets 0
        gate = layer.mlp.gate.weight.data
        gate[1], gate[3], gate[5] = -gate[0], -gate[2], 0
    model.save_pretrained(folder)
    return folder


PROBE = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(PROBE).logits


def test_taken_apart_they_compute_the_same_and_are_called_as_on_disk(moe):
    model = api.load(moe).model
    before = logits(model)
    assert split_experts(model) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    stored = load_file(moe / "model.safetensors")
    assert set(model.state_dict()) == set(stored)
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


def test_in_a_traced_graph_every_expert_runs_and_those_not_chosen_weigh_nothing():
    torch.manual_seed(0)
    parts = [nn.Linear(8, 8, bias=False) for _ in range(4)]
    experts = SplitExperts(parts)
    x, chosen, weights = torch.randn(10, 8), torch.randint(0, 5, (10, 2)), torch.rand(10, 2)
    by_hand = torch.zeros(10, 8)
    for token in range(10):
        for k in range(2):
            if chosen[token, k] < 4:  # 4: none of them
                by_hand[token] += parts[chosen[token, k]](x[token]) * weights[token, k]

    torch.testing.assert_close(experts(x, chosen, weights), by_hand)
    torch.testing.assert_close(experts._all(x, chosen, weights), by_hand)


def test_names():
    assert experts_of(["a.mlp.experts.3.up_proj", "a.mlp.up_proj", "b.experts.0.down_proj.weight", "x.0.up_proj"]) == {
        "a.mlp.experts",
        "b.experts",
    }


def test_experts_of_another_form_stay_as_they_are(moe):
    model = api.load(moe).model
    model.model.layers[0].mlp.experts.has_bias = True
    second = model.model.layers[1].mlp.experts
    plain = second.forward
    second.forward = lambda *args: 2 * plain(*args)  # in its own way
    assert split_experts(model) == []
    assert model.model.layers[1].mlp.experts is second


@pytest.mark.parametrize(
    ("scheme", "rules", "layout"),
    [
        ("w4a16-g32", [], "compressed-tensors"),
        ("w4a16-g32", [rule("*self_attn*", "w8a16")], "compressed-tensors"),
        ("w8a8", [rule("*.experts.3.*", "keep")], "quantailor"),
    ],
)
def test_quantized_saved_and_read_in_memory_and_by_streaming(moe, tmp_path, scheme, rules, layout):
    options = {"method": "gptq", "data": texts(6, 1), "samples": 4, "context": 48, "rules": rules}
    made = api.quantize(moe, scheme, **options)
    experts = [name for name in made.state.inventory.quantized if ".experts." in name]
    assert len(experts) == (36 if not any("experts" in str(r.pattern) for r in rules) else 30)
    unseen = [note for note in made.state.notes if "experts.5" in note and "rounded to nearest without data" in note]
    seen = [made.state.layers[name].get("rows", 0) for name in experts]
    assert len(unseen) == 6 and max(seen) > 0, "what the router sent where is what it was solved on"

    folder = api.save(made, tmp_path / "saved")
    assert json.loads((folder / "quantailor.json").read_text())["format"] == layout
    loaded = api.load(folder)
    assert isinstance(loaded.model.get_submodule(experts[0]), QuantLinear)
    assert torch.equal(logits(loaded.model), logits(made.model)) and api.check(folder).equal
    assert bytes_of(api.save(loaded, tmp_path / "again")) == bytes_of(folder)

    streamed = api.quantize_folder(moe, scheme, tmp_path / "streamed", **options)
    assert streamed.in_memory_because is None and bytes_of(tmp_path / "streamed") == bytes_of(folder)
    if layout == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="the interop extra is not installed")
        from transformers import AutoModelForCausalLM

        stock = logits(AutoModelForCausalLM.from_pretrained(folder).eval())
        assert float((stock - logits(loaded.model)).abs().max() / stock.abs().max()) <= 1e-5


def test_experts_train(moe):
    settings = api.Settings(steps=4, batch_size=4, evaluations=1, learning_rate=1e-3)
    trained = api.train(moe, texts(12, 1), scheme="w4a16-g32", settings=settings, context=32, method="rtn", samples=4)
    assert trained.training is not None and len(trained.state.inventory.quantized) == 44
