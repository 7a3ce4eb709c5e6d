"""Blocks against their definition, byte for byte, and against the public package's dequantization."""

import numpy as np
import pytest
import torch

from quantailor.formats.gguf_blocks import BYTES, Blocks, decode, encode
from tests.formats.gguf_oracle import block_bytes, values_of

RANGE = {"Q8_0": (-128, 127), "Q4_0": (-8, 7), "Q4_1": (0, 15)}


def random_blocks(kind, rows=3, blocks=4):
    low, high = RANGE[kind]
    q = torch.randint(low, high + 1, (rows, 32 * blocks), dtype=torch.int8)
    scale = (torch.rand(rows, blocks) * 0.1 + 1e-3).half()
    if kind != "Q8_0":
        scale[0, 0] = -scale[0, 0]
    offset = torch.randn(rows, blocks).half() if kind == "Q4_1" else None
    return Blocks(kind, q, scale, offset)


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_are_those_of_the_definition(kind):
    made = random_blocks(kind)
    raw = encode(made)
    for row in range(3):
        expected = b"".join(
            block_bytes(
                kind,
                made.q[row, 32 * b : 32 * b + 32].tolist(),
                float(made.scale[row, b]),
                None if made.offset is None else float(made.offset[row, b]),
            )
            for b in range(4)
        )
        assert raw[row].tobytes() == expected


@pytest.mark.parametrize("kind", BYTES)
def test_every_integer_survives(kind):
    low, high = RANGE[kind]
    every = torch.arange(low, high + 1).repeat(4)[: 32 * ((high - low + 1) // 32 + 1)].to(torch.int8)
    every = every[: len(every) // 32 * 32][None]
    scale = torch.full((1, every.shape[1] // 32), 0.125).half()
    made = Blocks(kind, every, scale, scale if kind == "Q4_1" else None)
    again = decode(kind, encode(made))
    assert torch.equal(again.q, made.q) and torch.equal(again.scale, scale)
    assert set(every.flatten().tolist()) == set(range(low, high + 1))


@pytest.mark.parametrize("kind", BYTES)
def test_values_are_those_of_the_definition_and_of_the_public_package(kind):
    gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
    made = random_blocks(kind)
    raw, ours = encode(made), made.dequantize()
    size = BYTES[kind]
    slow = [[v for b in range(4) for v in values_of(kind, row.tobytes()[size * b : size * b + size])] for row in raw]
    assert torch.equal(ours, torch.tensor(slow, dtype=torch.float64).float())
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(theirs, ours.numpy())


@pytest.mark.parametrize("kind", BYTES)
def test_what_the_public_package_quantized_is_read_as_it_meant(kind):
    gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
    number = gguf.GGMLQuantizationType[kind]
    weights = torch.randn(5, 96).numpy()
    weights[2, :32] = 0  # a block without a scale
    raw = gguf.quants.quantize(weights, number)
    again = decode(kind, raw)
    assert np.array_equal(again.dequantize().numpy(), gguf.quants.dequantize(raw, number))
    assert encode(again).tobytes() == raw.tobytes()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no whole blocks of 32"):
        encode(Blocks("Q8_0", torch.zeros(1, 33, dtype=torch.int8), torch.ones(1, 2)))
    with pytest.raises(ValueError, match=r"-9 .. 0 do not fit Q4_0"):
        q = torch.zeros(1, 32, dtype=torch.int8)
        q[0, 0] = -9
        encode(Blocks("Q4_0", q, torch.ones(1, 1)))


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(kind, bad):
    raw = encode(random_blocks(kind))
    raw[1, : 2 if kind != "Q4_1" else 4].view("<f2")[-1] = bad  # of Q4_1 the offset
    with pytest.raises(ValueError, match="NaN or Inf"):
        decode(kind, raw)
