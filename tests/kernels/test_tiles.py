"""The tile product: the bits of every other path, at sizes on and around the edges of tiles, blocks and groups."""

import pytest
import torch

from quantailor.kernels import tiles
from quantailor.kernels.native import library as native
from quantailor.kernels.ops import IntegerInput, IntegerWeight, float_matmul, int_linear

needs_tiles = pytest.mark.skipif(not native.has_tiles(), reason=native.why_not() or "this processor has no int8 tiles")


def draw(rows, length, out, group_size, shifted=False, static=False, seed=0):
    torch.manual_seed(seed)
    groups = 1 if group_size is None else -(-length // group_size)
    q = torch.randint(-128, 128, (rows, length), dtype=torch.int8)
    x = IntegerInput(q, torch.rand(1) if static else torch.rand(rows, 1))
    shift = torch.randint(-9, 9, (out, groups)) + 0.5 if shifted else None
    w_q = torch.randint(-128, 128, (out, length), dtype=torch.int8)
    return x, IntegerWeight(w_q, torch.rand(out, groups), shift, group_size), torch.randn(out)


def test_a_tile_is_laid_out_as_the_instruction_wants_it():
    """Byte (r, c, b) of tile (block, step) is w[16 block + c, depth step + 4 r + b]; beyond the edges 0."""
    if not native.has_tiles():
        pytest.skip(native.why_not() or "this processor has no int8 tiles")
    for out, length, depth in ((16, 64, 64), (17, 65, 64), (40, 96, 32), (1, 3, 32)):
        w = torch.randint(-128, 128, (out, length), dtype=torch.int8)
        steps = -(-length // depth)
        found = tiles.pack_tiles(w, depth).view(-(-out // 16), steps, depth // 4, 16, 4)
        for block, step, r, c, b in torch.cartesian_prod(*(torch.arange(n) for n in found.shape)).tolist():
            o, n = 16 * block + c, depth * step + 4 * r + b
            expected = int(w[o, n]) if o < out and n < length else 0
            assert int(found[block, step, r, c, b]) == expected


@needs_tiles
@pytest.mark.parametrize("group_size", [None, 32, 64, 96, 128])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("rows", [8, 31, 32, 33, 100])
@pytest.mark.parametrize(("length", "out"), [(64, 16), (65, 17), (200, 48), (300, 33), (512, 100), (1500, 31)])
def test_the_same_bits_as_exact_float_sums(length, out, rows, group_size, shifted):
    x, weight, bias = draw(rows, length, out, group_size, shifted)
    assert tiles.fits(x.q, weight.q, group_size)
    for given in (bias, None):
        expected = int_linear(x, weight, given, matmul=float_matmul)
        assert torch.equal(int_linear(x, weight, given), expected)
        assert torch.equal(int_linear(x, weight, given, dtype=torch.bfloat16), expected.bfloat16())


@needs_tiles
def test_one_scale_for_all_tokens_and_one_for_all_outputs():
    x, weight, bias = draw(40, 130, 50, None, static=True)
    weight = IntegerWeight(weight.q, torch.tensor([[0.3]]), None, None)
    assert torch.equal(int_linear(x, weight, bias), int_linear(x, weight, bias, matmul=float_matmul))


@needs_tiles
def test_the_largest_sums_do_not_overflow():
    length = 16384
    x = IntegerInput(torch.full((9, length), -128, dtype=torch.int8), torch.ones(1))
    weight = IntegerWeight(torch.full((3, length), -128, dtype=torch.int8), torch.ones(3, 1), None, None)
    assert torch.equal(int_linear(x, weight, None), torch.full((9, 3), 2.0**28))


@needs_tiles
@pytest.mark.parametrize("group_size", [None, 32, 64])
def test_tiles_made_before_give_what_those_made_for_the_call_give(group_size):
    for length, out in ((64, 16), (300, 33)):
        x, weight, bias = draw(40, length, out, group_size)
        parts = (x.q, x.scale.reshape(-1), weight.q, weight.scale, weight.shift, group_size, bias)
        held, y = tiles.weight_tiles(weight.q, group_size), torch.empty(40, out)
        for _ in range(2):
            assert tiles.tile_linear(*parts, in_bf16=False, tiles=held, out=y) is y
            assert torch.equal(y, tiles.tile_linear(*parts, in_bf16=False))


def test_what_does_not_fit_tiles_goes_another_way():
    x, weight, _ = draw(40, 96, 16, 24)
    assert tiles.depth_of(24, 96) is None and not tiles.fits(x.q, weight.q, 24)
    assert not tiles.fits(x.q[:3], weight.q, None)  # few rows: packing would cost more than it saves
    assert tiles.depth_of(96, 192) == 32 and tiles.depth_of(128, 256) == 64 and tiles.depth_of(200, 64) == 64


@needs_tiles
def test_any_number_of_threads_gives_the_same():
    x, weight, bias = draw(333, 256, 130, 64)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(int_linear(x, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_rows_are_worked_on_in_runs_with_the_same_result(monkeypatch):
    """The path without tiles: no run of sums is larger than the bound, and no row depends on its run."""
    from quantailor.kernels import ops

    monkeypatch.setattr(tiles, "fits", lambda *a: False)
    x, weight, bias = draw(50, 96, 20, 32, shifted=True)
    whole = int_linear(x, weight, bias)
    monkeypatch.setattr(ops, "_MOST_SUMS", 7 * 20)
    seen = []
    counted = lambda a, b: seen.append(a.shape[0]) or ops.int_matmul(a, b)  # noqa: E731
    assert torch.equal(int_linear(x, weight, bias, matmul=counted), whole)
    assert max(seen) == 7 and sum(seen) == 50 * 3
