"""LLM.int8 does what it is for: a real model with outlier channels planted into it, and what W8A8 then costs.

Three channels of every norm times 50 and their readers' columns divided by 50 are the same function. Inputs get
columns of 80 to 300 beside others of 2 to 9, so one scale a token leaves these some 3 bits. On 40 documents: float
4.967, W8A8 +0.003 before planting and +1.548 after. Of that, +0.238 is the weights' own: a column divided by 50 shares
its row's step with the others, and no treatment of activations can bring that back. LLM.int8 ends at +0.242.
"""

import copy

import pytest
import torch

import quantailor as qt
from quantailor import api


@torch.no_grad()
def planted(model, channels, factor=50.0):
    """The same function with outliers in these channels of each norm's output."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[channels] *= factor
            for reader in readers:
                reader.weight[:, channels] /= factor
    return model


@pytest.fixture(scope="module")
def perplexity(stories260k, data_dir):
    """perplexity(channels, scheme) of the model with outliers planted in these channels, rounded to nearest."""
    source = api.load(stories260k)
    documents = (data_dir / "text" / "tinystories" / "valid.txt").read_text().split("<|endoftext|>")[:6]
    examples = api.examples_for(source, documents, context=256)
    float_model = source.model

    def measure(channels, scheme):
        source.model = planted(float_model, channels)
        model = source if scheme == "float" else api.quantize(source, scheme, method="rtn")
        return qt.eval(model, examples).perplexity

    return measure


def test_llm_int8_closes_what_outliers_cost_activations(perplexity):
    """The default threshold: on this model it takes 3 columns of 64 out, up to 9 before attention."""
    channels = [5, 17, 40]
    exact, weights = (perplexity(channels, scheme) for scheme in ("float", "w8a16"))
    assert exact == pytest.approx(perplexity([], "float"), rel=1e-6)  # planting is no other function
    w8a8, llm_int8 = (perplexity(channels, scheme) for scheme in ("w8a8", "llm.int8"))
    assert w8a8 - exact > 0.5  # outliers do their damage ...
    assert weights - exact < 0.25 * (w8a8 - exact)  # ... and most of it in the activations
    closed = (w8a8 - llm_int8) / (w8a8 - weights)
    assert 0.95 <= closed <= 1.05


def test_it_closes_the_whole_gap_where_weights_lose_nothing(perplexity):
    """Groups of 3 with the planted channels in one: its step shrinks with it, so the weights are as they were."""
    channels = [0, 1, 2]
    assert perplexity(channels, "w8a16-g3") == pytest.approx(perplexity([], "w8a16-g3"), rel=1e-4)
    exact, w8a8, llm_int8 = (perplexity(channels, scheme) for scheme in ("float", "w8a8-g3", "w8a8-g3-outliers"))
    assert w8a8 - exact > 0.5
    assert (w8a8 - llm_int8) / (w8a8 - exact) >= 0.95


def test_scales_a_group_of_inputs_keep_outliers_from_the_others(perplexity):
    """A finer -ag loses less: the step of an outlier is shared by fewer inputs, in the end only by its like."""
    channels = [0, 1, 2]
    schemes = ("w8a16", "w8a8", "w8a8-ag32", "w8a8-ag3")
    weights, token, of_32, of_3 = (perplexity(channels, scheme) for scheme in schemes)
    assert of_3 - weights < 0.05 * (token - weights)
    assert of_3 < of_32 < token
