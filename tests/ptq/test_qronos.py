"""Qronos against its definition: every column by an explicit minimization of the quadratic."""

import pytest
import torch

from quantailor.numerics import grids
from quantailor.ptq.qronos import Qronos
from quantailor.ptq.statistics import Statistics
from quantailor.spec import Int, PerGroup, QuantSpec


def qronos_by_definition(w, hessian, cross, scale, zero_point, grid, damp):
    """For every t: round coordinate t at its optimum, the others where they are; then re-solve all that are left."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    h = hessian[order][:, order] + damp * torch.eye(len(hessian), dtype=w.dtype)
    g = cross[order][:, order]
    w, scale, zero_point = w[:, order], scale[:, order], zero_point[:, order]
    q = torch.empty(w.shape, dtype=torch.int8)
    for row in range(w.shape[0]):
        target = g @ w[row]
        v = w[row].clone()
        for t in range(w.shape[1]):
            others = torch.arange(w.shape[1]) != t
            optimum = (target[t] - h[t, others] @ v[others]) / h[t, t]
            q[row, t] = grids.encode(optimum, scale[row, t], zero_point[row, t], grid)
            v[t] = grids.decode(q[row, t], scale[row, t], zero_point[row, t], grid)
            if t + 1 < w.shape[1]:
                v[t + 1 :] = torch.linalg.solve(h[t + 1 :, t + 1 :], target[t + 1 :] - h[t + 1 :, : t + 1] @ v[: t + 1])
    result = torch.empty_like(q)
    result[:, order] = q
    return result


def problem(rows=5, length=20, samples=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, length, generator=generator, dtype=torch.float64)
    noisy = x + 0.2 * torch.randn(samples, length, generator=generator, dtype=torch.float64)
    return w, noisy.T @ noisy, noisy.T @ x


@pytest.mark.parametrize("grid", [Int(3), Int(2, symmetric=False), Int(4)])
@pytest.mark.parametrize("block_size", [1, 7, 999])
def test_qronos_matches_its_definition(grid, block_size):
    w, hessian, cross = problem()
    scale = (w.abs().amax(1, keepdim=True) / (2 ** (grid.bits - 1))).expand_as(w)
    zero_point = torch.full(w.shape, 0 if grid.symmetric else 2 ** (grid.bits - 1), dtype=torch.int32)
    found = Qronos(block_size=block_size).round(w, hessian, cross, scale, zero_point, grid, damp=0.3)
    assert torch.equal(found, qronos_by_definition(w, hessian, cross, scale, zero_point, grid, 0.3))


def test_without_past_error_it_is_gptq():
    """X~ = X makes G = H: what is left is GPTQ with the same damping, up to the shrinkage that damping brings."""
    w, hessian, _ = problem()
    scale, zero_point = (w.abs().amax(1, keepdim=True) / 4).expand_as(w), torch.zeros(w.shape, dtype=torch.int32)
    from quantailor.ptq.gptq import GPTQ

    plain = GPTQ().round(w, hessian, scale, zero_point, Int(3), damp=0.0)
    assert torch.equal(Qronos().round(w, hessian, hessian, scale, zero_point, Int(3), damp=0.0), plain)


def test_dead_columns_are_rounded_to_nearest():
    w, hessian, cross = problem()
    for matrix in (hessian, cross):
        matrix[:, 3] = 0
        matrix[3, :] = 0
    scale, zero_point = (w.abs().amax(1, keepdim=True) / 4).expand_as(w), torch.zeros(w.shape, dtype=torch.int32)
    q = Qronos().round(w, hessian, cross, scale, zero_point, Int(3), damp=1e-6)
    assert torch.equal(q[:, 3], grids.encode(w[:, 3], scale[:, 3], zero_point[:, 3], Int(3)))


def test_without_a_float_path_it_falls_back_and_says_so():
    torch.manual_seed(0)
    statistics = Statistics.empty(16, full=True, device=torch.device("cpu"))
    statistics.add(torch.randn(64, 16))
    solution = Qronos().solve(torch.randn(4, 16), statistics, QuantSpec(Int(4), PerGroup(8)))
    assert solution.report["method"] == "gptq" and "float model" in solution.report["fallback"]
