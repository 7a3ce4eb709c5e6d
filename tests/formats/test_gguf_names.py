"""Names as the public package maps them, and rows as llama.cpp's rope wants them."""

import pytest
import torch

from quantailor.formats.gguf_names import ARCHITECTURES, deinterleave, interleave
from tests.formats.gguf_oracle import row_order


@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (1, 8), (4, 8), (3, 6)])
def test_rows_are_ordered_pair_by_pair(heads, dim):
    rows = torch.randn(heads * dim, 5)
    assert torch.equal(interleave(rows, heads), rows[row_order(heads, dim)])
    assert torch.equal(deinterleave(interleave(rows, heads), heads), rows)
    assert torch.equal(interleave(rows[:, 0], heads), rows[row_order(heads, dim), 0])


def test_interleaved_rows_rotate_alike():
    """The reason for it: turning neighbours after reordering is turning halves before it."""
    x, angle = torch.randn(8).double(), torch.rand(4).double()
    cos, sin = torch.cos(angle), torch.sin(angle)
    halves = torch.cat([x[:4] * cos - x[4:] * sin, x[4:] * cos + x[:4] * sin])  # transformers
    pairs = interleave(x, 1).unflatten(0, (4, 2))
    turned = torch.stack([pairs[:, 0] * cos - pairs[:, 1] * sin, pairs[:, 1] * cos + pairs[:, 0] * sin], 1).flatten()
    assert torch.allclose(turned, interleave(halves, 1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_are_those_of_the_public_package(name):
    gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
    arch = next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    theirs = gguf.get_tensor_name_map(arch, 12)
    for module in ARCHITECTURES[name].modules:
        for block in ("0", "11"):
            full = module.replace("#", block)
            assert ARCHITECTURES[name].stem(full) == theirs.get_name(full), full
            assert ARCHITECTURES[name].module(theirs.get_name(full)) == full


@pytest.mark.parametrize(
    "name", ["model.layers.x.mlp.up_proj", "model.layers.01.mlp.up_proj", "blk", "", "output_norm.1"]
)
def test_other_names_have_none(name):
    assert ARCHITECTURES["llama"].stem(name) is None and ARCHITECTURES["llama"].module(name) is None
