"""A transformers config as GGUF metadata, and back. What llama.cpp would compute otherwise is refused, by name.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Our own begin with `quantailor.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantailor.errors import UntrustedInput, UsageError
from quantailor.formats.gguf_names import ARCHITECTURES, Architecture

FFN_WIDTH = "quantailor.feed_forward_length"  # the model's own, where that of the file is padded
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
QUANTIZATION_VERSION = 2  # of the block types' meaning, as ggml.h has it

_MAX_LAYERS = 2048
_MAX_SIZE = 2**24  # of a width, a count of heads or a context


def architecture_of(config: Any) -> Architecture:
    """The architecture of a model with this config.

    Raises: UsageError if it is none that is written, or has a part that llama.cpp's code for it has not.
    """
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise UsageError(f"GGUF is written for {', '.join(ARCHITECTURES)}, and this model is a {kind}; save it instead")
    if reason := _unsayable(kind, config):
        raise UsageError(f"GGUF cannot hold this {kind} model: {reason}; save it instead")
    return ARCHITECTURES[kind]


def _unsayable(kind: str, config: Any) -> str | None:
    if kind == "gpt2":
        if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
            return f"activation_function={config.activation_function!r}, and llama.cpp computes gelu_new"
        if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
            return "its attention is scaled in another way than by the root of a head's width"
        return None
    rope = _rope(config)
    if config.hidden_act != "silu":
        return f"hidden_act={config.hidden_act!r}, and llama.cpp computes silu"
    if rope["rope_type"] not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        return f"its rotary embedding is {rope}; default, linear and llama3 can be said"
    if rope["rope_type"] == "llama3" and kind != "llama":
        return f"llama3's rotary embedding in a {kind}"
    if any(layer != "full_attention" for layer in getattr(config, "layer_types", None) or []):
        return "some of its layers attend to a window only"
    if kind == "qwen2" and _head_dim(config) * config.num_attention_heads != config.hidden_size:
        return f"heads of {_head_dim(config)} do not fill its width of {config.hidden_size}"
    return None


def _rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0} | dict(getattr(config, "rope_parameters", None) or {})


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def to_metadata(config: Any, ffn_width: int) -> dict[str, Any]:
    """The `ARCH.*` keys, in order. `ffn_width`: that of the file."""
    arch = config.model_type
    own: dict[str, Any]
    if arch == "gpt2":
        own = {
            "context_length": config.n_positions,
            "embedding_length": config.n_embd,
            "block_count": config.n_layer,
            "feed_forward_length": ffn_width,
            "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
            "vocab_size": config.vocab_size,
        }
        return {f"{arch}.{key}": value for key, value in own.items()}
    rope, head_dim = _rope(config), _head_dim(config)
    own = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": ffn_width,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if rope["rope_type"] == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif rope["rope_type"] == "llama3":  # llama.cpp reads the factors from a tensor; these are for us
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return {f"{arch}.{k}": v for k, v in own.items()} | {f"quantailor.rope.{k}": float(rope[k]) for k in names}
    return {f"{arch}.{key}": value for key, value in own.items()}


def ffn_width_of(config: Any) -> int:
    """Values between the two halves of a block's feed-forward part."""
    if config.model_type == "gpt2":
        return int(config.n_inner or 4 * config.n_embd)
    return int(config.intermediate_size)


def to_config(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What transformers needs to build the model of a file: config.json's keys. `tensors`: name -> shape.

    Nothing is built here; counts are limited, and the caller holds every shape against the model that results.
    Raises: UntrustedInput for an architecture that is not read, or a value that is missing or absurd.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise UntrustedInput(f"its architecture is {str(arch)[:40]!r}; read are {', '.join(ARCHITECTURES)}")
    get = _Values(metadata, arch)
    shape = tensors.get("token_embd.weight", ())
    if len(shape) != 2:
        raise UntrustedInput("it has no matrix token_embd.weight")
    width, layers, heads = get.count("embedding_length"), get.count("block_count", _MAX_LAYERS), get.heads()
    shared: dict[str, Any] = {"model_type": arch, "vocab_size": shape[0], "tie_word_embeddings": True}
    shared["tie_word_embeddings"] = "output.weight" not in tensors
    ids = {f"{name}_token_id": get.token(name, shape[0]) for name in ("bos", "eos")}
    inner = get.count("feed_forward_length")
    if FFN_WIDTH in metadata:
        own = metadata[FFN_WIDTH]
        if type(own) is not int or not inner - 32 < own < inner:
            raise UntrustedInput(f"its {FFN_WIDTH} is {str(own)[:40]}, against a padded one of {inner}")
        inner = own
    if arch == "gpt2":
        return {
            **shared,
            **ids,
            "architectures": ["GPT2LMHeadModel"],
            "n_positions": get.count("context_length"),
            "n_embd": width,
            "n_layer": layers,
            "n_head": heads,
            "n_inner": inner,
            "layer_norm_epsilon": get.real("attention.layer_norm_epsilon"),
        }
    head_dim = get.count("attention.key_length", default=width // heads)
    if get.count("attention.value_length", default=head_dim) != head_dim or head_dim % 2:
        raise UntrustedInput("its keys and values have unequal or odd widths, which the architecture has not")
    if get.count("rope.dimension_count", default=head_dim) != head_dim:
        raise UntrustedInput("it turns only a part of each head, which the architecture does not")
    result = {
        **shared,
        **ids,
        "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[arch] + "ForCausalLM"],
        "max_position_embeddings": get.count("context_length"),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": get.count("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "rms_norm_eps": get.real("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "rope_parameters": _rope_parameters(get, metadata, tensors),
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    if arch == "qwen2":  # whose q, k and v always have a bias
        if result.pop("head_dim") * heads != width:
            raise UntrustedInput(f"its {heads} heads of {head_dim} do not fill its width of {width}")
    else:
        result["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if arch != "llama":
        del result["mlp_bias"]
        result["layer_types"] = ["full_attention"] * layers
    return result


def _rope_parameters(get: _Values, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": get.real("rope.freq_base", default=10000.0)}
    scaling = metadata.get(f"{get.arch}.rope.scaling.type", "none")
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": get.real("rope.scaling.factor")}
    elif scaling != "none":
        raise UntrustedInput(f"its rotary embedding is scaled by {str(scaling)[:40]!r}; none and linear are read")
    if "rope_freqs.weight" in tensors:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        values = {name: metadata.get(f"quantailor.rope.{name}") for name in names}
        if not all(isinstance(v, float) and 0 < v < _MAX_SIZE for v in values.values()):
            raise UntrustedInput("its rotary embedding has factors (rope_freqs.weight) of which no config tells")
        rope |= {"rope_type": "llama3", **values}
        rope["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
    return rope


class _Values:
    """Metadata of one architecture, each value of its type and in its range."""

    def __init__(self, metadata: Mapping[str, Any], arch: str) -> None:
        self.metadata, self.arch = metadata, arch

    def count(self, key: str, limit: int = _MAX_SIZE, default: int | None = None) -> int:
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if type(value) is not int or not 1 <= value <= limit:
            raise UntrustedInput(f"its {self.arch}.{key} is {str(value)[:40]}; a count of 1 to {limit} is due")
        return value

    def heads(self) -> int:
        heads, width = self.count("attention.head_count"), self.count("embedding_length")
        if heads > width:
            raise UntrustedInput(f"its {heads} heads are more than its width of {width}")
        return heads

    def real(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if not isinstance(value, float) or not 0 < value < 1e12:
            raise UntrustedInput(f"its {self.arch}.{key} is {str(value)[:40]}; a positive number is due")
        single = np.float32(value)
        return float(str(single)) if float(single) == value else value  # 1e-6, not 9.999999974752427e-07

    def token(self, name: str, vocab: int) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < vocab:
            raise UntrustedInput(f"its {name}_token_id is {str(value)[:40]}, none of {vocab} tokens")
        return value
