"""HQQ against its equations, one group and one weight at a time in plain Python floats."""

import math

import pytest
import torch

from quantailor.numerics import grids
from quantailor.observers.weights import weight_scale
from quantailor.ptq import hqq
from quantailor.ptq.hqq import HQQ
from quantailor.ptq.rtn import RTN
from quantailor.ptq.statistics import Statistics
from quantailor.spec import NF4, Balanced, Binary, Int, PerChannel, PerGroup, PerTensor, QuantSpec, Ternary

SYMMETRIC = [Int(2), Int(4), Int(3, narrow=True), Balanced(2), Ternary(), Binary()]
ASYMMETRIC = [Int(2, symmetric=False), Int(3, symmetric=False), Int(8, symmetric=False)]


def remainders(group, s, z, grid):
    """[(what rounding leaves, the level)] in steps."""
    qmin, qmax, offset = grids.limits(grid)
    found = []
    for w in group:
        q = min(max(round(w / s - offset + z), qmin), qmax)
        level = q - z + offset
        found.append((w / s - level, level))
    return found


def lp_error(group, s, z, grid, p):
    return sum(abs(r * s) ** p for r, _ in remainders(group, s, z, grid))


def descent_by_definition(group, s, z, grid, method, move_zero):
    best, kept = math.inf, (s, z)
    for i in range(method.iterations):
        beta = method.beta * method.kappa**i
        pairs = remainders(group, s, z, grid)
        error = lp_error(group, s, z, grid, method.p)
        if not error < best:
            break
        best, kept = error, (s, z)
        levels, fitted = [], []
        for r, level in pairs:
            given_up = math.copysign(max(0.0, abs(r) - abs(r) ** (method.p - 1) / beta), r) if r else 0.0
            levels.append(level)
            fitted.append(r + level - given_up)
        if move_zero:  # the least-squares line x - r_e = slope * t + height is slope * (t - (-height / slope))
            columns = torch.tensor([[t, 1.0] for t in levels], dtype=torch.float64)
            slope, height = torch.linalg.lstsq(columns, torch.tensor(fitted, dtype=torch.float64)).solution.tolist()
            s, z = s * slope, z - height / slope
        else:
            s *= sum(t * y for t, y in zip(levels, fitted)) / sum(t * t for t in levels)
    return kept


def groups_of(n=9, size=13):
    w = torch.randn(n, size, dtype=torch.float64) * torch.logspace(-3, 3, n, dtype=torch.float64)[:, None]
    w[2] += 2 * w[2].abs().max()  # all of one sign
    w[5, 3] *= 30  # an outlier
    return w


def start_of(w, grid):
    scale, zero_point = weight_scale(w, QuantSpec(grid, PerChannel(), range="minmax"))
    return scale.view(-1, 1).double(), zero_point.view(-1, 1)


@pytest.mark.parametrize(
    ("grid", "move_zero"),
    [(g, False) for g in SYMMETRIC] + [(g, m) for g in ASYMMETRIC for m in (False, True)],
    ids=str,
)
def test_the_descent_is_the_equations(grid, move_zero):
    w, method = groups_of(), HQQ(iterations=7)
    scale, zero_point = start_of(w, grid)
    s, z, error = method.descend(w, scale, zero_point.double(), grid, move_zero)
    for i, group in enumerate(w.tolist()):
        expected = descent_by_definition(group, float(scale[i]), float(zero_point[i]), grid, method, move_zero)
        assert (float(s[i]), float(z[i])) == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert float(error[i]) == pytest.approx(lp_error(group, *expected, grid, method.p), rel=1e-6)
    assert not torch.equal(s, scale)  # something moved


@pytest.mark.parametrize("grid", SYMMETRIC + ASYMMETRIC, ids=str)
@pytest.mark.parametrize("chunk", [1, 40, 10**6])  # one group at once, three, all
def test_a_fit_is_both_then_the_rounding_then_the_scale(grid, chunk, monkeypatch):
    monkeypatch.setattr(hqq, "_CHUNK", chunk)
    w, method = groups_of(), HQQ(iterations=7)
    scale, zero_point = start_of(w, grid)
    s, z, before, after = method.fit(w, scale, zero_point, grid)
    totals = [0.0, 0.0]
    for i, group in enumerate(w.tolist()):
        start = float(scale[i]), int(zero_point[i])
        found = start
        if isinstance(grid, Int) and not grid.symmetric:
            found = descent_by_definition(group, *start, grid, method, True)
            found = found[0], min(max(round(found[1]), grid.qmin), grid.qmax)
        found = descent_by_definition(group, *found, grid, method, False)
        errors = [lp_error(group, *g, grid, method.p) for g in (start, found)]
        found = found if errors[1] < errors[0] else start
        assert (float(s[i]), int(z[i])) == (pytest.approx(found[0], rel=1e-6), found[1])
        for k, error in enumerate((errors[0], min(errors))):
            totals[k] += error / start[0] ** method.p
    assert (before, after) == pytest.approx(totals, rel=1e-6) and after < before


@pytest.mark.parametrize("grid", [Int(4), Int(3, symmetric=False), Balanced(2), Binary()], ids=str)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(16), PerGroup(9), PerGroup(100)], ids=str)
def test_a_solution_fits_every_group_by_itself_and_rounds_to_nearest(grid, granularity):
    w, spec, method = torch.randn(6, 40), QuantSpec(grid, granularity), HQQ()
    solution = method.solve(w, None, spec)
    scale, zero_point = weight_scale(w, QuantSpec(grid, granularity, range="minmax"))
    assert solution.scale.shape == scale.shape and solution.zero_point.dtype == torch.int32
    size = spec.group_size or 40
    for row in range(len(scale)):
        for g, start in enumerate(range(0, 40, size)):
            here = (slice(None) if len(scale) == 1 else slice(row, row + 1), slice(start, start + size))
            s, z, _, _ = method.fit(w[here].reshape(1, -1), scale[row, g, None], zero_point[row, g, None], grid)
            torch.testing.assert_close(solution.scale[row, g], s[0], rtol=1e-4, atol=0)
            assert torch.equal(solution.zero_point[row, g], z[0])
            q = grids.encode(w[here], solution.scale[row, g], solution.zero_point[row, g], grid)
            assert torch.equal(solution.q[here], q)
    start, end = solution.report["lp_error"]
    assert end <= start and solution.report["method"] == "hqq"


def test_a_weight_on_its_grid_stays_there():
    w = torch.tensor([[-8.0, -3.0, 0.0, 1.0, 7.0], [4.0, -8.0, 2.0, 2.0, -1.0]]) * 0.25
    scale, none = torch.full((2, 1), 0.25), torch.zeros(2, 1, dtype=torch.int32)
    s, _, before, after = HQQ().fit(w, scale, none, Int(4))
    assert torch.equal(s, scale) and before == after < 1e-6


@pytest.mark.parametrize("factor", [1e-20, 2.0**-7, 2.0**9, 1e20])
def test_the_unit_of_the_weight_does_not_matter(factor):
    w, spec = torch.randn(4, 32), QuantSpec(Int(3, symmetric=False), PerGroup(16))
    one, other = (HQQ().solve(w * f, None, spec) for f in (1.0, factor))
    assert torch.equal(one.zero_point, other.zero_point)
    torch.testing.assert_close(other.scale / factor, one.scale, rtol=1e-3, atol=0)


def test_data_is_not_used_and_that_is_said():
    w, spec = torch.randn(4, 32), QuantSpec(Int(4), PerGroup(16))
    x = torch.randn(20, 32) * torch.logspace(-2, 2, 32)
    statistics = Statistics(x.square().sum(0), x.T @ x, num_rows=20, batches=1)
    solution = HQQ().solve(w, statistics, spec)
    assert torch.equal(solution.q, HQQ().solve(w, None, spec).q)
    assert solution.report["statistics"] == "not used"
    assert not HQQ().needs_hessian


def test_nf4_is_rounded_to_nearest_and_says_so():
    w, spec = torch.randn(4, 128), QuantSpec(NF4(), PerGroup(64))
    solution = HQQ().solve(w, None, spec)
    assert solution.report["method"] == "rtn" and "NF4" in solution.report["fallback"]
    assert torch.equal(solution.q, RTN().solve(w, None, spec).q)


def test_a_weight_that_is_not_finite_is_refused():
    w = torch.randn(3, 8)
    w[1, 2] = math.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        HQQ().solve(w, None, QuantSpec(Int(4), PerChannel()))
