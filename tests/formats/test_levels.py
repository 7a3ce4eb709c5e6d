"""What lies on disk of ternary and binary weights, read by nothing of ours but the definition of the packing."""

import json

import pytest
import torch
from safetensors.torch import load_file

from quantailor import api
from tests.formats.making import texts, trained, weights_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_lm):
    return trained(tiny_lm, tmp_path_factory.mktemp("trained") / "model")


@pytest.mark.parametrize(
    ("scheme", "gradient", "bits", "levels"),
    [
        ("w1.58a8", "bitnet", 2, 3),
        ("w1.58a16-g32", "bitnet", 2, 3),
        ("w1a1", "xnor", 1, 2),
        ("w1a16-g32", "binaryconnect", 1, 2),
    ],
)
def test_trained_weights_have_exactly_so_many_levels_in_so_many_bits(folder, tmp_path, scheme, gradient, bits, levels):
    settings = api.Settings(steps=4, batch_size=4, evaluations=1, learning_rate=2e-3, gradient=gradient)
    data = texts(16, seed=41)
    made = api.train(folder, data, scheme=scheme, eval_data=data, settings=settings, context=32)
    out = api.save(made, tmp_path / "out")

    tensors = load_file(weights_in(out))
    names = [name for name in tensors if name.endswith(".packed.words")]
    assert len(names) == 14, "seven layers in each of two blocks"
    shapes = {e.name: e.shape for e in made.state.inventory if e.scheme is not None}
    for name in names:
        rows, inputs = shapes[name.removesuffix(".packed.words")]
        words = tensors[name]
        assert words.dtype == torch.int32 and tuple(words.shape) == (rows, -(-inputs * bits // 32)), "no byte more"
        codes = set()
        for row in words.tolist():
            stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(row))
            codes |= {stream >> (bits * i) & (2**bits - 1) for i in range(inputs)}
            assert stream >> (bits * inputs) == 0, "the rest of the last word is empty"
        assert codes == set(range(levels))
    assert json.loads((out / "config.json").read_text())["model_type"] == "quantailor"
    assert api.check(out).equal
    told = api.generate(out, "the cat", max_new_tokens=8)
    assert told.startswith("the cat") and len(told) > len("the cat")
