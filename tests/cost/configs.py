"""Configs of small models, written as folders without weights; and a machine that is not this one."""

from pathlib import Path

from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MobileNetV2Config,
    Qwen3MoeConfig,
)

from quantailor.cost.probe import Sample
from quantailor.cost.throughput import Machine

TOKENS = {"vocab_size": 200, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda layers=2, tie=False: LlamaConfig(
        **TOKENS, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tie, architectures=["LlamaForCausalLM"],
    ),
    "bert": lambda layers=2: BertConfig(
        **TOKENS, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        architectures=["BertForSequenceClassification"],
    ),
    "gpt2": lambda layers=2: GPT2Config(
        **TOKENS, n_embd=32, n_layer=layers, n_head=4, architectures=["GPT2LMHeadModel"]
    ),
    "moe": lambda layers=2: Qwen3MoeConfig(
        **TOKENS, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, head_dim=8,
        architectures=["Qwen3MoeForCausalLM"],
    ),
    "mobilenet": lambda: MobileNetV2Config(
        depth_multiplier=0.35, image_size=32, architectures=["MobileNetV2ForImageClassification"]
    ),
}  # fmt: skip


def folder(place: Path, kind: str, **options) -> Path:
    """A folder with config.json alone."""
    config = CONFIGS[kind](**options)
    config.save_pretrained(place / kind)
    return place / kind


def machine(flops: float = 1e9, moved: float = 1e9, call: float = 0.0, factor: float = 1.0) -> Machine:
    """One that does `flops` and moves `moved` bytes in a second, whatever the operator."""
    table = {Sample("mm", "float32", 10**6): 10**6 / flops, Sample("mm", "bfloat16", 10**6): 10**6 / flops}
    table |= {Sample("mul", "float32", 10**6): 10**6 / moved, Sample("add", "float32", 10**6): 10**6 / moved}
    return Machine(table, call, factor, 0.0, {"device": "a made-up machine", "threads": "1"})
