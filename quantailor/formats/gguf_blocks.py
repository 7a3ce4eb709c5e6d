"""GGUF's blocks of 32 weights, and the integers in them. Nothing is rounded here but a scale to fp16.

    Q8_0   fp16 d, int8 q[32]                    34 bytes   x = q * d
    Q4_0   fp16 d, 16 bytes of two nibbles       18 bytes   x = (u - 8) * d,  u = 0 .. 15
    Q4_1   fp16 d, fp16 m, 16 bytes of nibbles   20 bytes   x = u * d + m,    u = 0 .. 15
Byte j of the nibbles holds value j in its low and value j + 16 in its high half. Words are little-endian.

Source: the block structs of ggml (ggml-common.h) and https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
Axes: O rows, N values a row (a multiple of 32), B = N / 32 blocks a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 32
BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks: `q` int8 [O, N] as the block type counts (Q4_0 -8 .. 7, Q4_1 0 .. 15); `scale` float16
    [O, B]; `offset` float16 [O, B] of Q4_1, else None."""

    kind: str
    q: Tensor
    scale: Tensor
    offset: Tensor | None = None

    def dequantize(self) -> Tensor:
        """float32 [O, N]. Exact for Q8_0 and Q4_0: 8 + 11 bits fit 24."""
        x = self.q.unflatten(1, (-1, BLOCK)).float() * self.scale.float().unsqueeze(-1)
        if self.offset is not None:
            x = x + self.offset.float().unsqueeze(-1)
        return x.flatten(1)


def encode(blocks: Blocks) -> np.ndarray:
    """uint8 [O, B * bytes of a block].

    Raises: ValueError if the rows are no whole blocks or an integer is outside the block type's range.
    """
    rows, length = blocks.q.shape
    if length % BLOCK:
        raise ValueError(f"rows of {length} values are no whole blocks of {BLOCK}")
    lowest, highest = {"Q8_0": (-128, 127), "Q4_0": (-8, 7), "Q4_1": (0, 15)}[blocks.kind]
    if blocks.q.numel() and not lowest <= int(blocks.q.min()) <= int(blocks.q.max()) <= highest:
        raise ValueError(f"integers {int(blocks.q.min())} .. {int(blocks.q.max())} do not fit {blocks.kind}")
    parts = [_half_bytes(blocks.scale)]
    if blocks.offset is not None:
        parts.append(_half_bytes(blocks.offset))
    q = blocks.q.cpu().numpy().reshape(rows, -1, BLOCK)
    if blocks.kind == "Q8_0":
        parts.append(q.astype(np.int8).view(np.uint8))
    else:
        u = (q - lowest).astype(np.uint8)
        parts.append(u[..., :16] | (u[..., 16:] << 4))
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def decode(kind: str, data: np.ndarray) -> Blocks:
    """The inverse. `data` uint8 [O, B * bytes of a block], of which nothing is believed but its size.

    Raises: ValueError if a scale or an offset is not finite.
    """
    rows = data.shape[0]
    raw = np.ascontiguousarray(data).reshape(rows, -1, BYTES[kind])
    scale = _from_half_bytes(raw[..., :2])
    offset = _from_half_bytes(raw[..., 2:4]) if kind == "Q4_1" else None
    if not all(bool(torch.isfinite(t).all()) for t in (scale, offset) if t is not None):
        raise ValueError("a block's scale is NaN or Inf")
    if kind == "Q8_0":
        q = np.ascontiguousarray(raw[..., 2:]).view(np.int8)
    else:
        nibbles = raw[..., -16:]
        q = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).astype(np.int8)
        if kind == "Q4_0":
            q -= 8
    return Blocks(kind, torch.from_numpy(q.reshape(rows, -1).copy()), scale, offset)


def _half_bytes(values: Tensor) -> np.ndarray:
    return values.to(torch.float16).cpu().numpy().astype("<f2")[..., None].view(np.uint8)


def _from_half_bytes(raw: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(raw).view("<f2")[..., 0].astype(np.float16))
