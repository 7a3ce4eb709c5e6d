"""Attention probabilities on few levels, in both ways that models compute attention."""

import pytest
import torch
import torch.nn.functional as F

from quantailor.searching.scores import QuantizedScores, fake_quantize_scores, quantized_scores
from tests.models import zoo


def test_levels():
    p = torch.rand(3, 4, 5).softmax(-1)
    for bits in (2, 3, 8):
        q = fake_quantize_scores(p, bits)
        step = p.amax(-1, keepdim=True) / (2**bits - 1)
        assert torch.allclose(q / step, (q / step).round(), atol=1e-4) and ((q - p).abs() <= step / 2 + 1e-7).all()
        assert torch.allclose(q.amax(-1), p.amax(-1))


@pytest.mark.parametrize("masked", [None, "bool", "float", "causal"])
def test_with_many_levels_it_is_attention(masked):
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    allowed = torch.ones(6, 6).tril().bool()
    options = {
        None: {},
        "bool": {"attn_mask": allowed},
        "float": {"attn_mask": torch.zeros(6, 6).masked_fill(~allowed, -torch.inf)},
        "causal": {"is_causal": True, "scale": 0.3},
    }[masked]
    wanted = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    with QuantizedScores(24) as mode:
        found = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    assert mode.seen == 1 and torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_one_block_of_a_model(name, implementation):
    model = getattr(zoo, name)()
    model.set_attn_implementation(implementation)
    block = model.model.layers[1] if name == "llama" else model.bert.encoder.layer[1]
    batch = zoo.tokens(9, 7)
    with torch.no_grad():
        before = model(**batch).logits
        with quantized_scores(block, 2) as mode:
            low = model(**batch).logits
        assert mode.seen == 1, "that block's attention and no other"
        with quantized_scores(block, 20):
            high = model(**batch).logits
        after = model(**batch).logits
    assert torch.equal(after, before) and not torch.allclose(low, before, atol=1e-4)
    assert torch.allclose(high, before, atol=1e-3)


def test_a_failure_inside_leaves_nothing_behind():
    model = zoo.llama()
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), quantized_scores(model.model.layers[0], 2):
        model(**zoo.tokens(5))
    handle.remove()
    p = torch.randn(1, 1, 3, 3)
    assert len(F.softmax(p, -1).unique()) > 3, "no mode is left on"
