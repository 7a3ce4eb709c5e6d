"""Torch's product with its scales in a pass of our own, and the choice between it and the fused kernel."""

import pytest
import torch

from quantailor.kernels.ops import IntegerWeight, float_matmul, int_linear
from tests.kernels.triton.test_int_linear import check, drawn, on_device
from tests.kernels.triton.where import device_of_tests

DEVICE = device_of_tests()
from quantailor.kernels.triton import product as subject  # noqa: E402

ALL = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def found(monkeypatch):
    """What was timed, emptied."""
    monkeypatch.setattr(subject, "_found", {})
    return subject._found


@pytest.fixture
def of_torch(found, monkeypatch):
    """Torch's product wins; a call of it is noted."""
    times, calls, run = iter([2.0, 1.0] * 9), [], subject.by_torch
    monkeypatch.setattr(subject, "_milliseconds", lambda _: next(times))
    monkeypatch.setattr(subject, "by_torch", lambda *a: calls.append(1) or run(*a))
    return calls


@pytest.mark.parametrize(("rows", "length", "out"), [(17, 8, 8), (18, 200, 1032)])
def test_the_same_bits(of_torch, rows, length, out):
    for static, biased, dtypes in ((False, True, ALL), (True, False, ALL[:1])):
        check(*drawn(rows, length, out, static=static, biased=biased), dtypes=dtypes)
    x, weight, bias = drawn(rows, length, out)
    check(x, IntegerWeight(weight.q, torch.tensor([[0.3]]), None, length), bias)  # one group is none
    assert len(of_torch) == 5


def test_what_torch_s_product_does_not_take_is_ours(of_torch):
    for case in (
        drawn(16, 16, 8),
        drawn(17, 12, 8),
        drawn(17, 16, 12),
        drawn(17, 64, 8, 32),
        drawn(17, 64, 8, shifted=True),
    ):
        check(*case)
        assert subject.told().startswith("our GPU kernel (torch's product takes no groups")
    check(*drawn(17, 64, 8, x_groups=32))
    assert not of_torch and not subject._found


def test_the_choice_is_made_once_for_sizes_alike_and_told(found, monkeypatch):
    timed = []
    monkeypatch.setattr(subject, "_milliseconds", lambda run: timed.append(run()) or float(len(timed)))
    for rows in (20, 32, 33):
        int_linear(*on_device(*drawn(rows, 16, 8)))
    assert found == {(32, 16, 8): (1.0, 2.0), (64, 16, 8): (3.0, 4.0)}
    assert subject.told() == "our GPU kernel (3.000 ms; torch's product and a pass for scales 4.000)"
    assert torch.equal(timed[0], timed[1])
    found[64, 16, 8] = (3.0, 2.5)
    assert subject.told() == "torch's product and a pass for scales (2.500 ms; our GPU kernel 3.000)"


def test_a_type_that_the_pass_does_not_write_and_views(of_torch):
    x, weight, bias = on_device(*drawn(24, 32, 16))
    assert int_linear(x, weight, bias, dtype=torch.float64).dtype == torch.float64 and not of_torch
    turned = IntegerWeight(weight.q.t().contiguous().t(), weight.scale, None, None)
    expected = int_linear(x, weight, bias, matmul=float_matmul)
    assert torch.equal(int_linear(x, turned, bias), expected) and of_torch
