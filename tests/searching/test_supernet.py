"""The supernet: its parts are real smaller models, and what is trained on a part moves the whole."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantailor import api
from quantailor.data.loading import load_examples
from quantailor.errors import UsageError
from quantailor.searching.supernet import Architecture, ArchitectureSpace, Supernet, on_grid
from tests.formats.making import texts

SPACE = ArchitectureSpace(depth=(1, 2), width=(48, 64), heads=(2, 4), ffn=(100, 172), bits=(4, 2))
PART = Architecture(depth=1, width=48, heads=2, ffn=100, bits=4)


@pytest.fixture
def model(tiny_lm):
    return AutoModelForCausalLM.from_pretrained(tiny_lm)


def sliced_by_hand(model, one):
    """The state dict of a part, written out for Llama (16 channels a head, 2 heads to a key-value head)."""
    state, d, rows, kv = {}, one.width, 16 * one.heads, 8 * one.heads
    whole = model.state_dict()
    state["model.embed_tokens.weight"] = whole["model.embed_tokens.weight"][:, :d]
    state["model.norm.weight"] = whole["model.norm.weight"][:d]
    state["lm_head.weight"] = whole["lm_head.weight"][:, :d]
    for i in range(one.depth):
        p = f"model.layers.{i}."
        for name, (o, n) in {
            "self_attn.q_proj": (rows, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, rows),
            "mlp.gate_proj": (one.ffn, d),
            "mlp.up_proj": (one.ffn, d),
            "mlp.down_proj": (d, one.ffn),
        }.items():
            state[f"{p}{name}.weight"] = whole[f"{p}{name}.weight"][:o, :n]
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{p}{name}.weight"] = whole[f"{p}{name}.weight"][:d]
    return state


def test_a_part_is_the_leading_slices(model):
    net = Supernet(model, SPACE, quantized=False)
    part = net.inherited(PART)
    expected = sliced_by_hand(model, PART)
    held = part.state_dict()
    assert expected.keys() == held.keys() and all(torch.equal(held[n], t) for n, t in expected.items())
    assert part.config.num_key_value_heads == 1 and part.config.num_hidden_layers == 1
    batch = {"input_ids": torch.arange(3, 23)[None]}
    assert torch.allclose(net.logits(PART, batch), part(**batch).logits, atol=1e-6)
    assert torch.allclose(net.logits(SPACE.largest, batch), model.eval()(**batch).logits, atol=1e-6)


def test_gradients_reach_the_part_and_nothing_else(model):
    net = Supernet(model, SPACE)
    net.logits(PART, {"input_ids": torch.arange(3, 23)[None]}).square().mean().backward()
    down = model.get_submodule("model.layers.0.mlp.down_proj").weight.grad
    assert down[:48, :100].abs().sum() > 0 and down[48:].abs().sum() == 0 and down[:, 100:].abs().sum() == 0
    assert model.get_submodule("model.layers.1.mlp.down_proj").weight.grad is None, "the second block is not in it"


@pytest.mark.parametrize(("bits", "group", "columns"), [(4, 32, 64), (2, 32, 70), (3, 64, 100)])
def test_the_grid_by_its_definition(bits, group, columns):
    torch.manual_seed(0)
    w = torch.randn(5, columns)
    slow, qmin, qmax = torch.empty_like(w), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for o in range(5):
        for start in range(0, columns, group):
            run = w[o, start : start + group]
            padded = torch.cat([run, torch.zeros(group - len(run))])  # a shorter last group is filled up by zeros
            step = 2 * padded.abs().mean() / qmax**0.5
            slow[o, start : start + group] = (run * (1 / step)).round().clamp(qmin, qmax) * step
    assert torch.allclose(on_grid(w, bits, group), slow, atol=1e-6)


def test_training_brings_every_size_down(model, tiny_lm):
    data = load_examples(texts(60, seed=1), api.load(tiny_lm).tokenizer, "lm", context=32)
    net = Supernet(model, SPACE)
    batch = next(iter(data.batches(8)))

    def losses():
        with torch.no_grad():
            found = []
            for one in (SPACE.largest, SPACE.smallest, PART):
                logits = net.logits(one, batch)[:, :-1]
                found.append(
                    float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()))
                )
            return found

    before = losses()
    curve = net.train(data, 30, seed=0)
    after = losses()
    assert len(curve) == 30 and all(b < a - 0.5 for a, b in zip(before, after)), (before, after)


def test_spaces():
    draw = random.Random(0)
    assert SPACE.largest == Architecture(2, 64, 4, 172, 4) and SPACE.smallest == Architecture(1, 48, 2, 100, 2)
    assert len(SPACE) == 32 and len({SPACE.drawn(draw) for _ in range(2000)}) == 32
    for _ in range(50):
        other = SPACE.changed(PART, draw)
        assert sum(a != b for a, b in zip(vars(other).values(), vars(PART).values())) <= 2
    with pytest.raises(UsageError, match="depth="):
        ArchitectureSpace(depth=(), width=(4,), heads=(2,), ffn=(4,))
    with pytest.raises(UsageError, match="2 to 8 bits"):
        ArchitectureSpace(depth=(1,), width=(4,), heads=(2,), ffn=(4,), bits=(9,))


def test_spaces_around_a_model(model, tiny_bert):
    space = ArchitectureSpace.around(model, {"bits": (4,)})
    assert space.largest == Architecture(2, 64, 4, 172, 4) and space.heads == (4, 2)
    with pytest.raises(UsageError, match="width=128 is more than the model's 64"):
        ArchitectureSpace.around(model, {"width": (128,)})
    with pytest.raises(UsageError, match="multiples of 2"):
        ArchitectureSpace.around(model, {"heads": (3,)})
    with pytest.raises(UsageError, match="cannot be cut into smaller ones"):
        ArchitectureSpace.around(api.load(tiny_bert).model, {})
