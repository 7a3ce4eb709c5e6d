"""llama.cpp itself on what we write, where it is installed: in this Python, or in the one QUANTAILOR_LLAMACPP names.

Its logits on a file in which one early layer is in blocks equal ours, with that layer's input rounded to 8 bits as
llama.cpp does, to float precision: so the integers, scales, rows and names are read as they are meant.
"""

import importlib.util
import os
import sys

import pytest
import torch

from bench import llamacpp_parity as parity
from quantailor.formats import gguf
from quantailor.formats.gguf_layers import with_half_scales
from quantailor.models.loading import load_float
from quantailor.models.prepare import pack_model, prepare
from quantailor.recipe import Recipe
from quantailor.spec import Scheme
from tests.formats.gguf_oracle import rule, tiny
from tests.formats.test_gguf import CONFIGS

pytest.importorskip("gguf", reason="the gguf extra is not installed")
PYTHON = os.environ.get("QUANTAILOR_LLAMACPP") or (sys.executable if importlib.util.find_spec("llama_cpp") else None)
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="llama_cpp is not importable here; set QUANTAILOR_LLAMACPP to a python that has it"
)
ROWS = [list(range(1, 41)), list(range(49, 9, -1))]
PLAIN = ("llama", "llama wide heads", "llama padded", "llama3", "llama linear", "qwen2", "qwen3", "gpt2", "gpt2 padded")


def both(tmp_path, model, tokenizer=None, rows=ROWS, prompts=(), new_tokens=0):
    """(ours, ours with rounded inputs, llama.cpp's) logits along `rows`, and the worker's answer."""
    gguf.write(model, tmp_path / "a.gguf", tokenizer=tokenizer)
    answer, theirs = parity.llamacpp(PYTHON, tmp_path / "a.gguf", prompts, rows, new_tokens)
    ours = [parity.logits_of(model, row) for row in rows]
    with parity.rounded_inputs(model):
        rounded = [parity.logits_of(model, row) for row in rows]
    return ours, rounded, theirs, answer


@pytest.mark.parametrize("name", PLAIN)
def test_a_float_model_of_each_kind_gives_the_same_logits(tmp_path, name):
    ours, _, theirs, _ = both(tmp_path, tiny(CONFIGS[name]))
    found = parity.agreement(ours, theirs)
    limit = 2e-3 if name.startswith("gpt2") else 2e-5  # llama.cpp looks gelu up in a table of fp16
    assert found["max_difference"] <= limit * found["largest_logit"], found
    assert found["argmax_equal"] == found["positions"] or name.startswith("gpt2"), found


@pytest.mark.parametrize("scheme", ["w8a16-g32", "w4a16-g32", "w4a16", "w3a16-g64"])
@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])
def test_one_layer_in_blocks_is_what_we_compute_with_rounded_inputs(tmp_path, scheme, layer):
    rules = [rule(f"model.layers.0.{layer}", scheme)]
    model, _ = with_half_scales(tiny(CONFIGS["llama wide heads"], None, rules))
    ours, rounded, theirs, _ = both(tmp_path, model)
    near, far = parity.agreement(rounded, theirs), parity.agreement(ours, theirs)
    assert near["max_difference"] <= 5e-5 * near["largest_logit"], near
    assert far["max_difference"] > 5 * near["max_difference"], far  # or the comparison would show nothing


@pytest.mark.parametrize("name", PLAIN)
def test_a_whole_quantized_model_is_near(tmp_path, name):
    model, _ = with_half_scales(tiny(CONFIGS[name], "w8a16-g32"))
    ours, _, theirs, _ = both(tmp_path, model)
    assert parity.agreement(ours, theirs)["correlation"] >= 0.999


@pytest.mark.slow
@pytest.mark.parametrize("which", ["stories260k", "tinystories_4m"])
@pytest.mark.parametrize("scheme", ["w8a16-g32", "w4a16-g32"])
def test_the_real_models(tmp_path, which, scheme, request):
    """Prompts become the same tokens; a float32 file of the same numbers continues all ten texts as we do; the one in
    blocks has correlation 0.999 and nearly every argmax."""
    plain = load_float(request.getfixturevalue(which))
    prepare(plain.model, Recipe(Scheme.parse(scheme)))
    model, _ = with_half_scales(pack_model(plain.model))
    prompts = [plain.tokenizer(prompt)["input_ids"] for prompt in parity.PROMPTS]
    ours, _, theirs, answer = both(tmp_path, model, plain.tokenizer, prompts, parity.PROMPTS, 8)
    found = parity.agreement(ours, theirs)
    assert answer["tokens"] == prompts
    assert found["correlation"] >= 0.999 and found["argmax_equal"] >= 0.97 * found["positions"], found
    control = parity.dequantized(model, "")
    (tmp_path / "control").mkdir()
    ours, _, theirs, answer = both(tmp_path / "control", control, plain.tokenizer, prompts, parity.PROMPTS, 64)
    found = parity.agreement(ours, theirs)
    assert found["argmax_equal"] == found["positions"] and found["max_difference"] <= 1e-4 * found["largest_logit"]
    assert answer["generated"] == [parity.greedy(control, tokens, 64) for tokens in prompts]
    assert torch.is_tensor(control.lm_head.weight)
