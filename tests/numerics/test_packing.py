import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantailor.numerics.packing import pack, unpack, words_per_row


def draw(rows, length, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, length), generator=generator)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 8), st.integers(1, 100), st.integers(0, 4), st.integers(0, 2**31))
def test_unpacking_gives_back_what_was_packed(bits, length, rows, seed):
    u = draw(rows, length, bits, seed)
    words = pack(u, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, words_per_row(length, bits))
    found = unpack(words, bits, length)
    assert found.dtype == torch.uint8 and torch.equal(found, u.to(torch.uint8))


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_is_a_little_endian_stream_of_bits(bits):
    u = draw(5, 67, bits)
    for row, words in zip(u.tolist(), pack(u, bits)):
        stream = sum(value << (bits * i) for i, value in enumerate(row))
        assert words.numpy().tobytes() == stream.to_bytes(4 * -(-67 * bits // 32), "little")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_type_of_integer_is_taken(dtype):
    u = draw(3, 33, 7)
    assert torch.equal(pack(u.to(dtype), 7), pack(u, 7))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_words_are_those_of_compressed_tensors(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    q = draw(6, 96, bits) - 2 ** (bits - 1)
    theirs = helpers.pack_to_int32(q.to(torch.int8), bits)
    assert torch.equal(pack(q + 2 ** (bits - 1), bits), theirs)
    assert torch.equal(unpack(theirs, bits, 96).to(torch.int16) - 2 ** (bits - 1), q.to(torch.int16))


@pytest.mark.parametrize("bits", [0, 9, -1, 32])
def test_bits_beyond_a_byte_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits={bits}: packing takes 1 to 8"):
        pack(torch.zeros(1, 4, dtype=torch.int64), bits)


@pytest.mark.parametrize("bad", [-1, 8, 255])
def test_a_value_that_does_not_fit_is_refused(bad):
    u = torch.tensor([[0, bad, 1]])
    with pytest.raises(ValueError, match="do not fit 3 bits"):
        pack(u, 3)


@pytest.mark.parametrize("words", [1, 3])
def test_too_few_or_too_many_words_are_refused(words):
    with pytest.raises(ValueError, match=f"{words} words a row do not hold 9 values of 4 bits"):
        unpack(torch.zeros(2, words, dtype=torch.int32), 4, 9)


def test_an_empty_tensor_has_no_words():
    assert pack(torch.zeros(0, 8, dtype=torch.uint8), 4).shape == (0, 1)
    assert pack(torch.zeros(3, 0, dtype=torch.uint8), 4).shape == (3, 0)
    assert unpack(torch.zeros(3, 0, dtype=torch.int32), 4, 0).shape == (3, 0)
