import math

import pytest
import torch

from quantailor import ptq
from quantailor.numerics import grids
from quantailor.observers.weights import weight_scale
from quantailor.ptq import METHODS
from quantailor.ptq.gptq import GPTQ
from quantailor.ptq.rtn import RTN
from quantailor.ptq.statistics import Statistics
from quantailor.spec import NF4, Balanced, Binary, Int, PerChannel, PerGroup, PerTensor, QuantSpec, Ternary

GRIDS = [Int(4), Int(2), Int(8), Int(4, symmetric=False), Int(8, symmetric=False), Int(3, narrow=True)]
GRIDS += [NF4(), Balanced(2), Ternary(), Binary()]


def gptq_by_definition(w, hessian, scale, zero_point, grid, damp, act_order):
    """Eq. 2-3 with an explicit inverse for every column; all [O, N] in float64."""
    diagonal = hessian.diagonal()
    order = sorted(range(len(hessian)), key=lambda n: -diagonal[n]) if act_order else list(range(len(hessian)))
    w, scale, zero_point = (t[:, order].clone() for t in (w, scale, zero_point))
    damped = hessian[order][:, order] + damp * diagonal.mean() * torch.eye(len(hessian), dtype=w.dtype)
    q = torch.zeros(w.shape, dtype=torch.int16)
    for col in range(w.shape[1]):
        inverse = torch.linalg.inv(damped[col:, col:])
        integers = grids.encode(w[:, col], scale[:, col], zero_point[:, col], grid)
        error = w[:, col] - grids.decode(integers, scale[:, col], zero_point[:, col], grid)
        w[:, col:] -= torch.outer(error / inverse[0, 0], inverse[0])
        q[:, order[col]] = integers.to(torch.int16)
    return q


def problem(rows=6, length=24, samples=100):
    """A weight and inputs of very different sizes, somewhat correlated."""
    x = torch.randn(samples, length).double() @ (torch.eye(length) + 0.3 * torch.randn(length, length)).double()
    x = x * torch.logspace(-1, 1, length, dtype=torch.float64)[torch.randperm(length)]
    return torch.randn(rows, length).double(), x


def statistics_of(x):
    return Statistics(x.square().sum(0).float(), (x.T @ x).float(), num_rows=len(x), batches=1)


def spread(scale, length, spec):
    """[O, G, 1] -> [O, N]: each element's own, the slow way."""
    size = spec.group_size or length
    return torch.stack([scale[:, n // size, 0] for n in range(length)], dim=1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("size", [4, 7, 24, 100])  # six groups, a ragged one, one, and one larger than the row
@pytest.mark.parametrize("act_order", [True, False])
def test_integers_are_those_of_the_equations(grid, size, act_order):
    (w, x), spec = problem(), QuantSpec(grid, PerGroup(size))
    scale, zero_point = weight_scale(w, spec, x.square().mean(0).float())
    scale, zero_point = spread(scale.double(), 24, spec), spread(zero_point, 24, spec)
    expected = gptq_by_definition(w, x.T @ x, scale, zero_point, grid, 0.01, act_order)
    for block_size in (1, 5, 8, 999):  # within, across, at and beyond a group
        q = GPTQ(block_size=block_size, act_order=act_order).round(w, x.T @ x, scale, zero_point, grid, 0.01)
        assert q.dtype == (torch.uint8 if grids.limits(grid)[1] > 127 else torch.int8)
        assert torch.equal(q.to(torch.int16), expected), block_size
    nearest = grids.encode(w, scale, zero_point, grid).to(torch.int16)
    assert not torch.equal(expected, nearest)  # the problem is one where spreading matters


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(7)], ids=str)
@pytest.mark.parametrize("grid", [Int(3), Int(4, symmetric=False), NF4(), Balanced(2)], ids=str)
def test_a_solution_is_the_search_of_scales_and_then_the_rounding(grid, granularity, act_order):
    if isinstance(grid, NF4) and not isinstance(granularity, PerGroup):
        return
    (w, x), spec = problem(), QuantSpec(grid, granularity)
    statistics, method = statistics_of(x), GPTQ(act_order=act_order)
    solution = method.solve(w.float(), statistics, spec)
    scale, zero_point = weight_scale(w.float(), spec, statistics.diagonal / len(x))
    assert torch.equal(solution.scale, scale) and torch.equal(solution.zero_point, zero_point)
    full = [spread(t.expand(6, -1, 1), 24, spec) for t in (scale, zero_point)]
    assert torch.equal(solution.q, method.round(w.float(), statistics.hessian, *full, grid, 0.01))
    # In float32 as in float64, but for a tie or two.
    exact = gptq_by_definition(w, x.T @ x, full[0].double(), full[1], grid, 0.01, act_order)
    assert (solution.q.to(torch.int16) == exact).double().mean() > 0.95
    assert solution.report == {"method": "gptq", "damp": 0.01}

    def cost(q):
        x_hat = grids.decode(q, full[0], full[1], grid).double()
        return float(((x_hat - w) @ x.T).square().sum())

    assert cost(solution.q) < cost(grids.encode(w.float(), full[0], full[1], grid))


@pytest.mark.parametrize("act_order", [True, False])
def test_dead_columns_are_rounded_to_nearest_and_spread_nothing(act_order):
    (w, x), spec, dead = problem(), QuantSpec(Int(3), PerGroup(8)), [0, 5, 11, 23]
    x[:, dead] = 0
    statistics = statistics_of(x)
    solution = GPTQ(act_order=act_order).solve(w.float(), statistics, spec)
    assert solution.report["dead_columns"] == 4
    scale = spread(solution.scale, 24, spec)
    nearest = grids.encode(w.float(), scale, 0, spec.grid)
    assert torch.equal(solution.q[:, dead], nearest[:, dead])
    other = w.clone()
    other[:, dead] = 0
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    alive = [n for n in range(24) if n not in dead]
    moved = GPTQ(act_order=act_order).round(other, x.T @ x, scale, zero_point, spec.grid, 0.01)
    kept = GPTQ(act_order=act_order).round(w, x.T @ x, scale, zero_point, spec.grid, 0.01)
    assert torch.equal(moved[:, alive], kept[:, alive])


def not_positive_definite(by):
    """Two inputs whose correlation is above 1 by this much, as rounding in float32 can make it."""
    hessian = torch.eye(6)
    hessian[0, 1] = hessian[1, 0] = 1 + by
    return Statistics(torch.ones(6), hessian, num_rows=10, batches=1)


@pytest.mark.parametrize("by, damp", [(-0.5, 0.01), (0.03, 0.05), (0.08, 0.1)])
def test_more_damping_where_cholesky_fails(by, damp):
    solution = GPTQ().solve(torch.randn(4, 6), not_positive_definite(by), QuantSpec(Int(4), PerChannel()))
    assert solution.report == {"method": "gptq", "damp": damp}


@pytest.mark.parametrize("bad", ["indefinite", "nan", "inf"])
def test_the_fallback_stands_in_the_report(bad):
    w, spec = torch.randn(4, 6), QuantSpec(Int(4), PerChannel())
    statistics = not_positive_definite(1.0)
    if bad != "indefinite":
        statistics.hessian[2, 2] = math.nan if bad == "nan" else math.inf
    solution = GPTQ().solve(w, statistics, spec)
    assert solution.report["method"] == "rtn"
    assert solution.report["fallback"] == "H is not positive definite at damping 0.1"
    assert torch.equal(solution.q, RTN().solve(w, statistics, spec).q)


@pytest.mark.parametrize(
    "statistics",
    [
        None,
        Statistics.empty(6, full=True, device=torch.device("cpu")),
        Statistics(torch.zeros(6), torch.zeros(6, 6), num_rows=10, batches=1),  # every input was 0
        Statistics(torch.ones(6), None, num_rows=10, batches=1),
    ],
    ids=["none", "no rows", "all zero", "diagonal only"],
)
def test_without_usable_data_it_is_rtn_and_says_so(statistics):
    w, spec = torch.randn(4, 6), QuantSpec(Int(4), PerGroup(4))
    solution = GPTQ().solve(w, statistics, spec)
    assert solution.report["method"] == "rtn" and "no calibration data" in solution.report["fallback"]
    assert torch.equal(solution.q, RTN().solve(w, statistics, spec).q)


def test_inputs_are_left_alone():
    w, x = problem()
    statistics, spec = statistics_of(x), QuantSpec(Int(4), PerGroup(8))
    before = [t.clone() for t in (w.float(), statistics.hessian, statistics.diagonal)]
    weight = w.float()
    for name in METHODS:
        ptq.method(name).solve(weight, statistics, spec)
    assert all(map(torch.equal, before, (weight, statistics.hessian, statistics.diagonal)))
