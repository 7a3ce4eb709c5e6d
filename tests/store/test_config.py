"""config.json: counts in reason, and no code."""

import json

import pytest

from quantailor.errors import UntrustedInput
from quantailor.store.config import read_config

LLAMA = {"model_type": "llama", "num_hidden_layers": 5, "hidden_size": 64, "vocab_size": 512, "num_attention_heads": 8}


def read(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_config(tmp_path / "config.json")


def refused(tmp_path, config) -> str:
    with pytest.raises(UntrustedInput) as error:
        read(tmp_path, config)
    assert error.value.exit_code == 3 and str(error.value).startswith(f"{tmp_path}/config.json ")
    assert str(error.value).isprintable() and "; " in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_hidden_layers": 2048},
        {"n_inner": None, "head_dim": None, "num_key_value_heads": None},
        {
            "intermediate_size": [2048, 4096],
            "depths": [2, 2, 6, 2],
            "num_query_heads": [4, 8],
        },  # Gemma 3n, Swin, OpenELM
        {"mlp_only_layers": [], "max_window_layers": 28, "layer_types": ["full_attention"]},
        {"max_position_embeddings": 10_485_760},
        {"_attn_implementation_autoset": True, "_name_or_path": "org/name", "_commit_hash": "1234"},
        {"attn_implementation": "sdpa", "auto_map": {}, "kernel_size": 3},
        {"id2label": {"0": "depth"}, "label2id": {"depth": 9999, "num_layers": -1}},
        {"time_step_limit": [0.0, float("inf")]},
    ],
)
def test_what_real_models_say_is_fine(tmp_path, more):
    assert read(tmp_path, LLAMA | more) == LLAMA | more


@pytest.mark.parametrize(
    "key",
    [
        *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth"),
        *("num_decoder_layers", "num_nextn_predict_layers", "num_encoder_blocks", "depths"),
    ],
)
def test_layers_are_counted_in_whole_numbers_up_to_2048(tmp_path, key):
    for value in (2049, 1_000_000, 10**30, -1, "5", 1.5, True, [2, 3000]):
        shown = "3000" if isinstance(value, list) else repr(value)
        for config in (LLAMA | {key: value}, LLAMA | {"text_config": {"deeper": [{key: value}]}}):
            told = refused(tmp_path, config)
            assert f"has {key} = {shown}, which must be a whole number from 0 to 2048; use the model's own" in told


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_local_experts", "n_embd", "n_ctx"],
)
def test_other_counts_are_whole_numbers_within_reason(tmp_path, key):
    for value in (-1, "64", 64.0, 10**12, False):
        assert f"has {key} = {value!r}, which must be a whole number from 0 to " in refused(
            tmp_path, LLAMA | {key: value}
        )


@pytest.mark.parametrize(
    "bad, told",
    [
        (
            {"auto_map": {"AutoModel": "evil.Model"}},
            "has auto_map, which runs Python files of the model; remove the key if",
        ),
        ({"auto_map": "evil.Model"}, "has auto_map, which runs Python files"),
        (
            {"_attn_implementation_internal": "evil/kernel"},
            "has _attn_implementation_internal = evil/kernel, which can load",
        ),
        (
            {"_attn_implementation_internal": None},
            "has _attn_implementation_internal = None, which can load code; remove",
        ),
        ({"_attn_implementation": "x"}, "has _attn_implementation = x, which can load code; remove the key"),
        ({"_experts_implementation_internal": {"": "a"}}, "has _experts_implementation_internal = "),
        ({"_kernel": "evil/kernel"}, "has _kernel = evil/kernel, which can load code; remove the key"),
        ({"attn_implementation": "evil/kernel"}, "a kernel to download and run; use eager or sdpa, or remove the key"),
        ({"attn_implementation": "paged|evil/kernel@v1:run"}, "a kernel to download and run; use eager or sdpa"),
        ({"attn_implementation": {"text_config": "evil/kernel"}}, "a kernel to download and run"),
        ({"experts_implementation": "evil/kernel"}, "has experts_implementation = evil/kernel, a kernel to download"),
    ],
)
def test_what_would_load_code_is_refused_wherever_it_stands(tmp_path, bad, told):
    for part in (bad, {"text_config": bad}, {"parts": [[bad]]}):
        assert told in refused(tmp_path, LLAMA | part)


@pytest.mark.parametrize("value, kind", [([], "list"), ("text", "str"), (None, "NoneType"), (1, "int")])
def test_only_an_object_is_a_configuration(tmp_path, value, kind):
    assert f"is a JSON {kind}, not an object; use the model's own config.json" in refused(tmp_path, value)


def test_limits_of_size_and_depth_hold(tmp_path):
    assert "is larger than 10 MB" in refused(tmp_path, {"a": "x" * 10_000_001})
    (tmp_path / "config.json").write_text('{"a":' + "[" * 50_000 + "]" * 50_000 + "}")
    with pytest.raises(UntrustedInput, match="nests deeper than 64 levels"):
        read_config(tmp_path / "config.json")
