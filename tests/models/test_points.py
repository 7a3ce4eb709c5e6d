"""Where points are, and that each is where the slow computation of a block has it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, GptOssConfig, GptOssForCausalLM

from quantailor.errors import UsageError
from quantailor.models.points import find_points, points_of
from quantailor.models.prepare import planned, prepare
from quantailor.models.structure import blocks
from quantailor.points import Points
from quantailor.recipe import Recipe
from quantailor.spec import Scheme
from tests.models import zoo

ALL = ("scores", "norm", "gelu", "residual", "embedding", "output")


def counted(make, names=ALL, block=0):
    inventory = planned(make(), Recipe(Scheme.parse("w8a8"), points=Points.of(dict.fromkeys(names, "a8")))).inventory
    found: dict[str, int] = {}
    for entry in inventory.points:
        if entry.spec is not None and entry.block == block:
            found[entry.point] = found.get(entry.point, 0) + 1
    return found


@pytest.mark.parametrize(
    ("make", "extra", "expected"),
    [
        (zoo.bert, (), {"scores": 1, "norm": 2, "gelu": 1, "residual": 2, "output": 6}),
        (zoo.llama, ("kv",), {"scores": 1, "kv": 2, "norm": 2, "gelu": 1, "residual": 2, "output": 7}),
        (zoo.gpt2, ("kv",), {"scores": 1, "kv": 2, "norm": 2, "gelu": 1, "residual": 2, "output": 4}),
        (zoo.qwen3_moe, ("kv",), {"scores": 1, "kv": 2, "norm": 4, "gelu": 1, "residual": 2, "output": 4}),
        (zoo.t5, (), {"scores": 1, "norm": 2, "gelu": 1, "residual": 2, "output": 6}),
    ],
)
def test_points_of_a_block(make, extra, expected):
    assert counted(make, (*ALL, *extra)) == expected


def test_the_embedding_stage_has_one_point_outside_the_blocks_and_the_decoder_of_t5_its_own():
    assert counted(zoo.llama, block=None) == {"embedding": 1}
    assert counted(zoo.t5, block=None) == {"embedding": 2}


def test_blocks_are_found_whatever_points_are_on():
    """The stage before the blocks may hang its point into the first of them, which is then a subclass."""
    for points in (Points(), Points.of({"embedding": "a8"}), Points.of({"embedding": "a8", "residual": "a8"})):
        model = zoo.bert()
        expected = [name for name, _ in blocks(model)]
        prepare(model, Recipe(Scheme.parse("w8a8"), points=points))
        assert [name for name, _ in blocks(model)] == expected and len(expected) > 1


def test_every_other_point_is_listed_with_its_reason():
    found = planned(zoo.llama(), Recipe(Scheme.parse("w8a8"), points=Points.of({"norm": "a8"}))).inventory.points
    reasons = {(e.point, e.block): e.reason for e in found if e.spec is None}
    assert reasons["residual", 0] == "not asked for: residual=a8 quantizes it"
    assert reasons["probabilities", 1].startswith("softmax stays in float")
    assert reasons["norm", None] == "outside the repeated blocks"
    assert "output head" in reasons["output", None]


def bloom():
    return BloomForCausalLM(BloomConfig(**zoo.TOKENS, hidden_size=32, n_layer=2, n_head=4)).eval()


def gpt_oss():
    """Attention with a sink beside the keys."""
    config = GptOssConfig(
        **zoo.TOKENS, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        nn.init.constant_(layer.self_attn.sinks, 2.0)
    return model


@pytest.mark.parametrize(
    ("make", "name", "says"),
    [
        (zoo.bert, "kv", "keeps no cache.*output=a8"),
        (bloom, "scores", "does not go through transformers' AttentionInterface.*leave it out"),
        (bloom, "kv", "does not go through transformers' AttentionInterface"),
        (gpt_oss, "scores", "leave scores and kv out"),
        (zoo.albert, "embedding", "runs more than once"),
    ],
)
def test_a_point_that_the_model_does_not_have(make, name, says):
    model = make()
    with pytest.raises(UsageError, match=says):
        planned(model, Recipe(Scheme.parse("w8a8"), points=Points.of({name: "a8"})))


class Functional(nn.Module):
    """Blocks that apply everything as functions."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = x * layer["b"](F.gelu(layer["a"](x)))
        return x


@pytest.mark.parametrize("name", ["norm", "gelu", "residual", "embedding"])
def test_a_module_without_it_is_refused_with_a_reason(name):
    model = Functional()
    with pytest.raises(UsageError, match=f"point '{name}'"):
        find_points(model, Points.of({name: "a8"}), (), {"x": torch.randn(2, 3, 8)})


def test_a_module_without_tokens_needs_data():
    with pytest.raises(UsageError, match="give calibration data"):
        find_points(zoo.mlp(), Points.of({"norm": "a8"}), ())


@pytest.mark.parametrize("make", [zoo.bert, zoo.llama])
def test_watching_leaves_the_model_as_it_was(make):
    model = make().train()
    batch = zoo.tokens(6, 4)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    implementation = model.config._attn_implementation
    with torch.no_grad():
        before = model.eval()(**batch).logits
        model.train()
        find_points(model, Points.of({"scores": "a8", "residual": "a8"}), ())
        assert all(m.training for m in model.modules())
        assert model.config._attn_implementation == implementation
        assert [len(m._forward_hooks) for m in model.modules()] == hooks
        assert all("forward" not in m.__dict__ for m in model.modules())
        assert torch.equal(model.eval()(**batch).logits, before)


def fq(x, bits):
    """Each row on its own grid, half to even."""
    largest = x.abs().amax(-1, keepdim=True).float()
    scale = torch.where(largest > 0, largest / ((2**bits - 1) / 2), 1.0)
    q = torch.round(x.float() / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (q * scale).to(x.dtype)


BITS = {"scores": 5, "kv": 4, "norm": 6, "gelu": 5, "residual": 6, "embedding": 5, "output": 7}


def linear(layer, x):
    y = x @ layer.fake_weight().to(x.dtype).T
    return fq(y if layer.bias is None else y + layer.bias, BITS["output"])


def attended(q, k, v, mask, heads):
    """[B, T, heads * D] each; every query by itself."""
    batch, length, _ = q.shape
    width = q.shape[-1] // heads
    context = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            columns = slice(h * width, (h + 1) * width)
            for i in range(length):
                seen = mask[b, i]
                row = (k[b, :, columns] @ q[b, i, columns]) / math.sqrt(width)
                row = fq(row[seen][None], BITS["scores"])[0]
                context[b, i, columns] = torch.softmax(row, -1) @ v[b, seen][:, columns]
    return context


def bert_block(layer, x, mask):
    own, out = layer.attention.self, layer.attention.output
    x = fq(x, BITS["embedding"])
    q, k, v = (linear(m, x) for m in (own.query, own.key, own.value))
    y = fq(linear(out.dense, attended(q, k, v, mask, own.num_attention_heads)) + x, BITS["residual"])
    y = fq(out.LayerNorm.forward(y), BITS["norm"])
    inner = fq(F.gelu(linear(layer.intermediate.dense, y)), BITS["gelu"])
    z = fq(linear(layer.output.dense, inner) + y, BITS["residual"])
    return fq(layer.output.LayerNorm.forward(z), BITS["norm"])


def rotated(x, heads, theta=10000.0):
    """Rotary positions of [B, T, heads * D], pair by pair."""
    batch, length, width = x.shape[0], x.shape[1], x.shape[2] // heads
    x = x.view(batch, length, heads, width)
    out = torch.zeros_like(x)
    for t in range(length):
        for d in range(width // 2):
            angle = torch.tensor(t * theta ** (-2 * d / width), dtype=torch.float32)
            c, s = angle.cos(), angle.sin()
            a, b = x[:, t, :, d], x[:, t, :, d + width // 2]
            out[:, t, :, d], out[:, t, :, d + width // 2] = a * c - b * s, b * c + a * s
    return out


def llama_block(layer, x, mask):
    own, mlp = layer.self_attn, layer.mlp
    heads, groups = own.config.num_attention_heads, own.num_key_value_groups
    x = fq(x, BITS["embedding"])
    y = fq(layer.input_layernorm.forward(x), BITS["norm"])
    q = rotated(linear(own.q_proj, y), heads).flatten(2)
    k = fq(rotated(linear(own.k_proj, y), heads // groups), BITS["kv"])  # [B, T, heads, D]: a scale a token and head
    v = fq(linear(own.v_proj, y).unflatten(-1, (heads // groups, -1)), BITS["kv"])
    k, v = (torch.stack([t[:, :, h // groups] for h in range(heads)], 2).flatten(2) for t in (k, v))
    x = fq(x + linear(own.o_proj, attended(q, k, v, mask, heads)), BITS["residual"])
    y = fq(layer.post_attention_layernorm.forward(x), BITS["norm"])
    inner = fq(F.silu(linear(mlp.gate_proj, y)), BITS["gelu"]) * linear(mlp.up_proj, y)
    return fq(x + linear(mlp.down_proj, inner), BITS["residual"])


@pytest.mark.parametrize("make", [zoo.bert, zoo.llama])
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_a_block_with_every_point_is_the_slow_computation(make, side):
    """In float64, so that no rounding is decided by the order of a sum. Each class of points shows in the output."""
    model = make().double()
    is_bert = make is zoo.bert
    names = [n for n in BITS if not (is_bert and n == "kv")]
    points = Points.of({n: f"a{BITS[n]}" for n in names})
    prepare(model, Recipe(Scheme.parse("w8a16"), points=points))
    layer = model.bert.encoder.layer[0] if is_bert else model.model.layers[0]
    kept = {}

    def hook(_module, args, _kwargs, output):
        kept["in"], kept["out"] = args[0], output[0] if isinstance(output, tuple) else output

    layer.register_forward_hook(hook, with_kwargs=True)
    batch = zoo.tokens(7, 7) if not is_bert and side == "left" else zoo.tokens(7, 4, side=side)
    model(**batch, **({} if is_bert else {"position_ids": torch.arange(7)[None].expand(2, -1)}))
    length, rows = 7, batch["attention_mask"].bool()
    mask = rows[:, None, :].expand(-1, length, -1)
    if not is_bert:
        mask = mask & torch.ones(length, length, dtype=torch.bool).tril()
    slow = {True: bert_block, False: llama_block}[is_bert]
    expected = slow(layer, kept["in"], mask)
    scale = expected.abs().max()
    assert (kept["out"] - expected)[rows].abs().max() < 1e-6 * scale
    for name in names:
        before, BITS[name] = BITS[name], 8
        try:
            other = slow(layer, kept["in"], mask)
        finally:
            BITS[name] = before
        assert (kept["out"] - other)[rows].abs().max() > 1e-4 * scale, name


def test_gradients_reach_learned_scales_as_lsq_has_them():
    """d x_hat / d log_scale = scale * (round(v) - v, or the level where v is clipped), times g = 1 / sqrt(n * qmax)."""
    model = zoo.bert()
    names = ("scores", "norm", "gelu", "residual", "embedding")
    prepare(model, Recipe(Scheme.parse("w8a16"), points=Points.of(dict.fromkeys(names, "a4-learned"))))
    points = points_of(model)
    assert len(points) == 13
    seen, grads = {}, {}

    def hook(name):
        def keep(_module, args, output):
            seen[name] = args[0].detach()
            output.register_hook(lambda g: grads.__setitem__(name, g))

        return keep

    for name, point in points:
        point.set_scale(torch.tensor(0.3))
        point.register_forward_hook(hook(name))
    logits = model(**zoo.tokens(6, 4)).logits
    (logits * torch.randn_like(logits)).sum().backward()
    for name, point in points:
        x, n = seen[name], seen[name].shape[-1]
        v = x / 0.3
        inside = (v > -8) & (v < 7)
        step = torch.where(inside, torch.round(v) - v, v.clamp(-8, 7))
        expected = (grads[name] * step).sum() * 0.3 / math.sqrt(n * 7)
        assert point.log_scale.grad is not None, name
        assert torch.allclose(point.log_scale.grad, expected.reshape(1), rtol=2e-3, atol=1e-6), name
        assert expected != 0, name
