"""Configs as keys: those that the format's specification asks for, and back."""

import pytest
from transformers import LlamaConfig

from quantailor.errors import UntrustedInput
from quantailor.formats.gguf_metadata import FILE_TYPES, QUANTIZATION_VERSION, ffn_width_of, to_config, to_metadata
from tests.formats.test_gguf import CONFIGS

TENSORS = {"token_embd.weight": (50, 64), "output.weight": (50, 64)}


def test_a_llama_has_the_keys_of_the_specification():
    assert to_metadata(CONFIGS["llama"], 96) == {
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 50,
    }


def test_keys_and_numbers_are_those_of_the_public_package():
    gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
    known = {
        value.replace("{arch}", "llama")
        for part in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
        for name, value in vars(part).items()
        if not name.startswith("_") and isinstance(value, str)
    }
    for name in ("llama", "llama linear"):
        assert set(to_metadata(CONFIGS[name], 96)) <= known
    assert QUANTIZATION_VERSION == gguf.GGML_QUANT_VERSION
    for kind, number in FILE_TYPES.items():
        assert gguf.LlamaFileType(number).name in (f"ALL_{kind}", f"MOSTLY_{kind}")


@pytest.mark.parametrize("name", ["llama", "llama linear", "qwen2", "qwen3", "gpt2"])
def test_a_config_comes_back(name):
    config = CONFIGS[name]
    metadata = to_metadata(config, ffn_width_of(config)) | {"general.architecture": config.model_type}
    again = to_config(metadata, {**TENSORS, "token_embd.weight": (config.vocab_size, 64)})
    for key, value in again.items():
        if key in ("bos_token_id", "eos_token_id", "architectures", "tie_word_embeddings", "n_inner"):
            continue
        own = getattr(config, key)
        assert {**own, **value} == own if isinstance(own, dict) else own == value, key


def test_without_a_head_the_embedding_is_tied():
    metadata = to_metadata(LlamaConfig(), 11008) | {"general.architecture": "llama"}
    assert to_config(metadata, {"token_embd.weight": (9, 4)})["tie_word_embeddings"] is True
    assert to_config(metadata, TENSORS)["tie_word_embeddings"] is False
    with pytest.raises(UntrustedInput, match=r"no matrix token_embd"):
        to_config(metadata, {})
