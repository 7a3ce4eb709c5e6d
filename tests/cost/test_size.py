"""What a model weighs, counted by hand."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from quantailor import api
from quantailor.cost.size import bits_per_weight, num_weights, weight_file_bytes
from tests.formats.making import quantized, records, rule, saved


@pytest.fixture(scope="module")
def lm(tiny_lm):
    return api.load(tiny_lm)


# hidden 64, 4 heads on 2 KV heads, ffn 172, 2 layers, 303 tokens
ATTENTION = 64 * 64 * 2 + 64 * 32 * 2
LAYER = ATTENTION + 3 * 64 * 172 + 2 * 64
LLAMA = 2 * LAYER + 64 + 2 * 303 * 64


def test_weights_of_the_tiny_llama_by_hand(lm):
    assert num_weights(lm.model) == LLAMA == sum(p.numel() for p in lm.model.parameters())


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "nf4-dq", "w3a16-asym", "w8a8-static", "w1a1"])
def test_the_number_of_weights_does_not_depend_on_how_they_are_held(lm, tmp_path, scheme):
    simulated = quantized(lm, scheme)
    assert num_weights(simulated.model) == LLAMA, "learned scales are no weights"
    assert num_weights(api.pack(simulated).model) == LLAMA
    assert num_weights(api.load(saved(simulated, tmp_path / "out")).model) == LLAMA


def test_tied_weights_and_shared_modules_count_once(lm):
    tied = copy.deepcopy(lm)
    tied.model.lm_head.weight = tied.model.model.embed_tokens.weight
    assert num_weights(tied.model) == LLAMA - 303 * 64
    rules = [rule("model.embed_tokens", "w8a16"), rule("lm_head", "w8a16")]
    simulated = quantized(tied, "w4a16-g32", rules)
    assert num_weights(simulated.model) == num_weights(api.pack(simulated).model) == LLAMA - 303 * 64

    shared = nn.Linear(3, 4)
    assert num_weights(nn.ModuleList([shared, nn.Sequential(shared)])) == 16


def test_biases_count(tiny_bert):
    bert = api.load(tiny_bert)
    simulated = api.quantize(bert, "w8a8", data=records(8, 1), samples=4)
    expected = sum(p.numel() for p in bert.model.parameters())
    assert num_weights(bert.model) == num_weights(simulated.model) == num_weights(api.pack(simulated).model) == expected


def test_bytes_are_those_of_the_weight_files_alone(tmp_path):
    save_file({"a": torch.zeros(10)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(5)}, tmp_path / "model-00002-of-00002.safetensors")
    expected = sum(path.stat().st_size for path in tmp_path.iterdir())
    save_file({"logits": torch.zeros(99)}, tmp_path / "parity.safetensors")
    (tmp_path / "config.json").write_text("{}")

    assert weight_file_bytes(tmp_path) == expected
    assert bits_per_weight(tmp_path, 15) == 8 * expected / 15
    assert bits_per_weight(tmp_path, 0) == 8 * expected, "an empty model divides by nothing"


@pytest.mark.parametrize(("scheme", "bits"), [("w8a16", 8), ("w4a16-g4", 4 + 32 / 4), ("nf4", 4), ("w2a16", 2)])
def test_bytes_of_a_saved_folder_by_hand(lm, tmp_path, scheme, bits):
    """Integers and scales of the layers, everything else in float32, and a header."""
    folder = saved(quantized(lm, scheme, ragged=scheme != "w4a16-g4"), tmp_path / "out")
    layers = LAYER - 2 * 64
    rest = 4 * (LLAMA - 2 * layers)
    outputs = 64 + 32 + 32 + 64 + 172 + 172 + 64
    scales = {"w8a16": outputs, "w2a16": outputs, "w4a16-g4": 0, "nf4": 64 + 32 + 32 + 64 + 2 * 172 + 64 * 3}[scheme]
    body = rest + 2 * (layers * bits / 8 + 4 * scales)
    words = 2 * 64 * 4  # a row of 172 is rounded up to whole words of 4 bytes

    assert body <= weight_file_bytes(folder) <= body + words + 10_000
