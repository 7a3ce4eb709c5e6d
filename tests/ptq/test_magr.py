import math

import pytest
import torch

from quantailor import ptq
from quantailor.ptq.gptq import GPTQ
from quantailor.ptq.magr import _ROWS, MagR, largest_eigenvalue, objective, prox_largest
from quantailor.ptq.statistics import Statistics
from quantailor.spec import Int, PerChannel, PerGroup, PerTensor, QuantSpec

SIZES = [None, 4, 7, 24, 100]  # a row, six groups, a ragged one, one, and one larger than the row


def groups_of(row, size):
    return [row[i : i + (size or len(row))] for i in range(0, len(row), size or len(row))]


def clipped_by_bisection(v, alpha):
    """The height where what is cut off |v| sums to alpha, by halving an interval 200 times."""
    low, high = 0.0, float(v.abs().max())
    if float(v.abs().sum()) <= alpha:
        return torch.zeros_like(v)
    for _ in range(200):
        middle = (low + high) / 2
        if float((v.abs() - middle).clamp(min=0).sum()) > alpha:
            low = middle
        else:
            high = middle
    return v.clamp(-high, high)


def projected_on_l1(v):
    """Onto the unit l1 ball, by trying each number of entries that stay (Duchi et al. 2008, Fig. 1)."""
    if float(v.abs().sum()) <= 1:
        return v
    falling = v.abs().sort(descending=True).values
    theta = 0.0
    for count in range(1, len(v) + 1):
        candidate = (float(falling[:count].sum()) - 1) / count
        if falling[count - 1] > candidate:
            theta = candidate
    return v.sign() * (v.abs() - theta).clamp(min=0)


def magr_by_definition(w, x, alpha, size, steps):
    """Algorithm 1 for each row, from X itself."""
    x = x / torch.linalg.matrix_norm(x, ord=2)
    rows = []
    for start in w:
        row = start.clone()
        for _ in range(steps):
            v = row - x.T @ (x @ (row - start))
            row = torch.cat([part - alpha * projected_on_l1(part / alpha) for part in groups_of(v, size)])
        rows.append(row)
    return torch.stack(rows)


def cost_by_definition(w, start, x, alpha, size):
    x = x / torch.linalg.matrix_norm(x, ord=2)
    largest = [sum(float(part.abs().max()) for part in groups_of(row, size)) for row in w]
    return ((w - start) @ x.T).square().sum(1) / 2 + alpha * torch.tensor(largest, dtype=w.dtype)


def problem(rows=5, length=24, samples=100):
    """A weight and correlated inputs of different sizes, float64."""
    x = torch.randn(samples, length).double() @ (torch.eye(length) + 0.3 * torch.randn(length, length)).double()
    return torch.randn(rows, length).double(), x * torch.logspace(-0.7, 0.7, length, dtype=torch.float64)


def normalized(x):
    return x.T @ x / torch.linalg.matrix_norm(x, ord=2) ** 2


@pytest.mark.parametrize("alpha", [1e-4, 0.3, 5.0, 1e3])  # the last leaves nothing
@pytest.mark.parametrize("size", SIZES)
def test_the_prox_clips_where_a_bisection_finds_it(size, alpha):
    v = torch.randn(6, 24).double() * torch.logspace(-2, 1, 6, dtype=torch.float64)[:, None]
    v[1], v[2, 3:9] = 0.0, v[2, 2]  # nothing at all, and a tie of the largest
    expected = torch.stack([torch.cat([clipped_by_bisection(p, alpha) for p in groups_of(row, size)]) for row in v])
    found = prox_largest(v, alpha, size)
    assert torch.allclose(found, expected, atol=1e-12, rtol=0)
    projected = [torch.cat([p - alpha * projected_on_l1(p / alpha) for p in groups_of(row, size)]) for row in v]
    assert torch.allclose(found, torch.stack(projected), atol=1e-12, rtol=0)
    assert bool((found == 0).all()) == (alpha == 1e3) and not torch.equal(found, v)
    single = prox_largest(v.float(), alpha, size)
    assert torch.allclose(single.double(), expected, atol=2e-6 * float(v.abs().max()), rtol=0)


@pytest.mark.parametrize("steps", [1, 7, 40])
@pytest.mark.parametrize("size", SIZES)
def test_plain_steps_are_those_of_algorithm_1(size, steps):
    w, x = problem()
    found = MagR(iterations=steps, momentum=False).shrink(w, normalized(x), 0.05, size)
    expected = magr_by_definition(w, x, 0.05, size, steps)
    assert torch.allclose(found, expected, atol=1e-10, rtol=0) and float((found - w).abs().max()) > 0.01
    moved = found - w
    cost = cost_by_definition(expected, w, x, 0.05, size)
    assert torch.allclose(objective(moved, moved @ normalized(x), found, 0.05, size), cost, atol=1e-10, rtol=0)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("size", [None, 7])
def test_no_step_raises_a_rows_objective(size, momentum):
    w, x = problem(rows=8)
    costs = [cost_by_definition(w, w, x, 0.02, size)]
    for steps in range(1, 40):
        found = MagR(iterations=steps, momentum=momentum).shrink(w, normalized(x), 0.02, size)
        costs.append(cost_by_definition(found, w, x, 0.02, size))
    drops = torch.stack(costs[:-1]) - torch.stack(costs[1:])
    assert float(drops.min()) > -1e-12 and float(drops[0].min()) > 0


@pytest.mark.parametrize("size", [None, 7])
def test_momentum_ends_at_the_minimum_and_forty_steps_pass_a_hundred_plain_ones(size):
    w, x = problem(rows=4)
    h = normalized(x)
    best = MagR(iterations=2000).shrink(w, h, 0.05, size)
    # The problem is convex: where no step moves anything is its minimum.
    assert torch.allclose(best, prox_largest(best - (best - w) @ h, 0.05, size), atol=1e-7)
    minimum = cost_by_definition(best, w, x, 0.05, size)
    found = [MagR().shrink(w, h, 0.05, size), MagR(iterations=100, momentum=False).shrink(w, h, 0.05, size)]
    above = [cost_by_definition(f, w, x, 0.05, size) - minimum for f in found]
    assert float(above[0].min()) > -1e-9 and float(above[0].sum()) < float(above[1].sum())


def test_rows_do_not_know_of_each_other():
    (w, x), method = problem(rows=_ROWS + 3), MagR(iterations=10)
    found = method.shrink(w, normalized(x), 0.05, None)
    assert found.shape == w.shape
    for row in (0, _ROWS - 1, _ROWS, _ROWS + 2):
        assert torch.allclose(
            found[row : row + 1], method.shrink(w[row : row + 1], normalized(x), 0.05, None), atol=1e-12
        )


def test_rows_of_zeros_stay_and_dead_inputs_are_cut_for_free():
    w, x = problem()
    w[2] = 0.0
    w[:, 5] = 4.0 * w.abs().max()  # the largest of each row, and nothing ever arrives there
    x[:, 5] = 0.0
    found = MagR(iterations=250).shrink(w, normalized(x), 0.2, None)
    alive = [n for n in range(24) if n != 5]
    assert bool((found[2, alive] == 0).all())
    others = [0, 1, 3, 4]
    assert bool((found[others, 5].abs() <= found[others][:, alive].abs().amax(1) + 1e-9).all())
    expected = magr_by_definition(w, x, 0.2, None, 250)
    plain = MagR(iterations=250, momentum=False).shrink(w, normalized(x), 0.2, None)
    assert torch.allclose(plain, expected, atol=1e-9)


def statistics_of(x):
    return Statistics(x.square().sum(0).float(), (x.T @ x).float(), num_rows=len(x), batches=1)


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(7), PerTensor()], ids=str)
def test_before_takes_the_alpha_of_the_granularity_and_reports(granularity):
    (w, x), method = problem(), MagR(alpha=0.1, group_alpha=0.03, iterations=50, momentum=False)
    spec = QuantSpec(Int(3), granularity)
    kept, statistics = w.float().clone(), statistics_of(x)
    hessian = statistics.hessian.clone()
    weight = w.float()
    found, report = method.before(weight, statistics, spec)
    alpha, size = (0.03, 7) if spec.group_size else (0.1, None)
    expected = magr_by_definition(w, x, alpha, size, 50)
    assert torch.allclose(found.double(), expected, atol=1e-4) and found.dtype == torch.float32
    assert torch.equal(weight, kept) and torch.equal(statistics.hessian, hessian)
    lines = report["magr"]
    assert lines["alpha"] == alpha and lines["iterations"] == 50
    old, new = ([part.abs().max() for row in m for part in groups_of(row, size)] for m in (w, expected))
    assert lines["range"] == pytest.approx(float(sum(new) / sum(old)), rel=1e-3) and lines["range"] < 0.99
    change = ((expected - w) @ x.T).norm() / (w @ x.T).norm()
    assert lines["output_change"] == pytest.approx(float(change), rel=1e-2)


def test_half_precision_weights_keep_their_dtype():
    w, x = problem()
    found, _ = MagR(alpha=0.1).before(w.bfloat16(), statistics_of(x), QuantSpec(Int(3), PerChannel()))
    assert found.dtype == torch.bfloat16 and float(found.abs().max()) < float(w.abs().max())


def broken(value):
    return Statistics(torch.ones(6), torch.full((6, 6), value), num_rows=10, batches=1)


@pytest.mark.parametrize(
    "statistics, reason",
    [
        (None, "no calibration data"),
        (Statistics.empty(6, full=True, device=torch.device("cpu")), "no calibration data"),
        (Statistics(torch.ones(6), None, num_rows=10, batches=1), "no calibration data"),
        (Statistics(torch.zeros(6), torch.zeros(6, 6), num_rows=10, batches=1), "no calibration data"),
        (broken(math.nan), "not finite"),
        (broken(math.inf), "not finite"),
    ],
    ids=["none", "no rows", "diagonal only", "all zero", "nan", "inf"],
)
def test_without_usable_data_the_weight_stays_and_the_report_says_so(statistics, reason):
    w = torch.randn(4, 6)
    found, report = MagR().before(w, statistics, QuantSpec(Int(4), PerChannel()))
    assert found is w and reason in report["magr"]["skipped"]


def test_a_zero_weight_is_left_alone():
    _, x = problem()
    found, report = MagR().before(torch.zeros(3, 24), statistics_of(x), QuantSpec(Int(4), PerGroup(8)))
    assert bool((found == 0).all()) and report["magr"]["range"] == 1.0 and report["magr"]["output_change"] == 0.0


def test_in_a_chain_the_solver_gets_the_smaller_weight():
    (w, x), spec = problem(), QuantSpec(Int(3), PerChannel())
    chain, statistics = ptq.method("magr+gptq"), statistics_of(x)
    assert chain.needs_hessian and not chain.needs_float_path
    solution = chain.solve(w.float() * 0.02, statistics, spec)
    smaller, _ = MagR().before(w.float() * 0.02, statistics, spec)
    expected = GPTQ().solve(smaller, statistics, spec)
    assert torch.equal(solution.q, expected.q) and torch.equal(solution.scale, expected.scale)
    assert solution.report["method"] == "gptq" and solution.report["magr"]["range"] < 1
    assert not torch.equal(solution.scale, GPTQ().solve(w.float() * 0.02, statistics, spec).scale)


def test_the_largest_eigenvalue():
    for _ in range(5):
        _, x = problem()
        exact = float(torch.linalg.eigvalsh(x.T @ x)[-1])
        assert 0.99 * exact < largest_eigenvalue(x.T @ x) <= exact * (1 + 1e-12)
