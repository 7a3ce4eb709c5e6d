"""Few rows times packed weights, read as they are stored: what decoding a token is made of.

A program makes BLOCK_O results of up to ROWS rows. It reads words of weights once and takes them apart in registers;
sums are float32, scaled word by word, so that a group is one word or several. Weights are the traffic: at one row
nothing else counts, and no tensor core is needed. The fastest block is measured once for sizes alike and kept on disk;
another block adds in another order, which moves last bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantailor.kernels.triton.common import INTERPRETED, blocks_of, launch, power_of_2

_ROWS = 4  # at a time; beyond, the weights are read again, from the second cache


def _config(out: int, words: int, warps: int) -> triton.Config:
    return triton.Config({"BLOCK_O": out, "BLOCK_W": words}, num_warps=warps, num_stages=2)


CONFIGS = [_config(out, words, warps) for out in (1, 2, 4, 8) for words, warps in ((32, 1), (64, 1), (64, 2), (128, 4))]
CONFIGS += [_config(1, 128, 2), _config(2, 128, 2), _config(1, 256, 4), _config(1, 512, 4)]  # a row in few steps


def _worth_trying(configs: list[triton.Config], named: dict, **more: object) -> list[triton.Config]:
    """Those with 8 to 64 products to a thread: enough to do, and room in its registers."""

    def products(config: triton.Config) -> int:
        tile = config.kwargs["BLOCK_O"] * config.kwargs["BLOCK_W"] * more["FIELDS"] * more["ROWS"]
        return tile // (32 * config.num_warps)

    return [c for c in configs if 8 <= products(c) <= 64] or [min(configs, key=products)]


@triton.jit
def _unpacked(words, BITS: tl.constexpr):
    """int32 [O, W] -> float32 [O, W, 32 / BITS], the lowest bits first. Halves, then halves of these: each `join` adds
    an axis of two, the higher bits behind."""
    parts = words
    width: tl.constexpr = 32 // BITS
    if width >= 4:
        parts = tl.join(parts, parts >> 16)
    if width >= 8:
        parts = tl.join(parts, parts >> 8)
    if width >= 16:
        parts = tl.join(parts, parts >> 4)
    if width >= 32:
        parts = tl.join(parts, parts >> 2)
    parts = tl.join(parts, parts >> BITS)
    fields = tl.reshape(parts, [words.shape[0], words.shape[1], width]) & ((1 << BITS) - 1)
    # u + 2^23 has u in its last bits: or-ing and subtracting costs less than converting, which few units do.
    return (fields | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.autotune(
    CONFIGS[-1:] if INTERPRETED else CONFIGS,  # there is nothing to measure in the interpreter
    key=["out", "length", "size", "ROWS", "BITS"],
    prune_configs_by={"early_config_prune": _worth_trying},
    cache_results=True,
)
@triton.jit
def _decode_linear(
    x, data, w_scale, zero_point, bias, y, rows, out, length, words, groups, size, w_row, move,
    ROWS: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr, SIGNED: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    o = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    field = tl.arange(0, FIELDS)
    sums = tl.zeros([ROWS, BLOCK_O, BLOCK_W], tl.float32)
    for start in range(0, words, BLOCK_W):
        # One word to a thread, as if they were not side by side: its fields then meet 16 bytes of inputs in bfloat16 or
        # float16 in the thread that loads them (at 4 bits), and nothing goes through shared memory.
        word = tl.max_contiguous(start + tl.arange(0, BLOCK_W), 1)
        n = word[:, None] * FIELDS + field[None, :]
        here = (o < out)[:, None] & (word < words)[None, :]
        if SIGNED:
            at = o[:, None, None] * length + n[None, :, :]
            u = tl.load(data + at, mask=here[:, :, None] & (n < length)[None, :, :], other=0).to(tl.float32)
        else:
            u = _unpacked(tl.load(data + o[:, None] * words + word[None, :], mask=here, other=0), BITS)
        group = o[:, None] * w_row + (word * FIELDS // size)[None, :]
        if zero_point is not None:
            u -= tl.load(zero_point + group, mask=here, other=0).to(tl.float32)[:, :, None]
        else:
            u += move
        given = tl.load(
            x + t[:, None, None, None] * length + n[None, None, :, :],
            mask=(t < rows)[:, None, None, None] & (n < length)[None, None, :, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        scale = tl.load(w_scale + group, mask=here, other=0.0)
        sums += tl.sum(given * u[None, :, :, :], 3) * scale[None, :, :]
    total = tl.sum(sums, 2)
    if bias is not None:
        total += tl.load(bias + o, mask=o < out, other=0.0).to(tl.float32)[None, :]
    at = y + t.to(tl.int64)[:, None] * out + o[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=(t < rows)[:, None] & (o < out)[None, :])


def decode_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    move: float,
    bits: int,
    group_size: int | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y [T, O] in `dtype` of x [T, N] in any float type and the parts of a kernels.decode.StoredWeight.

    Where a weight has several groups, words have to lie within one: 32 / bits divides `group_size`.
    """
    x, (rows, length), out = x.contiguous(), x.shape, data.shape[0]
    y = torch.empty((rows, out), dtype=dtype, device=x.device)
    one_scale = scale.shape[0] == 1 and out != 1  # of the whole weight, which then has no zero points of rows
    groups, fields = scale.shape[1], 32 // bits
    if not y.numel():
        return y
    together = min(_ROWS, power_of_2(rows))
    launch(
        *(_decode_linear, lambda of: (blocks_of(out, of["BLOCK_O"]), blocks_of(rows, together)), x),
        *(data.contiguous(), scale.contiguous(), None if zero_point is None else zero_point.contiguous()),
        *(None if bias is None else bias.contiguous(), y, rows, out, length, blocks_of(length, fields)),
        *(groups, length if groups == 1 else group_size, 0 if one_scale else groups, float(move)),
        alike=(out, length, group_size), options={},
        ROWS=together, BITS=bits, FIELDS=fields, SIGNED=data.dtype == torch.int8,
    )  # fmt: skip
    return y
