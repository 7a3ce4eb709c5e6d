"""Attention scores before softmax are what the model's own queries and keys make."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5EncoderModel,
)

from quantailor.errors import UsageError
from quantailor.models.attention import keeping_scores

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}


def bert(**more):
    config = BertConfig(**SIZES, intermediate_size=48, max_position_embeddings=16, **more)
    return BertForSequenceClassification(config).eval()


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)).eval()


def t5():
    return T5EncoderModel(T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)).eval()


def opt():
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=40,
            ffn_dim=48,
            word_embed_proj_dim=32,
            max_position_embeddings=16,
        )
    ).eval()


def batch():
    ids = torch.randint(3, 40, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_scores_are_query_times_key_over_the_root_of_the_head_size():
    """BERT, by hand from what its own layers put out."""
    model, inputs = bert(), batch()
    made = {}
    for number, layer in enumerate(model.bert.encoder.layer):
        for name in ("query", "key"):
            getattr(layer.attention.self, name).register_forward_hook(
                lambda m, a, y, key=(number, name): made.__setitem__(key, y)
            )
    with torch.no_grad(), keeping_scores(model) as kept:
        model(**inputs)
    assert len(kept.scores) == len(kept.seen) == 2
    for number, found in enumerate(kept.scores):
        q, k = (made[number, name].view(3, 7, 4, 8) for name in ("query", "key"))
        for b in range(3):
            for h in range(4):
                torch.testing.assert_close(found[b, h], q[b, :, h] @ k[b, :, h].t() / 8**0.5)
        assert torch.equal(kept.seen[number][1, 0, 0], inputs["attention_mask"][1].bool())


@pytest.mark.parametrize("make", [bert, llama, opt, t5])
def test_the_model_computes_what_it_did_and_softmax_of_the_scores_is_its_attention(make):
    model, inputs = make(), batch()
    before = model.config._attn_implementation
    with torch.no_grad():
        expected = model(**inputs)[0]
        with keeping_scores(model) as kept:
            found = model(**inputs)[0]
        model.set_attn_implementation("eager")
        probabilities = model(**inputs, output_attentions=True).attentions
        model.set_attn_implementation(before)
    real = inputs["attention_mask"].bool() if found.dim() == 3 else torch.ones(3, dtype=torch.bool)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == before
    for scores, seen, p in zip(kept.scores, kept.seen, probabilities):
        mine = scores.masked_fill(~seen, torch.finfo(torch.float32).min).softmax(-1)
        rows = inputs["attention_mask"].bool()[:, None].expand(3, 4, 7)
        torch.testing.assert_close(mine[rows], p[rows], rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_kept_scores():
    model, inputs = bert(), batch()
    with keeping_scores(model) as kept:
        model(**inputs)
    kept.scores[0].square().mean().backward()
    assert model.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0


class Recurrent(nn.Module):
    """Whatever it does, it asks transformers for no attention."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="eager")

    def forward(self, input_ids, attention_mask):
        return input_ids


def test_a_model_whose_scores_cannot_be_had_says_so():
    model = Recurrent()
    with pytest.raises(UsageError, match="leave attention_weight out"), keeping_scores(model):
        model(**batch())
    assert model.config._attn_implementation == "eager"
