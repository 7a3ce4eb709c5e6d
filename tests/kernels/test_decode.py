"""The kernel that reads packed weights, against its formula in torch; sizes cross steps, groups, lanes and rows."""

import ctypes
import dataclasses
import mmap

import pytest
import torch

from quantailor.kernels import decode
from quantailor.kernels.decode import StoredWeight, by_blocks, decode_linear, decode_reference, why_not
from quantailor.kernels.native import library as native
from quantailor.nn.packed import packed
from quantailor.numerics.grouping import num_groups, per_element
from quantailor.numerics.nf4 import LEVELS
from quantailor.numerics.packing import pack
from tests.nn.layers import linear, quantized

SIZES = [(1, 64, 3, None), (1, 100, 5, 32), (3, 257, 17, 32), (2, 2048, 9, 32), (8, 640, 33, 64), (4, 1000, 7, 128)]
SIZES += [(1, 1, 1, None), (5, 256, 2, 256), (2, 300, 4, 32), (1, 31, 3, 64), (2, 96, 6, 8), (2, 513, 3, 16)]
SIZES += [(1, 127, 6, 4), (2, 192, 21, 64)]
SIZES += [(2, 4100, 5, 8), (1, 4200, 6, 8), (1, 4096, 9, 8), (1, 8300, 3, 16)]  # scales are taken 512 at a time

needs_kernel = pytest.mark.skipif(
    native.library() is None or not decode.has_kernel(), reason="no compiler, or no AVX2: there is no kernel to test"
)


def drawn(bits, length, rows, group_size, kind, seed=0):
    """(integers u [O, N], the weight); scales of both signs."""
    torch.manual_seed(seed)
    groups = num_groups(length, group_size)
    low, high = (-128, 128) if kind == "signed" else (0, 2**bits)
    u = torch.randint(low, high, (rows, length))
    levels = torch.tensor(LEVELS) if kind == "levels" else None
    zero = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8) if kind == "zero points" else None
    data = u.to(torch.int8) if kind == "signed" else pack(u, bits)
    move = 0.5 - 2 ** (bits - 1) if kind == "moved" else 0.0
    return u, StoredWeight(data, torch.rand(rows, groups) - 0.3, bits, length, group_size, move, zero, levels)


def spread(tokens, length):
    """From tiny to large, with a row of zeros where there are several."""
    x = torch.randn(tokens, length) * torch.rand(tokens, length).pow(6) * 100
    x[1:2] = 0
    return x


def magnitude(x, u, weight):
    """sum |x| |w|: what rounding of sums is measured against."""
    move = weight.move if weight.zero_point is None else weight.zero_point.double()
    scale = weight.scale.double().abs().expand(u.shape[0], -1)
    zeros = move if isinstance(move, float) else per_element(move, weight.in_features, weight.group_size)
    w = (u.double().abs() + abs(zeros)) * per_element(scale, weight.in_features, weight.group_size)
    return x.double().abs() @ w.t() + 1e-30


@needs_kernel
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("bits", "kind"),
    [(b, k) for b in (1, 2, 3, 4, 8) for k in ("moved", "zero points")] + [(8, "signed"), (4, "levels")],
)
def test_equal_to_the_formula(bits, kind, size):
    tokens, length, rows, group = size
    u, weight = drawn(bits, length, rows, group, kind)
    if reason := why_not(weight, tokens, "cpu"):
        assert "do not fit steps" in reason and group < max(weight.step, 64)
        return
    x, bias = spread(tokens, length), torch.randn(rows)
    for added in (None, bias):
        y, expected = decode_linear(x, weight, added), decode_reference(x, u, weight, added)
        assert y.dtype == torch.float32 and y.shape == (tokens, rows)
        assert ((y - expected).abs() <= 1e-6 * (magnitude(x, u, weight) + bias.abs())).all()


@needs_kernel
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("bits", "kind"), [(b, k) for b in (1, 2, 3, 4) for k in ("moved", "zero points")] + [(4, "levels")]
)
def test_scales_of_half_precision_are_read_as_such(bits, kind, size):
    """The same numbers in half the bytes: the same bits come out. Nothing is read beyond the last scale."""
    tokens, length, rows, group = size
    _, weight = drawn(bits, length, rows, group, kind)
    assert weight.with_half_scale() is weight  # float32 numbers that half precision has not
    weight = dataclasses.replace(weight, scale=weight.scale.half().float())
    half = weight.with_half_scale()
    if weight.groups == 1 or group >= weight.step:
        assert half is weight  # one scale to a step or fewer is not worth it
        return
    assert half.half_scale.dtype == torch.float16 and half.native.half
    if why_not(weight, tokens, "cpu"):
        return
    ended = torch.full((half.half_scale.numel() + 64,), torch.nan, dtype=torch.float16)
    ended[:-64] = half.half_scale.flatten()
    half = dataclasses.replace(half, half_scale=ended[:-64].view_as(half.half_scale))
    x = spread(tokens, length)
    assert torch.equal(decode_linear(x, half), decode_linear(x, weight))


@pytest.mark.parametrize("scale", [1e-9, 7e4, float("nan"), 1.0009765625e-6])
def test_scales_that_half_precision_has_not_stay_as_they_are(scale):
    _, weight = drawn(4, 64, 3, 32, "moved")
    weight = dataclasses.replace(weight, scale=torch.full((3, 2), 0.5))
    assert not decode.has_kernel() or weight.with_half_scale().half_scale is not None
    weight.scale[1, 1] = scale
    assert weight.with_half_scale() is weight


@needs_kernel
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_integers_in_are_exact_sums_out(bits):
    """Inputs that 16 bits hold and scales that are powers of two: not a bit may be lost."""
    u, weight = drawn(bits, 512, 40, None, "signed" if bits == 8 else "moved")
    weight = dataclasses.replace(weight, scale=torch.full((40, 1), 0.25))
    x = torch.randint(-127, 128, (3, 512)).float() * 256
    x[:, :: weight.step] = decode.LARGEST  # each step's largest: its scale is 1
    expected = x.double() @ ((u.double() + weight.move) * 0.25).t()
    assert torch.equal(decode_linear(x, weight).double(), expected)


@needs_kernel
def test_extremes_do_not_overflow():
    for bits in (1, 2, 3, 4, 8):
        for sign in (1.0, -1.0):
            u = torch.full((5, 1024), 2**bits - 1)
            weight = StoredWeight(pack(u, bits), torch.ones(5, 1), bits, 1024, None)
            y = decode_linear(torch.full((1, 1024), sign * 3.0), weight)
            assert torch.allclose(y, torch.full((1, 5), sign * 3.0 * 1024 * (2**bits - 1)), rtol=1e-6)


@needs_kernel
def test_what_is_not_finite_stays_so_and_spoils_no_other_token():
    u, weight = drawn(4, 200, 6, 32, "moved")
    x = torch.randn(3, 200)
    x[1, 77] = torch.inf
    y = decode_linear(x, weight)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    assert torch.equal(y[[0]], decode_linear(x[[0]], weight))
    tiny = decode_linear(torch.full((1, 200), 1e-42), weight)  # below what can be divided by
    assert tiny.isfinite().all() and decode_reference(torch.full((1, 200), 1e-42), u, weight).abs().max() < 1e-30


@needs_kernel
def test_threads_and_half_precision_change_nothing():
    _, weight = drawn(4, 640, 100, 32, "moved")
    x = torch.randn(2, 640)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(decode_linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    half = x.to(torch.bfloat16)
    assert torch.equal(decode_linear(half, weight), decode_linear(half.float(), weight))


@needs_kernel
def test_extremes_of_nf4_do_not_overflow():
    weight = StoredWeight(
        pack(torch.full((5, 1024), 15), 4), torch.ones(5, 1), 4, 1024, None, levels=torch.tensor(LEVELS)
    )
    assert torch.allclose(decode_linear(torch.full((1, 1024), 3.0), weight), torch.full((1, 5), 3072.0), rtol=1e-6)


@needs_kernel
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["moved", "zero points"])
def test_nothing_is_read_beyond_the_last_row(bits, kind):
    """The weight's last bytes are the last of a page, and the page behind it may not be read."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = mmap.PAGESIZE
    weight = drawn(bits, 300, 7, 32, kind)[1]
    assert why_not(weight, 1, "cpu") == ""
    room = mmap.mmap(-1, 4 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    assert libc.mprotect(start + 3 * page, page, 0) == 0  # PROT_NONE
    size = weight.data.numel() * 4
    held = torch.frombuffer(room, dtype=torch.uint8, count=3 * page)[3 * page - size :].view(torch.int32)
    held.copy_(weight.data.flatten())
    moved = dataclasses.replace(weight, data=held.view(weight.data.shape))
    assert torch.equal(decode_linear(torch.ones(2, 300), moved), decode_linear(torch.ones(2, 300), weight))


@needs_kernel
def test_one_scale_for_a_whole_weight():
    u, weight = drawn(8, 128, 9, None, "signed")
    weight = dataclasses.replace(weight, scale=torch.tensor([[0.03]]))
    x = torch.randn(2, 128)
    assert torch.allclose(decode_linear(x, weight), x @ (u * 0.03).t(), atol=1e-3)


def test_one_zero_point_for_all_rows_is_not_read_as_one_a_row():
    _, weight = drawn(4, 64, 300, None, "zero points")
    of_all = dataclasses.replace(weight, scale=weight.scale[:1], zero_point=weight.zero_point[:1])
    assert "one zero point for the whole weight" in why_not(of_all, 1, "cpu")


def test_reasons_not_to():
    _, weight = drawn(4, 64, 3, 32, "moved")
    assert "no kernel here" in why_not(None, 1, "cpu")
    assert "no kernel here" in why_not(drawn(5, 64, 3, 32, "moved")[1], 1, "cpu")
    assert f"{decode.MOST_ROWS + 1} rows" in why_not(weight, decode.MOST_ROWS + 1, "cpu")
    assert "this is mps" in why_not(weight, 1, "mps")


def test_without_native_code_the_reason_is_told(monkeypatch):
    _, weight = drawn(4, 64, 3, 32, "moved")
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "why_not", lambda: "no C compiler was found")
    assert why_not(weight, 1, "cpu") == "no C compiler was found"


@pytest.mark.parametrize("shape", [(1, 5, 3), (40, 70_000, 90), (0, 8, 4)])
def test_blocks_are_the_float_product(shape):
    tokens, length, rows = shape
    x, w, bias = torch.randn(tokens, length), torch.randn(rows, length), torch.randn(rows)
    seen = []

    def dequantize(part):
        seen.append(part)
        return w[part]

    y = by_blocks(x, dequantize, rows, bias)
    assert torch.allclose(y, x @ w.t() + bias, rtol=1e-4, atol=1e-2)
    assert [p.start for p in seen[1:]] == [p.stop for p in seen[:-1]] and seen[-1].stop == rows


@pytest.mark.skipif(native.library() is None, reason="no compiler: there is no kernel to test")
@pytest.mark.parametrize("scheme", ["w8a16", "w8a16-g32-asym", "w5a16-g32", "w4a16-g32", "w4a16-g32-asym", "w3a16-g32"])
@pytest.mark.parametrize("more", ["nf4", "nf4-dq", "w2a16-g32-balanced", "w1.58a16-g32", "w1a16-g32", "w4a16"])
@pytest.mark.parametrize("length", [100, 64])
def test_rows_become_the_floats_of_their_grid(scheme, more, length):
    for name in (scheme, more):
        layer, x = linear(length=length)
        packed_weight = packed(quantized(layer, name, x)).packed
        made = packed_weight.block_maker()
        assert made != packed_weight.dequantize
        for rows in (slice(0, 33), slice(5, 6), slice(30, 33)):
            assert torch.equal(made(rows), packed_weight.dequantize(rows))
