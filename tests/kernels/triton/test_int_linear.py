"""The fused product against exact float sums, bit for bit, at sizes on and around the edges of blocks, steps and
groups; groups themselves, shifts and columns in float at all small sizes are in ../test_ops.py."""

import pytest
import torch

from quantailor.kernels.ops import IntegerInput, IntegerWeight, float_matmul, int_linear
from tests.kernels.triton.where import device_of_tests

DEVICE = device_of_tests()
from quantailor.kernels.triton import common  # noqa: E402
from quantailor.kernels.triton import int_linear as subject  # noqa: E402


def drawn(rows, length, out, group_size=None, shifted=False, x_groups=None, static=False, biased=True):
    groups, of_x = (1 if g is None else -(-length // g) for g in (group_size, x_groups))
    x_q = torch.randint(-128, 128, (rows, length), dtype=torch.int8)
    w_q = torch.randint(-128, 128, (out, length), dtype=torch.int8)
    x = IntegerInput(x_q, torch.rand(1) if static else torch.rand(rows, of_x), x_groups)
    shift = torch.randint(-9, 9, (out, groups)) + 0.5 if shifted else None
    return (
        x,
        IntegerWeight(w_q, torch.rand(out, groups) / 99 - 0.003, shift, group_size),
        torch.randn(out) if biased else None,
    )


def on_device(x, weight, bias):
    """The same, where the kernels run."""
    moved = [t if t is None else t.to(DEVICE) for t in (x.q, x.scale, weight.q, weight.scale, weight.shift, bias)]
    x_q, x_scale, q, scale, shift, bias = moved
    return IntegerInput(x_q, x_scale, x.group_size), IntegerWeight(q, scale, shift, weight.group_size), bias


def check(*case, dtypes=(torch.float32,)):
    expected = int_linear(*case, matmul=float_matmul)
    for dtype in dtypes:
        found = int_linear(*on_device(*case), dtype=dtype)
        assert found.dtype == dtype and torch.equal(found.cpu(), expected.to(dtype))


@pytest.mark.parametrize("rows", [1, 16, 33])
@pytest.mark.parametrize(("length", "out"), [(1, 1), (31, 63), (128, 64), (172, 65), (300, 130)])
def test_blocks_and_steps(rows, length, out):
    check(*drawn(rows, length, out))


@pytest.mark.parametrize(("length", "group_size"), [(300, 128), (320, 256), (64, 32), (100, 40)])
@pytest.mark.parametrize("shifted", [True, False])
def test_groups_of_several_steps_and_ragged_ends(length, group_size, shifted):
    check(*drawn(18, length, 66, group_size, shifted))
    check(*drawn(5, length, 66, group_size, shifted, x_groups=group_size))
    check(*drawn(5, length, 9, None, shifted, x_groups=group_size, biased=False))


def test_results_are_rounded_once():
    check(*drawn(9, 200, 70, 64, shifted=True), dtypes=(torch.bfloat16, torch.float16))


def test_one_scale_for_all_tokens_and_one_for_all_outputs():
    x, weight, bias = drawn(20, 70, 30, static=True)
    for shift in (torch.tensor([[-3.0]]), torch.randint(-9, 9, (30, 1)).float()):
        check(x, IntegerWeight(weight.q, torch.tensor([[0.3]]), shift, None), bias)


def test_the_largest_sums_do_not_overflow():
    x = IntegerInput(torch.full((3, 16384), -128, dtype=torch.int8), torch.ones(1))
    weight = IntegerWeight(torch.full((2, 16384), -128, dtype=torch.int8), torch.ones(2, 1), None, None)
    found = int_linear(*on_device(x, weight, None)[:2], None)
    assert torch.equal(found.cpu(), torch.full((3, 2), 2.0**28))


@pytest.mark.skipif(DEVICE == "cuda", reason="the autotuner tries them all there")
@pytest.mark.parametrize("config", subject.CONFIGS[::4], ids=str)
def test_blocks_of_all_kinds_give_the_same(config, monkeypatch):
    monkeypatch.setattr(common, "_compiled", {})
    monkeypatch.setattr(subject._int_linear, "configs", [config])
    tall, wide = config.kwargs["BLOCK_T"] + 1, config.kwargs["BLOCK_O"] + 1
    check(*drawn(tall, 40, wide, 32, shifted=True))
    check(*drawn(tall, 140, wide))


def test_some_block_is_left_to_try():
    for rows in (1, 16, 100, 256, 4096, 2**20):
        for groups in (1, 32):
            named = {"tuned_rows": rows, "groups": groups}
            kept = subject._worth_trying(subject.CONFIGS, named, BLOCK_N=128 if groups == 1 else 32)
            assert kept, (rows, groups)


def test_odd_types_and_empty_sides():
    x, weight, bias = drawn(3, 40, 5)
    found = int_linear(*on_device(x, weight, bias), dtype=torch.float64)
    assert torch.equal(found.cpu(), int_linear(x, weight, bias, matmul=float_matmul).double())
    none = IntegerInput(x.q[:0], x.scale[:0])
    assert int_linear(*on_device(none, weight, bias)).shape == (0, 5)


def test_the_kernel_is_what_runs(monkeypatch):
    monkeypatch.setattr(subject, "_int_linear", None)
    with pytest.raises(TypeError):
        int_linear(*on_device(*drawn(3, 40, 5)))
