"""Whole files: what is written is read by transformers' own GGUF loader and by ours, to the last bit; or refused."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from quantailor.errors import QualityGateFailed, UsageError
from quantailor.evaluate.parity import differing, digests
from quantailor.formats import folder as folders
from quantailor.formats import gguf
from quantailor.formats.gguf_layers import with_half_scales
from quantailor.formats.gguf_model import read_gguf
from quantailor.formats.gguf_reader import open_gguf
from quantailor.models.loading import load_float
from quantailor.models.prepare import pack_model, prepare
from quantailor.recipe import Keep, Recipe, Rule
from quantailor.spec import Scheme
from tests.formats.gguf_oracle import rule, tiny

pytest.importorskip("gguf", reason="the gguf extra is not installed")

SHARED = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1}
BASE = {**SHARED, **HEADS, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": LlamaConfig(**BASE),
    "llama tied": LlamaConfig(**{**BASE, "tie_word_embeddings": True}),
    "llama wide heads": LlamaConfig(**BASE, head_dim=32, attention_bias=True, mlp_bias=True),
    "llama padded": LlamaConfig(**{**BASE, "intermediate_size": 85}, mlp_bias=True),
    "llama3": LlamaConfig(
        **BASE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama linear": LlamaConfig(**BASE, rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}),
    "qwen2": Qwen2Config(**BASE),
    "qwen3": Qwen3Config(**BASE, head_dim=32),
    "qwen3 of 128": Qwen3Config(**BASE, head_dim=128),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, initializer_range=0.1),
    "gpt2 padded": GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=4, n_positions=64, n_inner=85),
}
PROBE = {"input_ids": torch.arange(48).reshape(2, 24)}


def written(tmp_path, name, scheme, rules=(), **options):
    model, _ = with_half_scales(tiny(CONFIGS[name], scheme, rules))
    path = tmp_path / "model.gguf"
    return model, path, gguf.write(model, path, probe=PROBE, **options)


def logits(model):
    with torch.inference_mode():
        return model(**PROBE).logits


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16", "w4a16-g32-asym"])
@pytest.mark.parametrize("name", CONFIGS)
def test_our_reader_gives_the_same_model(tmp_path, name, scheme):
    model, path, receipt = written(tmp_path, name, scheme)
    again = read_gguf(path)
    assert receipt.integers_equal and receipt.refused is None and receipt.max_scale_difference == 0
    assert receipt.layers == (8 if name.startswith("gpt2") else 14)
    assert differing(digests(model), digests(again.model)) == {}
    assert torch.equal(logits(model), logits(again.model)) and receipt.max_logit_difference == 0
    assert again.tokenizer is None and again.notes == ()
    own, found = model.config.to_dict(), again.model.config.to_dict()
    skipped = {"pad_token_id", "dtype", "initializer_range", "_name_or_path", "quantization_config"}
    skipped |= {k for k in own if "dropout" in k or k.endswith("pdrop") or "summary" in k or "window" in k}
    changed = {k for k in own if own[k] != found.get(k)} - skipped
    assert changed <= {"n_inner", "bos_token_id", "eos_token_id", "architectures"}, changed


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16", "w4a16-g32-asym", None])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("gpt2 padded",)])
def test_transformers_reads_the_same_numbers(tmp_path, name, scheme):
    """An oracle of other hands: names, row order, blocks and config, all read by `gguf_file=`."""
    if name in ("llama linear", "llama3", "llama wide heads", "qwen3"):
        pytest.skip("transformers' GGUF loader knows no scaled rotary embedding, no biases, no wide heads")
    model, path, _ = written(tmp_path, name, scheme)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    if scheme != "w4a16-g32-asym" and name != "llama padded":  # whose offsets are rounded to fp16; mlp_bias unread
        assert torch.allclose(logits(theirs), logits(model), rtol=0, atol=2e-5 * float(logits(model).abs().max()))
    state = theirs.state_dict()
    quantized = 0
    for layer, module in model.named_modules():
        if hasattr(module, "packed"):
            dense = module.packed.dequantize()
            dense = dense.t() if name.startswith("gpt2") else dense
            found = state[f"{layer}.weight"][: dense.shape[0], : dense.shape[1]]
            limit = 0.01 * float(module.packed.scales().max()) if scheme == "w4a16-g32-asym" else 0
            assert float((found - dense).abs().max()) <= limit, layer
            quantized += 1
    assert quantized == (0 if scheme is None else 8 if name == "gpt2" else 14)


def test_float32_scales_are_rounded_and_told(tmp_path):
    model = tiny(CONFIGS["llama"], "w4a16-g32")
    receipt = gguf.write(model, tmp_path / "a.gguf", probe=PROBE)
    assert receipt.integers_equal and 0 < receipt.max_scale_difference <= 2**-11
    assert len(receipt.differences) == 14 and all("fp16" in what for what in receipt.differences.values())
    assert 0 < receipt.max_logit_difference < 2e-3
    assert any("with_half_scales" in note for note in receipt.notes)
    again = digests(read_gguf(tmp_path / "a.gguf").model)
    assert set(differing(digests(model), again).values()) == {"scales"}
    json.dumps(receipt.to_json())


def test_a_quantized_embedding_and_a_tied_head_are_written_once(tmp_path):
    rules = [rule("*embed_tokens", "w8a16-g32"), rule("lm_head", "w8a16-g32")]
    model, path, receipt = written(tmp_path, "llama tied", "w4a16-g32", rules)
    file, again = open_gguf(path), read_gguf(path)
    assert file.tensors["token_embd.weight"].kind == "Q8_0" and "output.weight" not in file.tensors
    assert receipt.layers == 15 and receipt.max_logit_difference == 0
    assert again.model.lm_head.packed is again.model.model.embed_tokens.packed
    assert differing(digests(model), digests(again.model)) == {}


def test_layers_that_are_kept_stay_float_in_their_own_type(tmp_path):
    model = tiny(CONFIGS["llama"]).half()
    prepare(model, Recipe(Scheme.parse("w4a16-g32"), (Rule(Keep("asked"), pattern="*.o_proj"),)))
    pack_model(model)
    gguf.write(model, tmp_path / "a.gguf")
    kinds = {name: info.kind for name, info in open_gguf(tmp_path / "a.gguf").tensors.items()}
    assert kinds["blk.1.attn_output.weight"] == "F16" and kinds["blk.1.attn_q.weight"] == "Q4_0"
    assert kinds["blk.1.attn_norm.weight"] == "F32" and kinds["token_embd.weight"] == "F16"
    again = read_gguf(tmp_path / "a.gguf").model
    assert torch.equal(
        again.model.layers[1].self_attn.o_proj.weight, model.model.layers[1].self_attn.o_proj.weight.float()
    )


def test_a_padded_file_has_only_zeros_more(tmp_path):
    _, path, receipt = written(tmp_path, "llama padded", "w4a16-g32")
    file = open_gguf(path)
    assert file.metadata["llama.feed_forward_length"] == 96 and file.metadata["quantailor.feed_forward_length"] == 85
    assert any("padded to 96 by zeros" in note for note in receipt.notes)
    for name, axis in (("ffn_up", 0), ("ffn_gate", 0), ("ffn_down", 1)):
        values = file.read(f"blk.0.{name}.weight").dequantize()
        rest = values.narrow(axis, 85, 11)
        assert not rest.any() and values.any()
    assert not file.read("blk.0.ffn_up.bias")[85:].any()


@pytest.mark.parametrize(
    ("name", "scheme", "rules", "why"),
    [
        ("llama", "nf4", (), r"model.layers.0.self_attn.q_proj: .*nf4.*w4a16-g32"),
        (
            "llama",
            "w4a16-g32",
            (("*.1.mlp.up_proj", "w2a16-g32-balanced"),),
            r"model.layers.1.mlp.up_proj: .*w2a16-g32",
        ),
        ("llama", "w8a8-static", (), r"q_proj: .*w8a8-static.*ONNX"),
        ("llama", "w4a16-g16", (), r"q_proj: .*w4a16-g16.*w4a16-g32"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_and_leaves_nothing(tmp_path, name, scheme, rules, why):
    model = tiny(CONFIGS[name], scheme, [rule(*r) for r in rules])
    with pytest.raises(UsageError, match=why):
        gguf.write(model, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path):
    model = tiny(LlamaConfig(**{**BASE, "hidden_size": 40}), "w4a16")
    with pytest.raises(UsageError, match=r"q_proj: .*rows of 40 weights"):
        gguf.write(model, tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "window"),
        ("gpt2", {"activation_function": "relu"}, "relu"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, name, change, why):
    model = tiny(CONFIGS[name])
    for key, value in change.items():
        setattr(model.config, key, value)
    with pytest.raises(UsageError, match=why):
        gguf.write(model, tmp_path / "a.gguf")


def test_another_architecture_is_refused(tmp_path, tiny_bert):
    with pytest.raises(UsageError, match="this model is a bert"):
        gguf.write(load_float(tiny_bert).model, tmp_path / "a.gguf")


def test_quantized_inputs_are_said_loudly(tmp_path):
    _, _, receipt = written(tmp_path, "llama", "w8a8")
    assert any("14 layers also quantize their inputs (w8a8), which GGUF cannot say" in note for note in receipt.notes)
    assert receipt.integers_equal and receipt.max_logit_difference > 0


def test_an_existing_file_is_left_alone(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        gguf.write(tiny(CONFIGS["gpt2"]), path)
    assert path.read_text() == "mine"
    gguf.write(tiny(CONFIGS["gpt2"]), path, overwrite=True)
    assert path.read_bytes()[:4] == b"GGUF" and [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
    with pytest.raises(UsageError, match="is a folder"):
        gguf.write(tiny(CONFIGS["gpt2"]), tmp_path)


def test_writing_that_goes_wrong_leaves_nothing(tmp_path, monkeypatch):
    real = gguf.plan

    def off_by_one(*args):
        planned = real(*args)
        target, blocks = next(iter(planned.blocks.items()))

        def other():
            made, rounding = blocks()
            return dataclasses.replace(made, q=made.q.roll(1)), rounding

        planned.blocks[target] = other
        return planned

    monkeypatch.setattr(gguf, "plan", off_by_one)
    with pytest.raises(QualityGateFailed, match="something else than was written"):
        gguf.write(tiny(CONFIGS["llama"], "w4a16-g32"), tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_equal_models_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        gguf.write(tiny(CONFIGS["llama"], "w4a16-g32"), tmp_path / name / "model.gguf")
    assert (tmp_path / "a" / "model.gguf").read_bytes() == (tmp_path / "b" / "model.gguf").read_bytes()


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16"])
def test_a_saved_folder_to_gguf_to_a_saved_folder(tmp_path, tiny_lm, scheme):
    """The whole way round, with tokenizer and probe; the integers of the first folder are those of the last."""
    plain = load_float(tiny_lm)
    prepare(plain.model, Recipe(Scheme.parse(scheme)))
    pack_model(plain.model)
    (tmp_path / "one").mkdir()
    folders.write_folder(tmp_path / "one", plain.model, plain.tokenizer, probe=PROBE)
    receipt = gguf.write(tmp_path / "one", tmp_path / "model.gguf")
    assert receipt.max_logit_difference is not None and receipt.max_logit_difference < 2e-3
    with pytest.raises(UsageError, match="lies inside the input"):
        gguf.write(tmp_path / "one", tmp_path / "one" / "model.gguf")
    held = read_gguf(tmp_path / "model.gguf")
    (tmp_path / "two").mkdir()
    folders.write_folder(tmp_path / "two", held.model, held.tokenizer, probe=PROBE)
    again = folders.read_folder(tmp_path / "two")
    assert set(differing(digests(plain.model), digests(again.model)).values()) == {"scales"}
    assert again.tokenizer("the cat")["input_ids"] == plain.tokenizer("the cat")["input_ids"]
    assert [e.reason for e in again.state.inventory if e.scheme] == ["as in the GGUF file"] * 14


def test_without_the_package_the_way_to_it_is_told(tmp_path):
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from quantailor.formats import gguf\n"
        "try: gguf.write('x', 'y')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.startswith("UsageError") and "quantailor[gguf]" in run.stdout
