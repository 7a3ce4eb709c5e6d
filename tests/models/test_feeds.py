"""What feeds what, against what the architectures say; and that folding, in any mixture, changes nothing."""

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM

from quantailor.models.feeds import find_feeds, fold, touched
from quantailor.models.prepare import FAKE_QUANT, prepare
from quantailor.models.structure import blocks, modules_of
from quantailor.recipe import Recipe
from quantailor.spec import Scheme
from tests.models import zoo


def gemma():
    """Its norms multiply by 1 + weight."""
    config = GemmaConfig(
        **zoo.TOKENS, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, initializer_range=0.2, hidden_activation="gelu_pytorch_tanh",
    )  # fmt: skip
    return GemmaForCausalLM(config).eval()


def first_block(model, *batches):
    """The first block and its calls, in float."""
    for _, module in modules_of(model, FAKE_QUANT):
        for quantizer in (module.weight_quantizer, module.input_quantizer):
            if quantizer is not None:
                quantizer.enabled = False
    block, calls = blocks(model)[0][1], []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        for batch in batches or [zoo.tokens(9, 5)]:
            model(**batch, **({"use_cache": False} if model.config.model_type != "bert" else {}))
    handle.remove()

    def run(call):
        result = block(*call[0], **call[1])
        return result[0] if isinstance(result, tuple) else result

    return block, [lambda call=call: run(call) for call in calls]


def found(feeds):
    return {feed.source: {consumer.name for consumer in feed.consumers} for feed in feeds}


QKV = {f"self_attn.{n}_proj" for n in "qkv"}
LLAMA = {
    "input_layernorm": QKV,
    "post_attention_layernorm": {"mlp.gate_proj", "mlp.up_proj"},
    "self_attn.v_proj": {"self_attn.o_proj"},
    "mlp.up_proj": {"mlp.down_proj"},
}
EXPECTED = {
    "llama": LLAMA,
    "gemma": LLAMA,
    "qwen3_moe": {
        "input_layernorm": QKV,
        "post_attention_layernorm": {"mlp.gate", "mlp.experts"},
        "self_attn.v_proj": {"self_attn.o_proj"},
    },
    "gpt2": {"ln_1": {"attn.c_attn"}, "ln_2": {"mlp.c_fc"}, "attn.c_attn": {"attn.c_proj"}},
    "bert": {"attention.self.value": {"attention.output.dense"}},
}
# Its experts are layers of their own once it is prepared.
EXPERTS = [f"mlp.experts.{i}" for i in range(4)]
APART = {
    **EXPECTED["qwen3_moe"],
    "post_attention_layernorm": {"mlp.gate", *(f"{e}.{part}" for e in EXPERTS for part in ("gate_proj", "up_proj"))},
    **{f"{e}.up_proj": {f"{e}.down_proj"} for e in EXPERTS},
}
MODELS = {"gemma": gemma, **{name: getattr(zoo, name) for name in EXPECTED if name != "gemma"}}


def perturbed(model):
    """Gains and shifts as training leaves them: not 1 and not 0."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", EXPECTED)
def test_what_feeds_what(name, quantized):
    model = perturbed(MODELS[name]())
    if quantized:  # GPT-2's Conv1D has become a Linear then
        prepare(model, Recipe(Scheme.parse("w8a8")))
    block, runs = first_block(model)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    feeds, refused = find_feeds(block, runs)
    assert found(feeds) == (APART if quantized and name == "qwen3_moe" else EXPECTED[name])
    assert all(feed.offset == (1.0 if name == "gemma" and "norm" in feed.source else 0.0) for feed in feeds)
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items()), "probing left a trace"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in block.modules())
    sources = {n for n, m in block.named_modules() if "weight" in m._parameters and m.weight.dim() < 3}
    assert {r.source for r in refused} | set(found(feeds)) == sources - {"mlp.gate"}  # a router is no linear layer


@torch.no_grad()
@pytest.mark.parametrize("name", EXPECTED)
def test_folding_changes_nothing(name):
    model = perturbed(MODELS[name]())
    if name != "qwen3_moe":
        prepare(model, Recipe(Scheme.parse("w8a8")))
    block, runs = first_block(model, zoo.tokens(9, 5), zoo.tokens(30))
    before = [run() for run in runs]
    for feed in find_feeds(block, runs)[0]:
        weights = [parameter.clone() for parameter in touched(block, feed)]
        fold(block, feed, torch.exp2(6 * torch.rand(len(feed.movable)) - 3))
        assert all(not torch.equal(old, new) for old, new in zip(weights, touched(block, feed)))
    for run, expected in zip(runs, before):
        assert float((run() - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_a_value_channel_reaches_the_columns_of_its_query_heads():
    model = zoo.llama()  # 4 heads on 2 KV heads of 8
    block, runs = first_block(model)
    (feed,) = (f for f in find_feeds(block, runs)[0] if f.source == "self_attn.v_proj")
    expected = [(head // 2) * 8 + within for head in range(4) for within in range(8)]
    assert feed.consumers[0].channel.tolist() == expected
    factor = torch.arange(1.0, 17.0)
    assert feed.spread(factor, feed.consumers[0]).tolist() == [factor[c] for c in expected]


def test_only_the_values_of_a_fused_projection_move():
    block, runs = first_block(zoo.gpt2())
    (feed,) = (f for f in find_feeds(block, runs)[0] if f.source == "attn.c_attn")
    assert feed.movable.tolist() == [False] * 64 + [True] * 32
    assert feed.consumers[0].channel.tolist() == list(range(64, 96))
    before = block.attn.c_attn.weight.clone()  # [N, O]
    fold(block, feed, torch.full((96,), 2.0))
    torch.testing.assert_close(block.attn.c_attn.weight[:, :64], before[:, :64], rtol=0, atol=0)
    torch.testing.assert_close(block.attn.c_attn.weight[:, 64:], before[:, 64:] / 2, rtol=0, atol=0)


class Fused(nn.Module):
    """One product for gate and up, or for queries, keys and values of grouped heads."""

    def __init__(self, rows, mix):
        super().__init__()
        self.both, self.down, self.mix = nn.Linear(12, rows), nn.Linear(8, 4), mix

    def forward(self, x):
        return self.down(self.mix(self.both(x)))


def gated(y):
    gate, up = y.chunk(2, -1)
    return gate.sigmoid() * up


def grouped(y):
    """Two query heads of 4 on one of keys and values."""
    q, k, v = y.split((8, 4, 4), -1)
    heads = [(head @ k.mT).softmax(-1) @ v for head in q.split(4, -1)]
    return torch.cat(heads, -1)


@pytest.mark.parametrize(
    ("rows", "mix", "expected"),
    [(16, gated, list(range(8, 16))), (16, grouped, [12, 13, 14, 15] * 2)],
    ids=["gate_up", "qkv"],
)
def test_fused_projections_of_other_layouts(rows, mix, expected):
    block, x = Fused(rows, mix), torch.randn(9, 12)
    feeds, _ = find_feeds(block, [lambda: block(x)])
    (feed,) = feeds
    assert feed.source == "both" and feed.consumers[0].channel.tolist() == expected
    assert feed.movable.nonzero().flatten().tolist() == sorted(set(expected))


def test_a_norm_on_the_residual_is_refused_by_name():
    block, runs = first_block(zoo.bert())
    refused = {r.source: r for r in find_feeds(block, runs)[1]}
    assert refused["attention.output.LayerNorm"].consumers == ("intermediate.dense",)
    assert "residual" in refused["attention.output.LayerNorm"].reason
    assert refused["intermediate.dense"].reason == "no layer reads its output channel by channel"  # a GELU is between


@pytest.mark.parametrize("tie", [False, True])
def test_a_tied_head_keeps_its_columns(tie):
    model = zoo.llama(tie=tie)
    batch = zoo.tokens(9, 5)
    feeds, refused = find_feeds(model, [lambda: model(**batch, use_cache=False).logits])
    assert ("model.norm" in found(feeds)) == (not tie)
    assert {r.source: r.consumers for r in refused}.get("model.norm") == (("lm_head",) if tie else None)
    assert found(feeds)["model.layers.1.mlp.up_proj"] == {"model.layers.1.mlp.down_proj"}


class Block(nn.Module):
    """x -> norm -> whatever `after` makes of it."""

    def __init__(self, after, **modules):
        super().__init__()
        self.norm, self.after = nn.LayerNorm(12), after
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.after(self, self.norm(x))


def routed(block, x):
    chosen, y = block.gate(x).argmax(-1), torch.zeros_like(x)
    for number, expert in enumerate(block.experts):
        if (chosen == number).any():
            y[chosen == number] = expert(x[chosen == number])
    return x.new_zeros(len(x), 12) + y


def experts(num_rows):
    torch.manual_seed(1)
    block = Block(routed, gate=nn.Linear(12, 3), experts=nn.ModuleList(nn.Linear(12, 12) for _ in range(3)))
    x = torch.randn(num_rows, 12)
    return block, [lambda: block(x)]


def test_experts_behind_a_router_show_once_the_router_is_folded():
    block, runs = experts(50)
    feeds, _ = find_feeds(block, runs)
    assert found(feeds) == {"norm": {"gate", "experts.0", "experts.1", "experts.2"}}


def test_an_expert_that_no_data_reached_is_a_reason_to_refuse():
    block, runs = experts(1)
    feeds, refused = find_feeds(block, runs)
    assert not feeds
    (reason,) = (r.reason for r in refused if r.source == "norm")
    assert "no data reached experts." in reason


def test_batches_are_added_until_every_layer_has_run():
    block, _ = experts(1)
    x = torch.randn(60, 12)
    feeds, _ = find_feeds(block, [lambda i=i: block(x[i : i + 1]) for i in range(60)])
    assert found(feeds) == {"norm": {"gate", "experts.0", "experts.1", "experts.2"}}


@pytest.mark.parametrize("also", [lambda x: x.sum(-1, keepdim=True), lambda x: x.tanh().mean(-1, keepdim=True)])
def test_a_use_that_is_no_layer_is_refused(also):
    block = Block(lambda b, x: b.linear(x) + also(x), linear=nn.Linear(12, 5))
    x = torch.randn(7, 12)
    feeds, refused = find_feeds(block, [lambda: block(x)])
    assert not feeds and refused[0].consumers == ("linear",)


def test_a_small_wrong_is_not_hidden_by_a_large_residual():
    """The norm reaches a tenth of a thousandth of what comes out: less than the tolerance of the whole output."""
    block = Block(lambda b, x: 1e4 + b.linear(x) + x.sum(-1, keepdim=True), linear=nn.Linear(12, 5))
    x = torch.randn(7, 12)
    assert find_feeds(block, [lambda: block(x)])[0] == []


def test_two_layers_that_share_a_weight_are_scaled_once():
    block = Block(lambda b, x: b.one(x) + b.two(x).tanh(), one=nn.Linear(12, 5), two=nn.Linear(12, 5))
    block.two.weight = block.one.weight
    x = torch.randn(7, 12)
    (feed,), _ = find_feeds(block, [lambda: block(x)])
    before, expected = block.one.weight.clone(), block(x)
    fold(block, feed, torch.full((12,), 4.0))
    torch.testing.assert_close(block.one.weight, 4 * before, rtol=0, atol=0)
    torch.testing.assert_close(block(x), expected)


def test_a_channel_that_is_always_zero_follows_its_neighbours():
    block = Block(lambda b, x: b.down(b.up(x).relu()), up=nn.Linear(12, 8), down=nn.Linear(8, 4))
    block.up.bias.data[3] = -100.0
    x = torch.randn(9, 12)
    feeds, _ = find_feeds(block, [lambda: block(x)])  # relu(f x) = f relu(x)
    (feed,) = (f for f in feeds if f.source == "up")
    assert feed.consumers[0].channel.tolist() == list(range(8)) and feed.movable.all()
    block.up.bias.data[3] = 100.0
    expected = block(x)
    fold(block, feed, torch.arange(1.0, 9.0))
    torch.testing.assert_close(block(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_probed_in_float32_and_left_as_it_was(dtype):
    model = perturbed(zoo.llama()).to(dtype)
    block, runs = first_block(model)
    before = {key: (value.data_ptr(), value.clone()) for key, value in block.state_dict().items()}
    feeds, _ = find_feeds(block, runs)
    assert found(feeds) == LLAMA
    for key, value in block.state_dict().items():
        assert value.dtype == dtype and value.data_ptr() == before[key][0] and torch.equal(value, before[key][1])
    expected = runs[0]()
    assert expected.dtype == dtype
    for feed in feeds:  # powers of two round nothing
        fold(block, feed, torch.exp2(torch.randint(-3, 4, (len(feed.movable),)).float()))
    assert torch.equal(runs[0](), expected)
