"""Models beside the two tiny ones: tied, in bfloat16, of another architecture."""

import os
from pathlib import Path

import pytest
import torch

from quantailor import api


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Only a power failure can tell."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="session")
def lm(tiny_lm) -> api.Model:
    return api.load(tiny_lm)


@pytest.fixture(scope="session")
def classifier(tiny_bert) -> api.Model:
    return api.load(tiny_bert)


def _llama(folder: Path, tiny_lm: Path, dtype: torch.dtype = torch.float32, **changes) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny_lm, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tied(tmp_path_factory, tiny_lm) -> api.Model:
    """The tiny Llama whose head is its embedding."""
    return api.load(_llama(tmp_path_factory.mktemp("tied"), tiny_lm, tie_word_embeddings=True))


@pytest.fixture(scope="session")
def half(tmp_path_factory, tiny_lm) -> api.Model:
    """The tiny Llama in bfloat16, tied, with biases."""
    folder = tmp_path_factory.mktemp("half")
    return api.load(_llama(folder, tiny_lm, torch.bfloat16, tie_word_embeddings=True, attention_bias=True))


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory, tiny_lm) -> Path:
    """A random GPT-2 (Conv1D, tied head, learned positions): 2 layers, hidden 32, 128 positions."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2(gpt2_folder) -> api.Model:
    return api.load(gpt2_folder)


@pytest.fixture(scope="session")
def saved_as(tmp_path_factory, lm, classifier, tied, half, gpt2):
    """saved_as(model, scheme) -> (simulated model, its folder), each made once. Tests copy what they change."""
    from tests.formats.making import quantized, rule, saved

    sources = {"llama": lm, "bert": classifier, "tied": tied, "half": half, "gpt2": gpt2}
    made: dict[tuple, tuple[api.Model, Path]] = {}

    def make(model: str, scheme: str, *, rules: tuple[tuple[str, str], ...] = (), ragged: bool = True):
        key = model, scheme, rules, ragged
        if key not in made:
            simulated = quantized(sources[model], scheme, [rule(*r) for r in rules], ragged=ragged)
            made[key] = simulated, saved(simulated, tmp_path_factory.mktemp("saved") / "model")
        return made[key]

    return make
