"""AdaRound against its loss written out on the data itself, its gradients by autograd and its optimizer torch's own."""

import itertools

import pytest
import torch

from quantailor.numerics import grids
from quantailor.observers.weights import weight_scale
from quantailor.ptq import adaround
from quantailor.ptq.adaround import AdaRound, Problem
from quantailor.ptq.rtn import RTN
from quantailor.ptq.statistics import Statistics
from quantailor.spec import NF4, Balanced, Binary, Int, PerChannel, PerGroup, PerTensor, QuantSpec, Ternary

GRIDS = [Int(2), Int(4), Int(3, symmetric=False), Int(8, symmetric=False), Balanced(2), Ternary(), Binary(), NF4()]


def problem_of(grid, rows=5, length=12, samples=40, seed=0):
    """w, x (what arrives), x_float, scale and zero point of every element, all float64 but the zero point."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    mix = torch.eye(length) + 0.4 * torch.randn(length, length, generator=generator)
    x_float = torch.randn(samples, length, generator=generator, dtype=torch.float64) @ mix.double()
    x = x_float + 0.1 * torch.randn(samples, length, generator=generator, dtype=torch.float64)
    scale, zero_point = weight_scale(w, QuantSpec(grid, PerGroup(5)))
    scale, zero_point = (t.squeeze(-1).repeat_interleave(5, 1)[:, :length] for t in (scale, zero_point))
    # Some weights beyond the last level, on NF4 too: where W_hat = W, the first gradients are but rounding.
    return w, x, x_float, 0.95 * scale.double(), zero_point


def table(grid):
    """Every integer of a grid."""
    qmin, qmax, _ = grids.limits(grid)
    return range(qmin, qmax + 1)


def neighbours(w, scale, zero_point, grid):
    """The levels around each weight, by looking at all of them, the lower integer first; twice the outer one beyond."""
    low, high = torch.empty_like(w), torch.empty_like(w)
    for o, n in itertools.product(*map(range, w.shape)):
        levels = [float(grids.decode(torch.tensor(q), scale[o, n], zero_point[o, n], grid)) for q in table(grid)]
        levels.sort()
        low[o, n] = max((level for level in levels if level <= w[o, n]), default=levels[0])
        high[o, n] = min((level for level in levels if level > w[o, n]), default=levels[-1])
    return torch.where(scale > 0, low, high), torch.where(scale > 0, high, low)


def h_of(v):
    return (torch.sigmoid(v) * (1.1 - -0.1) + -0.1).clamp(0, 1)  # Eq. 23


def unit_of(low, high, x):
    """What each row is divided by: the mean of step^2 H_jj."""
    return ((high - low).square() * x.square().sum(0)).mean(1)


def terms(v, low, high, w, x, target):
    """(the first term of Eq. 21 of each row, in its unit; h)."""
    h = h_of(v)
    w_hat = low + h * (high - low)  # Eq. 22
    return (target @ w.T - x @ w_hat.T).square().sum(0) / unit_of(low, high, x), h


def built(grid, crossed):
    w, x, x_float, scale, zero_point = problem_of(grid)
    q = grids.encode(w, scale, zero_point, grid)
    problem = Problem(w, q, scale, zero_point, grid, x.T @ x, x.T @ x_float if crossed else None)
    return problem, q, (w, x, x_float if crossed else x), neighbours(w, scale, zero_point, grid), (scale, zero_point)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("crossed", [False, True])
def test_the_start_the_gradient_and_the_error_are_those_of_the_loss(grid, crossed):
    problem, q, (w, x, target), (low, high), (scale, zero_point) = built(grid, crossed)
    free = high != low
    assert torch.equal(problem.free, free) and bool(free.any())
    v = problem.start()
    torch.testing.assert_close(h_of(v)[free], ((w - low) / (high - low))[free])
    v = torch.linspace(-3, 3, w.numel(), dtype=torch.float64).view_as(w).requires_grad_()
    loss, h = terms(v, low, high, w, x, target)
    (expected,) = torch.autograd.grad(loss.sum(), h)
    torch.testing.assert_close(problem.gradient(h.detach()), expected)
    other = problem.integers(v.detach())
    w_hat, nearest = (grids.decode(t, scale, zero_point, grid) for t in (other, q))
    torch.testing.assert_close(w_hat, torch.where(v.detach() > 0, high, low))  # h > 1/2 where v > 0
    rows = [(target @ w.T - x @ t.T).square().sum(0) for t in (w_hat, nearest)]
    # An error leaves out what no rounding changes: the difference of two is what counts.
    expected = (rows[0] - rows[1]) / unit_of(low, high, x)
    torch.testing.assert_close(problem.error(other) - problem.error(q), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("beta", [20.0, 7.3, 2.0])
def test_the_regularizer_is_that_of_equation_24(beta):
    h = torch.tensor([0.0, 0.01, 0.3, 0.5, 0.7, 0.99, 1.0], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad((1 - (2 * h - 1).abs() ** beta).sum(), h)
    torch.testing.assert_close(adaround.regularizer_gradient(h.detach(), beta), expected)


@pytest.mark.parametrize("grid", [Int(3), Int(2, symmetric=False), Balanced(2), NF4()], ids=str)
@pytest.mark.parametrize("crossed", [False, True])
def test_the_descent_is_adam_on_the_loss(grid, crossed):
    problem, _, data, (low, high), _ = built(grid, crossed)
    method = AdaRound(steps=25, rate=0.05, strength=3.0, beta=(12.0, 3.0), warmup=0.2)
    v = problem.start().requires_grad_()
    free = high != low
    adam = torch.optim.Adam([v], lr=0.05)
    for step in range(25):
        error, h = terms(v, low, high, data[0], data[1], data[2])
        loss = error.sum()
        if step >= 5:  # after the warm-up of a fifth
            beta = 12.0 + (step - 5) / 20 * (3.0 - 12.0)
            loss = loss + 3.0 * (1 - (2 * h[free] - 1).abs() ** beta).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    found = method.descend(problem)
    torch.testing.assert_close(found[free], v.detach()[free], rtol=1e-6, atol=1e-6)


def solution_error(solution, spec, w, x, target):
    size = spec.group_size or w.shape[1]
    scale, zero_point = (
        t.squeeze(-1).expand(len(w), -1).repeat_interleave(size, 1)[:, : w.shape[1]].contiguous()
        for t in (solution.scale, solution.zero_point)
    )
    w_hat = grids.decode(solution.q, scale, zero_point, spec.grid)
    return (target @ w.T - x @ w_hat.T).double().square().mean(0)


def statistics_of(x, x_float=None):
    cross = None if x_float is None else x.T @ x_float
    return Statistics(x.square().sum(0), x.T @ x, cross, num_rows=len(x), batches=1)


@pytest.mark.parametrize("crossed", [False, True])
def test_it_comes_close_to_the_best_of_all_roundings(crossed):
    grid = Int(2, symmetric=False)
    spec = QuantSpec(grid, PerChannel())
    w, x, x_float, _, _ = (t.float() for t in problem_of(grid, rows=24, length=8))
    target = x_float if crossed else x
    statistics = statistics_of(x, x_float if crossed else None)
    solution = AdaRound().solve(w, statistics, spec)
    found = solution_error(solution, spec, w, x, target)
    nearest = solution_error(RTN().solve(w, statistics, spec), spec, w, x, target)
    scale, zero_point = (t.squeeze(-1).expand(-1, 8) for t in (solution.scale, solution.zero_point))
    low, high = neighbours(w, scale, zero_point, grid)
    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)))  # all 256
    w_hat = low[:, None] + choices * (high - low)[:, None]
    best = (target @ w.T - torch.einsum("tn,ocn->cto", x, w_hat)).double().square().mean(1).amin(0)
    assert bool((found >= best * (1 - 1e-5)).all()) and bool((found <= nearest * (1 + 1e-5)).all())
    assert float((found / best).mean()) < 1.1 < float((nearest / best).mean())
    assert float((found <= best * (1 + 1e-5)).double().mean()) > 0.6
    assert solution.report["method"] == "adaround" and solution.report["unsettled"] == 0
    assert solution.report["target"] == ("float input" if crossed else "quantized input")


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(7)], ids=str)
@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_scales_are_the_searched_ones_and_chunks_do_not_matter(granularity, chunk, monkeypatch):
    w, x, _, _, _ = (t.float() for t in problem_of(Int(3)))
    spec, statistics = QuantSpec(Int(3), granularity), statistics_of(x)
    whole = AdaRound(steps=30).solve(w, statistics, spec)
    monkeypatch.setattr(adaround, "_CHUNK", chunk)
    solution = AdaRound(steps=30).solve(w, statistics, spec)
    scale, zero_point = weight_scale(w, spec, statistics.importance)
    assert torch.equal(solution.scale, scale) and torch.equal(solution.zero_point, zero_point)
    assert torch.equal(solution.q, whole.q) and solution.report == whole.report
    nearest = RTN().solve(w, statistics, spec).q
    assert int((solution.q != nearest).sum()) == solution.report["moved"] > 0


def test_a_row_that_ends_above_the_nearest_goes_back_to_it():
    """A regularizer that drowns the data drives a weight where it is nearer, or where chance will have it."""
    w, x, _, _, _ = (t.float() for t in problem_of(Int(3), rows=20))
    spec, statistics = QuantSpec(Int(3), PerChannel()), statistics_of(x)
    nearest = RTN().solve(w, statistics, spec)
    solution = AdaRound(steps=40, strength=1e6, warmup=0.0).solve(w, statistics, spec)
    left = (solution.q == nearest.q).all(1)
    assert solution.report["rows_left_nearest"] == int(left.sum()) > 5
    found, before = (solution_error(s, spec, w, x, x) for s in (solution, nearest))
    assert bool((found[~left] < before[~left]).all())
    unfinished = AdaRound(steps=1).solve(w, statistics, spec)  # h is where W_hat = W: nothing has converged
    assert unfinished.report["unsettled"] > w.numel() / 2


def test_the_units_of_weight_and_input_do_not_matter():
    w, x, _, _, _ = (t.float() for t in problem_of(Int(3)))
    spec = QuantSpec(Int(3), PerChannel())
    one, other = (AdaRound(steps=40).solve(w * a, statistics_of(x * b), spec) for a, b in ((1, 1), (2.0**-20, 2.0**12)))
    assert torch.equal(one.q, other.q)


@pytest.mark.parametrize("bad", ["none", "diagonal only", "no rows", "nan", "inf"])
def test_the_fallback_stands_in_the_report(bad):
    w, x, x_float, _, _ = (t.float() for t in problem_of(Int(3)))
    spec, statistics = QuantSpec(Int(3), PerGroup(5)), statistics_of(x, x_float)
    if bad == "none":
        statistics = None
    elif bad == "diagonal only":
        statistics.hessian = None
    elif bad == "no rows":
        statistics = Statistics.empty(12, full=True, device=torch.device("cpu"))
    elif bad == "nan":
        statistics.hessian[3, 3] = torch.nan
    else:
        statistics.cross[3, 4] = torch.inf
    solution = AdaRound().solve(w, statistics, spec)
    assert solution.report["method"] == "rtn"
    reason = "H holds NaN or Inf" if bad in ("nan", "inf") else "no calibration data reached it"
    assert solution.report["fallback"] == reason
    assert torch.equal(solution.q, RTN().solve(w, statistics, spec).q)
