import pytest
import torch

from quantailor import ptq
from quantailor.numerics import grids
from quantailor.numerics.grouping import to_groups
from quantailor.observers.weights import weight_scale
from quantailor.ptq import METHODS
from quantailor.ptq.rtn import RTN
from quantailor.ptq.statistics import Statistics
from quantailor.spec import Scheme
from tests.nn.layers import PATHOLOGICAL, SCHEMES, SPECS


def data(length=100):
    x = torch.randn(50, length) * torch.rand(length)
    return Statistics(x.square().sum(0), x.T @ x, num_rows=50, batches=1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("weighted", [True, False])
def test_every_weight_goes_to_the_nearest_level(scheme, weighted):
    spec, w = Scheme.parse(scheme).weight, torch.randn(9, 100)
    statistics = data() if weighted else None
    solution = RTN().solve(w, statistics, spec)
    scale, zero_point = weight_scale(w, spec, statistics.importance if weighted else None)
    assert torch.equal(solution.scale, scale) and torch.equal(solution.zero_point, zero_point)
    size = spec.group_size or 100
    for n in range(100):
        s, z = scale[:, n // size, 0], zero_point[:, n // size, 0]
        assert torch.equal(solution.q[:, n], grids.encode(w[:, n], s, z, spec.grid))
    told = "importance-weighted" if weighted else "unweighted"
    assert solution.report == {"method": "rtn", "range": f"{spec.range}, {told}"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("statistics", [data, lambda: None])
def test_the_contract_of_every_method(method, scheme, statistics):
    """Integers on the grid, scales and zero points in their shapes, and a report that names the method."""
    spec, w = Scheme.parse(scheme).weight, torch.randn(9, 100)
    solution = ptq.method(method).solve(w, statistics(), spec)
    qmin, qmax, _ = grids.limits(spec.grid)
    assert solution.q.shape == w.shape and int(solution.q.min()) >= qmin and int(solution.q.max()) <= qmax
    groups = 1 if spec.group_size is None else -(-100 // spec.group_size)
    assert solution.scale.shape == solution.zero_point.shape == (9, groups, 1)
    assert (solution.scale != 0).all() and torch.isfinite(solution.scale).all()
    assert solution.report["method"] in METHODS
    assert statistics() is not None or solution.report["method"] in ("rtn", "hqq")  # what works without data
    assert isinstance(ptq.method(method).needs_hessian, bool)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", SPECS[::3] + SPECS[-9:], ids=str)
@pytest.mark.parametrize("case", PATHOLOGICAL)
def test_no_weight_and_no_input_gives_a_level_that_is_not_finite(case, spec, method):
    w, statistics = torch.randn(33, 100), data()
    PATHOLOGICAL[case](w)
    if "row" in case:  # dead inputs, and one that drowns the others
        statistics.diagonal[:9], statistics.hessian[:9], statistics.hessian[:, :9] = 0, 0, 0
        statistics.hessian[20, 20] = statistics.diagonal[20] = 1e12
    solution = ptq.method(method).solve(w, statistics, spec)
    qmin, qmax, _ = grids.limits(spec.grid)
    assert int(solution.q.min()) >= qmin and int(solution.q.max()) <= qmax
    levels = grids.decode(to_groups(solution.q, spec.group_size), solution.scale, solution.zero_point, spec.grid)
    assert torch.isfinite(levels).all() and (solution.scale != 0).all()
