"""Blocks by one native call: which are taken, that they answer as the model does, and what is said of the others."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, StaticCache

from quantailor import api
from quantailor.errors import UsageError
from quantailor.kernels import decode
from quantailor.kernels.native import library as native
from quantailor.models import decoding
from quantailor.models.cache import int8_cache
from quantailor.models.decoding import Blocks, FastBlock
from quantailor.models.generation import continued, decoder_of
from quantailor.models.prepare import pack_model, prepare
from quantailor.models.serving import serving
from quantailor.models.structure import blocks
from quantailor.recipe import Recipe
from quantailor.spec import Scheme
from tests.formats.making import texts

needs_kernel = pytest.mark.skipif(
    native.library() is None or not decode.has_kernel(), reason="no compiler, or no AVX2: there is no kernel to test"
)
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1, "pad_token_id": 0}
CONFIGS = [LlamaConfig(**SIZES), MistralConfig(**SIZES, sliding_window=None), Qwen2Config(**SIZES)]
CONFIGS += [Qwen3Config(**SIZES, head_dim=16), LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)]


def packed_model(config, scheme="w4a16-g32"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    prepare(model, Recipe(Scheme.parse(scheme), (), "rtn"))
    pack_model(model)
    return model


def answers(model, cache=None, tokens=6):
    """Logits of a prompt and some tokens behind it, one at a time."""
    cache = cache or StaticCache(config=model.config, max_cache_len=24)
    found = [model(input_ids=torch.arange(5, 14)[None], past_key_values=cache).logits[0, -1]]
    found += [model(input_ids=torch.tensor([[7 * n]]), past_key_values=cache).logits[0, -1] for n in range(tokens)]
    return torch.stack(found)


@needs_kernel
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_it_answers_as_the_model_does(config):
    model = packed_model(config)
    with torch.inference_mode():
        expected = answers(model)
        with serving(model):
            assert all(isinstance(block.forward, FastBlock) for _, block in blocks(model))
            assert (answers(model) - expected).abs().max() <= 1e-3 * expected.abs().max()
            decoder, why = decoder_of(model)
            ids = continued(model, torch.arange(5, 14)[None], 12, decoder=decoder, ends=False)
        assert why == "" and decoder is not None
        assert torch.equal(ids, continued(model, torch.arange(5, 14)[None], 12, ends=False))
        assert torch.equal(answers(model), expected)  # nothing is left of it


@needs_kernel
def test_eight_bits_of_cache():
    model = packed_model(CONFIGS[0])
    with torch.inference_mode():
        floats, expected = answers(model), answers(model, int8_cache(model.config, 24))
        with serving(model):
            found = answers(model, int8_cache(model.config, 24))
            decoder, _ = decoder_of(model)
            ids = continued(model, torch.arange(5, 14)[None], 12, decoder=decoder, ends=False, cache_bits=8)
        assert torch.equal(ids, continued(model, torch.arange(5, 14)[None], 12, ends=False, cache_bits=8))
    assert (found - expected).abs().max() <= 5e-3 * expected.abs().max()  # now and then a value is rounded otherwise
    assert 0 < (expected - floats).abs().max() <= 3e-2 * floats.abs().max()
    with pytest.raises(UsageError, match="cache_bits=4"):
        continued(model, torch.arange(5, 14)[None], 2, cache_bits=4)


@needs_kernel
def test_a_text_ends_where_the_model_says():
    model = packed_model(CONFIGS[0])
    prompt = torch.arange(5, 14)[None]
    with torch.inference_mode(), serving(model):
        decoder, _ = decoder_of(model)
        whole = continued(model, prompt, 12, decoder=decoder, ends=False)
        model.generation_config.eos_token_id = [int(whole[0, 14]), 299]
        ended = continued(model, prompt, 12, decoder=decoder)
        assert ended.shape[1] <= 15 and torch.equal(ended, whole[:, : ended.shape[1]])
        assert torch.equal(ended, continued(model, prompt, 12))


@needs_kernel
def test_what_a_generation_config_asks_for_is_not_left_out():
    model = packed_model(CONFIGS[0])
    model.generation_config.repetition_penalty = 1.3
    with serving(model):
        assert decoder_of(model) == (None, "its generation config has repetition_penalty")


def _other_attention(model):
    model.config._attn_implementation = "eager"


def _hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def _lying(model):
    model.model.layers[1].input_layernorm.forward = lambda x: x * 2


def _own_act(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Tanh()


@needs_kernel
@pytest.mark.parametrize(
    ("change", "taken", "why"),
    [(_other_attention, 0, "not transformers' sdpa"), (_hooked, 1, "hooks hang"), (_lying, 1, "do not agree"),
     (_own_act, 0, "neither SiLU nor GELU")],
)  # fmt: skip
def test_other_blocks_keep_their_own_forward(change, taken, why):
    model = packed_model(CONFIGS[0])
    change(model)
    with torch.inference_mode():
        expected = answers(model)
        with serving(model):
            decoding.remove(model)
            found = decoding.install(model)
            assert (found.taken, found.total) == (taken, 2) and why in found.why
            assert decoder_of(model)[0] is None
            assert (answers(model) - expected).abs().max() <= 1e-3 * expected.abs().max()


@needs_kernel
@pytest.mark.parametrize(
    ("scheme", "why"), [("w4a8-g32", "activations are quantized"), ("w5a16-g32", "no kernel here")]
)
def test_layers_without_a_kernel(scheme, why):
    model = packed_model(CONFIGS[0], scheme)
    with serving(model):
        assert why in decoding.install(model).why


def test_without_native_code_nothing_is_taken(monkeypatch):
    model = packed_model(CONFIGS[0])
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "why_not", lambda: "no C compiler was found")
    with serving(model):
        assert decoding.install(model) == Blocks(0, 2, "no C compiler was found")


@needs_kernel
def test_serving_within_serving_takes_nothing_away():
    model = packed_model(CONFIGS[0])
    with torch.inference_mode(), serving(model):
        first = [block.forward for _, block in blocks(model)]
        with serving(model):
            pass
        assert [block.forward for _, block in blocks(model)] == first and decoder_of(model)[0] is not None
    assert not any("forward" in vars(block) for _, block in blocks(model))


@needs_kernel
def test_layers_of_other_kinds_or_elsewhere_are_named():
    model = packed_model(CONFIGS[0])
    with serving(model):
        model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 96, dtype=torch.bfloat16)
        model.model.layers[1].self_attn.q_proj = torch.nn.Identity()
        decoding.remove(model)
        assert decoding.install(model) == Blocks(0, 2, "a layer of its blocks is in torch.bfloat16 on cpu")
        model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 96, device="meta")
        assert decoding.install(model).why == "a layer of its blocks is in torch.float32 on meta"
        model.model.layers[0].mlp.up_proj = torch.nn.Identity()
        assert decoding.install(model).why == "a layer of its blocks is a Identity"


def test_a_model_built_otherwise():
    from transformers import GPT2Config

    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50)).eval()
    assert decoding.install(model) == Blocks(0, 2, "its blocks are not built like Llama's")


def test_generate_tells_what_runs(tiny_lm):
    model = api.pack(api.quantize(tiny_lm, "w4a16-g32", data=texts(8, seed=1), samples=4, context=32, method="rtn"))
    notes: list[str] = []
    for bits in (None, 8):
        text = api.generate(model, "ab", max_new_tokens=6, fast=True, cache_bits=bits, on_note=notes.append)
        assert text.startswith("ab")
    native_here = native.library() is not None and decode.has_kernel()
    told = "one native call a block and token" if native_here else "through transformers' own loop"
    assert len(notes) == 2 and all(note.startswith("warmed up in") and told in note for note in notes)


def test_transformers_does_not_compile_by_itself(tiny_lm, monkeypatch):
    """As it does on a GPU where the cache is laid out: compiled layers are not what serves."""
    given, model = [], api.load(tiny_lm).model
    run = model.generate
    monkeypatch.setattr(model, "generate", lambda **more: given.append(more) or run(**more))
    assert continued(model, torch.tensor([[3, 4]]), 2).shape == (1, 4)
    assert given[0]["disable_compile"] is True and given[0]["cache_implementation"] == "static"


@needs_kernel
def test_blocks_that_are_not_on_a_cpu_keep_their_own_forward(monkeypatch):
    """Their layers may have a kernel of their own there (kernels/triton); native code must get no pointer to them."""
    monkeypatch.setattr(decode, "why_not", lambda *_: "")
    model = packed_model(CONFIGS[0]).to("meta")
    ((_, block), *_) = blocks(model)
    with pytest.raises(decoding.NotNative, match="native blocks run on a CPU"):
        decoding.native_block(block, model)
