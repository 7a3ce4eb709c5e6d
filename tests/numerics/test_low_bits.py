"""Ternary and binary weights, against their papers' equations a number at a time."""

import math

import pytest
import torch

from quantailor.numerics.grouping import from_groups, to_groups
from quantailor.numerics.low_bits import magnitude_scale, ternary, xnor
from quantailor.observers.weights import weight_scale
from quantailor.spec import Binary, PerChannel, PerGroup, PerTensor, QuantSpec, Ternary

SIZES = [(3, 10, 4), (2, 64, 32), (4, 172, 32), (5, 7, None)]  # rows, inputs, group: ragged, whole, ragged, a row


def groups_of(row, size):
    return [row] if size is None else [row[i : i + size] for i in range(0, len(row), size)]


def counts(length, size):
    return to_groups(torch.ones(1, length), size)[0].sum(-1, keepdim=True)


@pytest.mark.parametrize(("rows", "inputs", "size"), SIZES)
def test_absmean_ternary_is_its_equation(rows, inputs, size):
    """BitNet b1.58, Eq. 1-3: RoundClip(W / gamma, -1, 1) with gamma = mean |W|, and the identity for a gradient."""
    w = torch.randn(rows, inputs).requires_grad_()
    grouped = to_groups(w, size)
    scale = magnitude_scale(grouped.detach(), counts(inputs, size), Ternary())
    found = from_groups(ternary(grouped, scale), inputs)

    for row, got in zip(w.tolist(), found.tolist()):
        expected = []
        for part in groups_of(row, size):
            gamma = sum(map(abs, part)) / len(part)
            expected += [gamma * max(-1, min(1, round(v / gamma))) for v in part]
        assert got == pytest.approx(expected, rel=1e-5)
    upstream = torch.randn_like(w)
    found.backward(upstream)
    assert torch.equal(w.grad, upstream)


@pytest.mark.parametrize(("rows", "inputs", "size"), SIZES)
def test_xnor_is_its_equation(rows, inputs, size):
    """XNOR-Net, Eq. 6 and section 3.1: alpha = mean |W|; dC/dW_i = dC/dW~_i (1/n + [|W_i| <= 1] alpha)."""
    w = (1.5 * torch.randn(rows, inputs)).requires_grad_()
    grouped, count = to_groups(w, size), counts(inputs, size)
    found = from_groups(xnor(grouped, magnitude_scale(grouped.detach(), count, Binary()), count), inputs)
    upstream = torch.randn_like(w)
    found.backward(upstream)

    assert (w.abs() > 1).any() and (w.abs() <= 1).any()
    for row, got, grads, above in zip(w.tolist(), found.tolist(), w.grad.tolist(), upstream.tolist()):
        expected, slopes = [], []
        for part in groups_of(row, size):
            alpha = sum(map(abs, part)) / len(part)
            expected += [math.copysign(alpha, v) for v in part]
            slopes += [1 / len(part) + (alpha if abs(v) <= 1 else 0.0) for v in part]
        assert got == pytest.approx(expected, rel=1e-5)
        assert grads == pytest.approx([a * s for a, s in zip(above, slopes)], rel=1e-5)


@pytest.mark.parametrize("grid", [Ternary(), Binary()])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(32)])
def test_calibration_finds_the_same_scale(grid, granularity):
    w = torch.randn(6, 172)
    spec = QuantSpec(grid, granularity)
    whole = isinstance(granularity, PerTensor)
    grouped = to_groups(w.reshape(1, -1) if whole else w, spec.group_size)
    count = w.numel() if whole else counts(172, spec.group_size)
    assert torch.equal(magnitude_scale(grouped, count, grid), weight_scale(w, spec)[0])


def test_zeros_have_a_scale_that_can_be_divided_by():
    for grid, level in ((Ternary(), 0.0), (Binary(), 0.0)):
        scale = magnitude_scale(torch.zeros(2, 1, 8), 8, grid)
        assert torch.isfinite(scale.reciprocal()).all() and (scale > 0).all()
        on_grid = ternary(torch.zeros(2, 1, 8), scale) if grid == Ternary() else xnor(torch.zeros(2, 1, 8), scale, 8)
        assert on_grid.abs().max().item() == pytest.approx(level, abs=1e-30)
