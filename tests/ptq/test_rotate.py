import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from quantailor import ptq
from quantailor.models.prepare import FAKE_QUANT, prepare
from quantailor.models.structure import modules_of
from quantailor.ptq import rotate
from quantailor.ptq.driver import calibrate, methods_of
from quantailor.ptq.residual_stream import Ends, Unfit, plan_block, plan_model
from quantailor.ptq.rotate import Rotate, rotate_block, rotate_ends
from quantailor.recipe import Recipe, Rule
from quantailor.spec import Scheme
from tests.models import zoo

W4 = Recipe(Scheme.parse("w4a16-g32"), method="rotate+rtn")
SMALL = {
    **zoo.TOKENS, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "initializer_range": 0.2,
}  # fmt: skip


def with_gains(model):
    """Norm weights, embeddings' padding and biases as training leaves them: not ones and zeros."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.4 * torch.randn_like(parameter)
        if name.endswith("bias"):
            parameter.data.normal_()
    return model.eval()


def biased():
    return with_gains(LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)))


def gemma():
    """Gains are 1 + weight, embeddings are scaled, and the head is tied."""
    return with_gains(GemmaForCausalLM(GemmaConfig(**SMALL)))


def qwen3():
    """Queries and keys are normalized in each head, which leaves values alone."""
    return with_gains(Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=True)))


def classifier():
    return with_gains(LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3)))


FIT = {
    "llama": lambda: with_gains(zoo.llama()),
    "llama tied": lambda: with_gains(zoo.llama(tie=True)),
    "biased": biased,
    "gemma": gemma,
    "qwen3": qwen3,
    "classifier": classifier,
}


def asked(model, recipe=W4):
    """The layers of a prepared model as the driver hands them over, in float."""
    state = prepare(model, recipe)
    layers = dict(modules_of(model, FAKE_QUANT))
    for module in layers.values():
        module.weight_quantizer.enabled = False
    return state, layers


def logits(model, batch=None):
    torch.manual_seed(7)
    with torch.no_grad():
        return model(**(batch or zoo.tokens(9, 4))).logits


def weights(model):
    """Of the model itself: quantizers, which `asked` adds, left out."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: p.detach().clone() for name, p in named if "quantizer" not in name}


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("name", FIT)
def test_the_model_computes_the_same_with_other_weights(name, heads):
    model = FIT[name]().double()
    before, old = logits(model), weights(model)
    state, layers = asked(model)
    reports = Rotate(seed=4, heads=heads).on_model(model, layers)
    after = logits(model)
    assert float((after - before).abs().max() / before.abs().max()) < 2e-6  # norms compute in float32
    assert set(reports) == set(layers)
    for layer, report in reports.items():
        lines = report["rotate"]
        assert lines["residual"] == (32 if "llama" in name else 48) and lines["difference"] < 2e-6
        assert lines["seed"] == 4 and "skipped" not in lines
        turned = heads and layer.endswith(("v_proj", "o_proj"))
        assert ("heads" in lines) == turned and (not turned or lines["heads"] == (8 if "llama" in name else 12))
        weight = model.get_submodule(layer).weight
        assert not torch.allclose(weight, old[f"{layer}.weight"], atol=1e-3)
    for norm, p in model.named_parameters():
        if norm.endswith("layernorm.weight") or norm == "model.norm.weight":
            assert bool((p == (0 if name == "gemma" else 1)).all())
    assert all(("shared one weight" in note) == ("rotate" in note) for note in state.notes)


def dense(q):
    return q.matrix()


@pytest.mark.parametrize("chunk", [1, 100, rotate._CHUNK])  # a row at a time, two, and the whole
def test_weights_are_those_of_the_papers(chunk, monkeypatch):
    """QuaRot's folded rotations, SpinQuant's R1 and R2, written with whole matrices."""
    monkeypatch.setattr(rotate, "_CHUNK", chunk)
    model = biased().double()
    old, part = weights(model), Rotate(seed=2)
    _, layers = asked(model)
    part.on_model(model, layers)
    new, q = weights(model), dense(part.residual(48))
    expected = {"model.embed_tokens.weight": old["model.embed_tokens.weight"] @ q}
    expected["lm_head.weight"] = old["lm_head.weight"] @ torch.diag(old["model.norm.weight"]) @ q
    for i in range(3):
        r = dense(part.values(12, i))
        b = f"model.layers.{i}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            gain = torch.diag(old[f"{b}{norm}.weight"])
            for name in readers:
                expected[f"{b}{name}.weight"] = old[f"{b}{name}.weight"] @ gain @ q
                expected[f"{b}{name}.bias"] = old[f"{b}{name}.bias"]
        v, o, down = f"{b}self_attn.v_proj.", f"{b}self_attn.o_proj.", f"{b}mlp.down_proj."
        expected[f"{v}weight"] = torch.kron(torch.eye(2).double(), r).T @ expected[f"{v}weight"]  # 2 heads of values
        expected[f"{v}bias"] = old[f"{v}bias"] @ torch.kron(torch.eye(2).double(), r)
        expected[f"{o}weight"] = q.T @ old[f"{o}weight"] @ torch.kron(torch.eye(4).double(), r)  # read by 4 of queries
        expected[f"{down}weight"] = q.T @ old[f"{down}weight"]
        for name in (o, down):
            expected[f"{name}bias"] = old[f"{name}bias"] @ q
    for name, weight in expected.items():
        assert torch.allclose(new[name], weight, atol=1e-12), name
    assert set(new) - set(expected) == {n for n in new if n.endswith(("layernorm.weight", "norm.weight"))}
    assert not torch.equal(dense(part.values(12, 0)), dense(part.values(12, 1)))


def test_a_tied_head_gets_a_weight_of_its_own_and_the_folder_loads_without_us(tmp_path):
    model = FIT["llama tied"]()
    before = logits(model)
    state, layers = asked(model)
    assert next(e for e in state.inventory if e.name == "lm_head").tied_to == "model.embed_tokens"
    shapes = {name: p.shape for name, p in weights(model).items()}
    Rotate().on_model(model, layers)
    assert model.config.tie_word_embeddings is False and model.lm_head.weight is not model.model.embed_tokens.weight
    assert all(e.tied_to is None for e in state.inventory)
    assert any("shared one weight" in note for note in state.notes)
    assert {name: p.shape for name, p in weights(model).items()} == shapes
    plain = zoo.llama()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    for folder, saved in (("ours", model), ("plain", plain)):
        saved.save_pretrained(tmp_path / folder)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(ours.lm_head.weight, model.lm_head.weight)
    assert torch.equal(ours.model.embed_tokens.weight, model.model.embed_tokens.weight)
    for loaded in (ours, AutoModelForCausalLM.from_pretrained(tmp_path / "plain")):
        assert float((logits(loaded) - before).abs().max() / before.abs().max()) < 1e-5


def test_a_tie_holds_where_the_last_norm_has_no_gain():
    model = FIT["llama tied"]()
    model.model.norm.weight.data.fill_(1.0)
    before = logits(model)
    state, layers = asked(model)
    reports = Rotate().on_model(model, layers)
    assert all("residual" in r["rotate"] for r in reports.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert float((logits(model) - before).abs().max() / before.abs().max()) < 1e-5
    assert not any("shared" in note for note in state.notes)


T5_BATCH = {**zoo.tokens(9, 4), "decoder_input_ids": zoo.tokens(9, 4)["input_ids"]}
UNFIT = {
    "bert": (zoo.bert, "LayerNorm, not an RMSNorm"),
    "gpt2": (zoo.gpt2, "LayerNorm, not an RMSNorm"),
    "albert": (zoo.albert, "do not run once each"),
    "t5": (zoo.t5, "does not run on input_ids alone"),
    "mlp": (zoo.mlp, "no transformers model"),
    "cnn": (zoo.cnn, "no transformers model"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_rotated_is_left_alone_with_its_reason(name):
    make, reason = UNFIT[name]
    model = make()
    state, layers = asked(model)
    old = weights(model)
    reports = Rotate().on_model(model, layers)
    assert set(reports) == set(layers)
    for report in reports.values():
        assert reason in report["rotate"]["skipped"][0] and set(report["rotate"]) == {"skipped"}
    assert all(torch.equal(p, old[n]) for n, p in weights(model).items())
    assert any(reason in note for note in state.notes)


def test_a_router_keeps_the_stream_and_heads_are_turned():
    model = with_gains(zoo.qwen3_moe())
    before = logits(model)
    state, layers = asked(model)  # which takes the experts apart
    old = weights(model)
    reports = Rotate().on_model(model, layers)
    for name, report in reports.items():
        assert "only Linears can be rotated" in report["rotate"]["skipped"][0]  # the router is none
        assert report["rotate"].get("heads") == (8 if name.endswith(("v_proj", "o_proj")) else None)
    changed = {n for n, p in weights(model).items() if not torch.equal(p, old[n])}
    assert changed == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "vo"}
    assert float((logits(model) - before).abs().max() / before.abs().max()) < 1e-5
    assert any("only Linears can be rotated" in note for note in state.notes)


def scales_each_channel(module, args, result):
    """Something that looks at single channels of the stream, which no plan can see."""
    return result * torch.linspace(0.5, 1.5, result.shape[-1])


@pytest.mark.parametrize("place, kept", [("mlp.down_proj", "residual stream"), ("self_attn.v_proj", "heads")])
def test_numbers_decide_and_the_model_is_put_back_bit_by_bit(place, kept):
    model = FIT["llama tied"]()
    model.model.layers[1].get_submodule(place).register_forward_hook(scales_each_channel)
    state, layers = asked(model)
    model.model.layers[1].get_submodule(place).register_forward_hook(scales_each_channel)
    old, before, inventory = weights(model), logits(model), state.inventory
    keys = dict(model.all_tied_weights_keys)
    reports = Rotate().on_model(model, layers)
    for report in reports.values():
        assert f"{kept}: logits on random tokens would move by" in report["rotate"]["skipped"][0]
    new = weights(model)
    if kept == "residual stream":  # all of it is as it was, the tie too; heads are turned
        assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
        assert model.all_tied_weights_keys == keys and state.inventory == inventory
        same = {n for n in new if not n.endswith(("v_proj.weight", "o_proj.weight"))}
    else:  # the stream stays turned, and the heads are what R1 alone makes of them
        again = FIT["llama tied"]()
        again.load_state_dict(old)
        again_state, again_layers = asked(again)
        Rotate(heads=False).on_model(again, again_layers)
        old, same = weights(again), set(new)
        assert any("shared one weight" in note for note in again_state.notes)
    assert all(torch.equal(new[n], old[n]) for n in same)
    assert float((logits(model) - before).abs().max() / before.abs().max()) < 1e-5


def test_a_tied_head_that_is_quantized_with_the_embedding_is_kept():
    model = FIT["llama tied"]()
    rules = tuple(Rule(W4.scheme, pattern=p) for p in ("model.embed_tokens", "lm_head"))
    state, layers = asked(model, Recipe(W4.scheme, rules))
    old = weights(model)
    reports = Rotate(heads=False).on_model(model, layers)
    assert "share one quantized weight" in reports["lm_head"]["rotate"]["skipped"][0]
    assert all(torch.equal(p, old[n]) for n, p in weights(model).items())
    assert any("share one quantized weight" in note for note in state.notes)


def test_block_by_block_is_the_whole_model():
    """As a model that is never whole in memory is rotated: each block from a run of it alone, then the ends."""
    whole, parts, part = FIT["qwen3"](), FIT["qwen3"](), Rotate(seed=9)
    parts.load_state_dict(whole.state_dict())
    _, layers = asked(whole)
    part.on_model(whole, layers)
    q = part.residual(48)
    h = torch.randn(2, 6, 48)
    positions = torch.arange(6)[None]
    rotary = parts.model.rotary_emb(h, positions)
    with torch.no_grad():
        for index, block in enumerate(parts.model.layers):

            def run(x, block=block):
                result = block(x, position_embeddings=rotary, position_ids=positions, attention_mask=None)
                return result[0] if isinstance(result, tuple) else result

            expected = q.rotated(run(h))
            plan = plan_block(block, lambda run=run: run(h))
            rotate_block(block, plan, q, lambda size, index=index: part.values(size, index))
            found = run(q.rotated(h))
            assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
        parts.lm_head.weight = torch.nn.Parameter(parts.lm_head.weight.clone())  # untied, as the whole one was
        rotate_ends(parts, Ends(("model.embed_tokens",), "model.norm", ("lm_head",)), q)
    new = weights(parts)
    assert all(torch.equal(p, new[n]) for n, p in weights(whole).items() if n in new)
    assert len(new) == len(weights(copy.deepcopy(FIT["qwen3"]())))


def test_plans_name_what_reads_and_writes_the_stream():
    model = FIT["qwen3"]()
    plans, ends, width = plan_model(model, lambda: model(**zoo.tokens(5, 5)))
    attention, mlp = "self_attn.", "mlp."
    for plan in plans:
        assert plan.norms == {
            "input_layernorm": (f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj"),
            "post_attention_layernorm": (f"{mlp}gate_proj", f"{mlp}up_proj"),
        }
        assert plan.writers == (f"{attention}o_proj", f"{mlp}down_proj")
        assert plan.values == ((f"{attention}v_proj", f"{attention}o_proj", 12),)
    assert len(plans) == 3 and width == 48
    assert ends == Ends(("model.embed_tokens",), "model.norm", ("lm_head",))


def test_weights_that_two_blocks_share_are_refused():
    model = FIT["llama"]()
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(Unfit, match=r"layers\.0\.mlp\.down_proj and .*layers\.1\.mlp\.down_proj share one weight"):
        plan_model(model, lambda: model(**zoo.tokens(5)))


def test_an_outlier_channel_is_spread():
    """What rotation is for: one channel of the stream a hundred times the others needs the whole range of each row."""
    model = FIT["llama"]()
    for block in model.model.layers:
        block.input_layernorm.weight.data[5] = 0.01
        block.self_attn.q_proj.weight.data[:, 5] *= 100
    _, layers = asked(model)
    heavy = [m.weight.detach() for n, m in layers.items() if n.endswith("q_proj")]

    def peak(weight):
        return float((weight.abs().amax(1) / weight.square().mean(1).sqrt()).mean())

    assert all(peak(w) > 4.5 for w in heavy)  # sqrt(32) = 5.7 where one entry is all of a row
    Rotate().on_model(model, layers)
    assert all(peak(w) < 3.2 for w in heavy)


def test_bfloat16_is_rotated_within_its_own_rounding():
    model = FIT["biased"]().bfloat16()
    before = logits(model).float()
    _, layers = asked(model)
    reports = Rotate().on_model(model, layers)
    assert all(1e-5 < r["rotate"]["difference"] < 0.1 for r in reports.values())
    assert float((logits(model).float() - before).abs().max() / before.abs().max()) < 0.1
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_the_driver_rotates_before_it_measures():
    model, rotated = FIT["llama tied"](), FIT["llama tied"]()
    rotated.load_state_dict(model.state_dict())
    _, layers = asked(rotated)
    ptq.METHODS["rotate"].on_model(rotated, layers)
    state = prepare(model, W4)
    calibrate(model, [zoo.tokens(9, 4), zoo.tokens(6)], methods_of(state, "rotate+rtn"))
    assert torch.equal(model.lm_head.weight, rotated.lm_head.weight)
    assert set(state.layers) == set(layers)
    for name, report in state.layers.items():
        assert report["method"] == "rtn" and report["rotate"]["residual"] == 32
        quantizer = model.get_submodule(name).weight_quantizer  # its scale was found for the turned weight
        nearest = quantizer.integers(rotated.get_submodule(name).weight)
        assert torch.equal(quantizer.integers(model.get_submodule(name).weight), nearest)
