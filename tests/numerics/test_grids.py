import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantailor.numerics import grids, nf4
from quantailor.spec import NF4, Balanced, Binary, Int, Ternary

GRIDS = [
    *(Int(b, symmetric=s) for b in range(2, 9) for s in (True, False)),
    *(Int(b, narrow=True) for b in range(2, 9)),
    NF4(),
    Balanced(2),
    Ternary(),
    Binary(),
]


def levels(grid, scale=1.0, zero_point=0):
    qmin, qmax, _ = grids.limits(grid)
    return grids.decode(torch.arange(qmin, qmax + 1), torch.tensor(scale), zero_point, grid)


def zero_point_of(grid):
    return 5 % (grid.qmax + 1) if isinstance(grid, Int) and not grid.symmetric else 0


def test_the_levels_are_the_documented_ones():
    assert levels(Balanced(2)).tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert levels(Ternary()).tolist() == [-1, 0, 1]
    assert levels(Binary()).tolist() == [-0.5, 0.5]
    assert levels(Int(2)).tolist() == [-2, -1, 0, 1]
    assert levels(Int(3, narrow=True), 0.5).tolist() == [-1.5, -1, -0.5, 0, 0.5, 1, 1.5]
    assert levels(Int(2, symmetric=False), 1.0, 1).tolist() == [-1, 0, 1, 2]
    assert levels(NF4()).tolist() == torch.tensor(nf4.LEVELS).tolist()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_value_goes_to_its_nearest_level(grid):
    zero_point = zero_point_of(grid)
    table = levels(grid, 0.3, zero_point).double()
    x = torch.cat([torch.linspace(-3, 3, 4001) * float(table.abs().max()), torch.tensor([0.0, -0.0])])
    scale = torch.tensor(0.3)
    q = grids.encode(x, scale, zero_point, grid)
    qmin, qmax, _ = grids.limits(grid)
    assert q.dtype == (torch.uint8 if qmax > 127 else torch.int8)
    assert int(q.min()) == qmin and int(q.max()) == qmax
    distance = (x.double()[:, None] - table).abs()
    chosen = distance.gather(1, (q.long() - qmin)[:, None])[:, 0]
    assert (chosen <= distance.amin(1) + 1e-6 * table.abs().max()).all()  # a tie may fall to either side
    assert (q.int()[:4001].diff() >= 0).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 0.37, 1.0, 1e6])
def test_levels_are_fixed_points(grid, scale):
    zero_point = zero_point_of(grid)
    qmin, qmax, _ = grids.limits(grid)
    q = grids.encode(levels(grid, scale, zero_point), torch.tensor(scale), zero_point, grid)
    assert q.tolist() == list(range(qmin, qmax + 1))


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(GRIDS), st.integers(0, 2**31), st.floats(2**-20, 2**20, width=32), st.integers(-30, 30))
def test_encoding_is_idempotent_monotone_and_knows_no_units(grid, seed, size, power):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 33, generator=generator) * size
    scale = (torch.rand(4, 1, generator=generator) + 0.1) * size / 2 ** max(grid.bits - 2, 0)
    zero_point = zero_point_of(grid)
    q = grids.encode(x, scale, zero_point, grid)
    assert torch.equal(grids.encode(grids.decode(q, scale, zero_point, grid), scale, zero_point, grid), q)
    for row, integers in zip(x, q):
        assert (integers[row.argsort()].int().diff() >= 0).all()
    unit = 2.0**power
    assert torch.equal(grids.encode(x * unit, scale * unit, zero_point, grid), q)
    order = torch.randperm(4, generator=generator)
    assert torch.equal(grids.encode(x[order], scale[order], zero_point, grid), q[order])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_simulated_values_are_the_decoded_integers(grid, dtype):
    x = torch.randn(7, 3, 32, dtype=dtype)
    scale = torch.rand(7, 3, 1, dtype=dtype) + 0.05
    zero_point = torch.full((7, 3, 1), zero_point_of(grid), dtype=torch.int32)
    x_hat = grids.decode(grids.encode(x, scale, zero_point, grid), scale, zero_point, grid)
    assert x_hat.dtype == dtype
    simulated = grids.fake_quantize(x, scale, zero_point, grid, 1.0)
    if isinstance(grid, NF4):  # x + (x_hat - x): the same up to the rounding of a sum
        torch.testing.assert_close(simulated, x_hat, rtol=0, atol=1e-6)
    else:
        assert torch.equal(simulated, x_hat)


def test_gradients_on_nf4_pass_straight_through():
    x = torch.randn(4, 64, requires_grad=True)
    scale = x.detach().abs().amax(1, keepdim=True).requires_grad_()
    grids.fake_quantize(x, scale, 0, NF4(), 1.0).sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 64)) and scale.grad is None


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_storage_is_unsigned_and_fits_the_bits(grid):
    qmin, qmax, _ = grids.limits(grid)
    assert qmin >= grids.lowest(grid) and qmax - grids.lowest(grid) < 2**grid.bits


def test_another_thing_is_no_grid():
    with pytest.raises(TypeError, match="no such grid: 'int4'"):
        grids.limits("int4")
