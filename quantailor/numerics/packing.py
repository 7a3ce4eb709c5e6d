"""Integers of 1 to 8 bits packed into 32-bit words, row by row.

A row is a little-endian stream of bits: value i takes bits i*b .. i*b + b - 1 and may straddle two words; the last
word is filled with zeros. At 2, 4 and 8 bits nothing straddles, and the words are those of compressed-tensors'
`pack-quantized` format, byte for byte.
"""

import torch
from torch import Tensor


def words_per_row(length: int, bits: int) -> int:
    """32-bit words that a row of `length` values takes."""
    return -(-length * bits // 32)


def pack(u: Tensor, bits: int) -> Tensor:
    """Unsigned integers [O, N] (any integer dtype, 0 .. 2^bits - 1) -> int32 words [O, words].

    Raises: ValueError if a value does not fit.

    >>> pack(torch.tensor([[1, 2, 3, 0]]), bits=2)
    tensor([[57]], dtype=torch.int32)
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: packing takes 1 to 8")
    if u.numel() and (int(u.min()) < 0 or int(u.max()) >= 2**bits):
        raise ValueError(f"values {int(u.min())} .. {int(u.max())} do not fit {bits} bits")
    rows, length = u.shape
    words = torch.zeros(rows, words_per_row(length, bits) + 1, dtype=torch.int64, device=u.device)
    position = torch.arange(length, device=u.device) * bits
    word, shift = position // 32, position % 32
    shifted = u.to(torch.int64) << shift
    words.index_add_(1, word, shifted & 0xFFFFFFFF)  # the fields of a word are disjoint: adding is or-ing
    words.index_add_(1, word + 1, shifted >> 32)
    return words[:, :-1].to(torch.int32)  # wraps to the same 32 bits


def unpack(words: Tensor, bits: int, length: int) -> Tensor:
    """int32 words [O, words] -> uint8 [O, N], the inverse of `pack`.

    Raises: ValueError if the words are too few or too many for `length`.
    """
    if words.shape[1] != words_per_row(length, bits):
        raise ValueError(f"{words.shape[1]} words a row do not hold {length} values of {bits} bits")
    mask = 2**bits - 1
    if 32 % bits == 0:  # nothing straddles: shift a whole word at once, without a 64-bit copy
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        fields = (words.unsqueeze(-1) >> shifts) & mask
        return fields.to(torch.uint8).flatten(1)[:, :length]
    wide = torch.cat([words.to(torch.int64) & 0xFFFFFFFF, torch.zeros_like(words[:, :1], dtype=torch.int64)], dim=1)
    position = torch.arange(length, device=words.device) * bits
    word, shift = position // 32, position % 32
    return (((wide[:, word] | (wide[:, word + 1] << 32)) >> shift) & mask).to(torch.uint8)
