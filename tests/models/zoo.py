"""Tiny models with random weights, one of a kind: what the tests of recipes, modules and PTQ walk over."""

import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 50
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(layers=2, tie=False):
    return LlamaForCausalLM(
        LlamaConfig(
            **TOKENS, hidden_size=32, intermediate_size=44, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=tie,
        )
    ).eval()  # fmt: skip


_BERT = {
    **TOKENS, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip


def bert():
    return BertForSequenceClassification(BertConfig(**_BERT)).eval()


def masked_bert():
    return BertForMaskedLM(BertConfig(**_BERT)).eval()


def albert():
    """One layer that runs three times."""
    return AlbertForSequenceClassification(
        AlbertConfig(**{**_BERT, "num_hidden_layers": 3}, embedding_size=16, num_labels=2)
    ).eval()


def gpt2():
    config = GPT2Config(**TOKENS, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


def t5():
    """An encoder and a decoder: the blocks of one are fed by the other."""
    return T5ForConditionalGeneration(
        T5Config(
            **TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
            tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


def qwen3_moe():
    """Experts as 3-D tensors, which no walk over Linears finds."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **TOKENS, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, head_dim=8,
        )
    ).eval()  # fmt: skip


def mlp():
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.LayerNorm(40), nn.Linear(40, 6, bias=False)).eval()


class CNN(nn.Module):
    """Kernels, strides, padding and groups of every kind, and a head. [B, 3, 12, 12] -> [B, 5]"""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding="valid", groups=8, bias=False)
        self.same = nn.Conv2d(8, 10, (4, 3), padding="same", dilation=(1, 2))
        self.head = nn.Linear(10, 5)

    def forward(self, pixel_values):
        x = self.norm(self.stem(pixel_values)).relu()
        x = self.same(self.depthwise(x)).relu()
        return self.head(x.mean((2, 3)))


def cnn():
    return CNN().eval()


def tokens(*lengths, padded_to=None, side="right"):
    """A batch of random rows of these lengths, padded: {"input_ids", "attention_mask"}."""
    width = padded_to or max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        columns = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, columns] = torch.randint(3, VOCABULARY, (length,))
        mask[row, columns] = 1
    return {"input_ids": ids, "attention_mask": mask}
