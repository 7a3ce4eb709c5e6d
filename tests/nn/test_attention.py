"""Our attention function: without points it is the model's own; with them, the slow computation row by row."""

import copy
import math

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from quantailor.errors import QuantailorError
from quantailor.models.points import implementation
from quantailor.models.prepare import prepare
from quantailor.nn import attention
from quantailor.nn.points import PackedScore, PointQuantizer, ScoreQuantizer
from quantailor.points import Points, PointSpec
from quantailor.recipe import Recipe
from quantailor.spec import Scheme
from tests.models import zoo


def gemma2():
    """Scores with a soft cap, layers with a sliding window in turn."""
    config = Gemma2Config(
        **zoo.TOKENS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, initializer_range=0.2, attn_logit_softcapping=2.0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def mistral():
    config = MistralConfig(
        **zoo.TOKENS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, initializer_range=0.2,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("make", [zoo.bert, zoo.llama, zoo.gpt2, zoo.albert, zoo.qwen3_moe, zoo.t5, gemma2, mistral])
@pytest.mark.parametrize("side", ["right", "left"])
def test_without_points_it_is_the_models_own_bit_for_bit(make, side):
    model = make()
    batch = zoo.tokens(9, 5, side=side)
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad():
        with implementation(model, "eager"):
            expected = model(**batch).logits
        with attention.watched() as calls, implementation(model, attention.IMPLEMENTATION):
            found = model(**batch).logits
    assert calls
    assert torch.equal(found, expected)


def fake(row, largest, bits):
    """One row on the grid of a scale that maps `largest` to half of its steps, number by number."""
    scale = float(torch.tensor(largest) / ((2**bits - 1) / 2)) if largest else 1.0
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return [max(low, min(high, round(float(torch.tensor(value) / scale)))) * scale for value in row]


def slow_attention(query, key, value, mask, groups, score_bits, cache_bits):
    """[B, H, Q, D], [B, H / groups, K, D] -> [B, Q, H, D], one query after the other."""
    batch, heads, queries, width = query.shape
    out = torch.full((batch, queries, heads, width), torch.nan, dtype=query.dtype)  # where nothing is seen
    for b in range(batch):
        for h in range(heads):
            keys, values = (t[b, h // groups].tolist() for t in (key, value))
            keys, values = ([fake(r, max(map(abs, r)), cache_bits) for r in rows] for rows in (keys, values))
            for i in range(queries):
                row = [sum(x * y for x, y in zip(query[b, h, i].tolist(), k)) / math.sqrt(width) for k in keys]
                seen = [mask is None or float(mask[b, 0, i, j]) == 0 for j in range(len(keys))]
                row = fake(row, max((abs(s) for s, ok in zip(row, seen) if ok), default=0.0), score_bits)
                if not any(seen):
                    continue
                weights = [math.exp(s) if ok else 0.0 for s, ok in zip(row, seen)]
                for d in range(width):
                    out[b, i, h, d] = sum(w * v[d] for w, v in zip(weights, values)) / sum(weights)
    return out


class Holder(torch.nn.Module):
    """What an attention module is to the function."""


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_keys_and_values_row_by_row(groups, masked):
    batch, heads, length, width = 2, 4, 5, 6
    query = torch.randn(batch, heads, length, width).double()  # so that no tie hangs on the order of a sum
    key, value = torch.randn(2, batch, heads // groups, length, width).double()
    mask = None
    if masked:
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1).expand(batch, 1, -1, -1).clone()
        mask[1, :, :, 0] = torch.finfo(torch.float32).min  # padded on the left: the first row sees nothing
    module = Holder().eval()
    module.score_point = ScoreQuantizer(PointSpec.parse("a4"))
    module.key_point, module.value_point = (PointQuantizer(PointSpec.parse("a5"), None, True) for _ in range(2))
    found, _ = attention.attention(module, query, key, value, mask)
    expected = slow_attention(query, key, value, mask, groups, score_bits=4, cache_bits=5)
    rows = slice(None) if mask is None else torch.isfinite(expected).all(-1)
    assert (found[rows] - expected[rows]).abs().max() < 1e-5
    plain, _ = attention.attention(Holder().eval(), query, key, value, mask)
    assert (found[rows] - plain[rows]).abs().max() > 1e-2


def test_a_boolean_mask_is_the_same_mask():
    query, key, value = torch.randn(3, 1, 2, 4, 6)
    seen = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    added = torch.zeros(1, 1, 4, 4).masked_fill(~seen, torch.finfo(torch.float32).min)
    module = Holder().eval()
    module.score_point = ScoreQuantizer(PointSpec.parse("a4"))
    results = [attention.attention(module, query, key, value, mask)[0] for mask in (seen, added)]
    assert torch.equal(*results)


def test_what_is_hidden_moves_no_scale_and_the_packed_twin_agrees():
    spec = PointSpec.parse("a8")
    scores = torch.randn(2, 3, 4, 4)
    visible = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    wild = torch.where(visible, scores, 1e6)
    simulated, packed = ScoreQuantizer(spec), PackedScore(spec)
    expected = simulated(scores, visible)
    assert torch.equal(simulated(wild, visible)[visible.expand_as(wild)], expected[visible.expand_as(wild)])
    assert torch.equal(packed(scores, visible), expected)
    assert torch.equal(packed(scores), simulated(scores))
    for quantizer in (simulated, packed):  # adapters train on a packed base
        leaf = scores.clone().requires_grad_()
        quantizer(leaf, visible).sum().backward()
        assert torch.equal(leaf.grad, torch.ones_like(leaf))


def small(points, make=zoo.llama):
    model = make().double()
    prepare(model, Recipe(Scheme.parse("w8a16"), points=Points.of(points)))
    return model


def step_by_step(model, ids):
    cache, logits = None, []
    for position in range(ids.shape[1]):
        result = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        logits.append(result.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def test_with_a_cache_the_logits_are_those_without(monkeypatch):
    """In float64, so that no rounding is decided by the order of a sum."""
    ids = zoo.tokens(11)["input_ids"]
    model = small({"scores": "a4", "kv": "a4", "norm": "a8", "residual": "a8", "gelu": "a8"})
    whole = model(ids, use_cache=False).logits
    assert (step_by_step(model, ids) - whole).abs().max() < 1e-6 * whole.abs().max()
    # the range of a row over what it cannot see yet: the mistake that this notices
    plain = ScoreQuantizer.forward
    monkeypatch.setattr(ScoreQuantizer, "forward", lambda self, x, visible=None: plain(self, x))
    whole = model(ids, use_cache=False).logits
    assert (step_by_step(model, ids) - whole).abs().max() > 1e-3 * whole.abs().max()


@torch.no_grad()
def test_generation_with_a_cache_is_that_without():
    model = small({"scores": "a8", "kv": "a8"})
    ids = zoo.tokens(4)["input_ids"]
    texts = [model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert texts[0].shape[1] > ids.shape[1]
    assert torch.equal(*texts)


def test_another_implementation_is_an_error_not_a_silent_loss():
    model = small({"scores": "a8"})
    model.set_attn_implementation("sdpa")
    with pytest.raises(QuantailorError, match="ran without them"):
        model(**zoo.tokens(5))
    model.set_attn_implementation("quantailor")
    model(**zoo.tokens(5))


def test_a_copy_has_points_of_its_own():
    model = small({"scores": "a8-learned", "norm": "a8-learned", "residual": "a8-learned"})
    twin = copy.deepcopy(model)
    mine = {id(m) for m in model.modules()}
    assert all(id(m) not in mine for m in twin.modules())
    for module in twin.modules():
        if isinstance(module, PointQuantizer):
            module.set_scale(torch.tensor(0.5))
    batch = zoo.tokens(5)
    with torch.no_grad():
        difference = (twin(**batch).logits - model(**batch).logits).abs().max()
    assert difference > 1e-3
