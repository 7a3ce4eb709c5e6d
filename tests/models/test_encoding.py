"""Encoder blocks that stay in integers: the proven answer, with padding and without, or their own way with a reason."""

import gc
import weakref

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from quantailor.kernels import panels, tiles
from quantailor.kernels.native import library as native
from quantailor.kernels.ops import IntegerInput, IntegerWeight, float_matmul, int_linear
from quantailor.models import encoding
from quantailor.models.prepare import pack_model, prepare
from quantailor.models.serving import choices, serving
from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.verbs.quantizing import recipe_for
from tests.models import zoo

_COMMON = {"vocab_size": 50, "pad_token_id": 0, "max_position_embeddings": 80, "initializer_range": 0.2}
MODELS = {
    "bert": zoo.bert,
    "relu": lambda: BertForSequenceClassification(BertConfig(**{**zoo._BERT, "hidden_act": "relu"})),
    "roberta": lambda: RobertaForSequenceClassification(
        RobertaConfig(
            **_COMMON, hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        )
    ),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(**_COMMON, dim=32, hidden_dim=72, n_layers=2, n_heads=4)
    ),
}  # fmt: skip

needs_blocks = pytest.mark.skipif(bool(panels.why_not()), reason=panels.why_not() or "there is a kernel")
WAYS = {"panels": False, "the machine's own": True}  # whether the processor has an instruction for int8 products


def packed(model, scheme="w8a8-static-minmax"):
    """Scales that differ from layer to layer, q, k and v among them, as trained ones do."""
    torch.manual_seed(0)
    prepare(model, recipe_for(scheme, method="rtn"))
    for module in model.modules():
        if isinstance(module, ActivationQuantizer) and not module.spec.dynamic:
            module.set_scale(torch.rand(1) * 0.01 + 0.03)
    pack_model(model)
    return model.eval()


def logits(model, *inputs):
    with torch.inference_mode(), serving(model):
        return [model(**one).logits for one in inputs]


@needs_blocks
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static-minmax"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_proven_answer(kind, scheme, way, monkeypatch):
    """Row by row the same to the last bits, but where these decided a rounding: one step of one input of 32 is then
    seen in the logits. A token's own scale puts negative extremes on such a tie, -127.5: it happens to whole rows."""
    monkeypatch.setattr(encoding, "_AT_ONCE", 50)  # several runs of rows
    monkeypatch.setattr(encoding, "multiplies_int8", lambda: WAYS[way])
    model = packed(MODELS[kind](), scheme)
    for inputs in (zoo.tokens(20, 7, 13, 20, 1), zoo.tokens(*[20] * 8), zoo.tokens(5)):
        with torch.inference_mode():
            expected = model(**inputs).logits
            with serving(model) as told:
                found = model(**inputs).logits
            again = model(**inputs).logits
        off = (found - expected).abs().amax(1) / expected.abs().max()
        assert (off <= 1e-5).float().mean() >= 0.5 and off.max() <= 2e-2
        assert torch.equal(again, expected)
    assert [c.few_rows for c in told] == ["encoder block"] and sum(c.layers for c in told) == 12


@needs_blocks
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static-minmax"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_product_gives_the_same_bits(kind, scheme, monkeypatch):
    model, inputs = packed(MODELS[kind](), scheme), (zoo.tokens(20, 7, 13), zoo.tokens(5))
    found = []
    for has_instruction in WAYS.values():
        monkeypatch.setattr(encoding, "multiplies_int8", lambda has=has_instruction: has)
        found.append(logits(model, *inputs))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@needs_blocks
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static-minmax"])
def test_a_weight_is_put_into_tiles_once_and_let_go(scheme, monkeypatch):
    """Without AMX a stand-in with exact float sums; with it the tiles themselves."""
    model, inputs = packed(zoo.bert(), scheme), (zoo.tokens(20, 7, 13), zoo.tokens(9, 20))
    monkeypatch.setattr(encoding, "multiplies_int8", lambda: False)
    expected = logits(model, *inputs)
    held, pack = [], tiles.pack_tiles if native.has_tiles() else lambda w_q, depth: w_q.clone()

    def counted(w_q, depth):
        made = pack(w_q, depth)
        held.append(weakref.ref(made))
        return made

    def stand_in(x_q, x_scale, w_q, w_scale, shift, size, bias, in_bf16, tiles=None, out=None):
        weight = IntegerWeight(w_q if tiles is None else tiles, w_scale, shift, size)
        y = int_linear(IntegerInput(x_q, x_scale.reshape(-1, 1)), weight, bias, matmul=float_matmul)
        return y if out is None else out.copy_(y)

    monkeypatch.setattr(encoding, "multiplies_int8", lambda: True)
    monkeypatch.setattr(tiles, "pack_tiles", counted)
    if not native.has_tiles():
        monkeypatch.setattr(tiles, "tile_linear", stand_in)
        monkeypatch.setattr(tiles, "fits", lambda x_q, w_q, size: x_q.shape[0] >= 8)
    choices(model)
    assert not held  # looking at a model takes no memory
    with torch.inference_mode(), serving(model):
        before = len(held)  # the proof of each block has called it, and its own forward, which packs for a call
        found = [model(**one).logits for one in inputs]
        assert len(held) == before and sum(one() is not None for one in held) == 12
    gc.collect()
    assert all(one() is None for one in held)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@needs_blocks
def test_padding_is_not_looked_at():
    model = packed(zoo.bert())
    inputs = zoo.tokens(20, 6)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][1, 6:] = 9
    with torch.inference_mode(), serving(model):
        assert torch.equal(model(**inputs).logits, model(**changed).logits)


@needs_blocks
def test_recorded_attention_and_gradients_go_the_blocks_own_way():
    model = packed(zoo.bert())
    model.set_attn_implementation("eager")
    inputs = zoo.tokens(9, 4)
    with torch.inference_mode():
        expected = model(**inputs, output_attentions=True)
        with serving(model):
            found = model(**inputs, output_attentions=True)
    assert torch.equal(found.logits, expected.logits) and len(found.attentions) == 2
    x = torch.randn(1, 4, 32, requires_grad=True)
    with serving(model):
        model.bert.encoder.layer[0](x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@needs_blocks
def test_what_is_not_such_a_block_says_why():
    reasons = {
        "its activation function has no kernel": BertForSequenceClassification(
            BertConfig(**{**zoo._BERT, "hidden_act": "quick_gelu"})
        ),
        "its parts are not those of a BERT-like block": zoo.gpt2(),
    }
    for reason, model in reasons.items():
        packed(model, "w8a8")
        with serving(model) as told:
            assert all(c.few_rows == "integer product" and reason in c.why for c in told)


@needs_blocks
def test_a_block_whose_answer_differs_keeps_its_own_forward():
    model = packed(zoo.bert())
    own = model.bert.encoder.layer[1].output.forward
    model.bert.encoder.layer[1].output.forward = lambda *args: 1.01 * own(*args)
    with serving(model) as told:
        found = {c.few_rows: c.why for c in told}
    assert set(found) == {"encoder block", "integer product"}
    assert "its fast form is off by" in found["integer product"]


def test_without_native_code_it_says_so_and_runs(monkeypatch):
    model = packed(zoo.bert())
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "has_tiles", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "QUANTAILOR_NATIVE=0 switches our own kernels off")
    inputs = zoo.tokens(9, 4)
    with torch.inference_mode():
        expected = model(**inputs).logits
        with serving(model) as told:
            assert torch.equal(model(**inputs).logits, expected)
    assert all("QUANTAILOR_NATIVE=0" in c.why and c.few_rows == "integer product" for c in [*told, *choices(model)])
