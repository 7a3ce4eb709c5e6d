import os
import subprocess
import sys

import pytest
import torch

from quantailor.kernels import ops
from quantailor.kernels.ops import (
    IntegerInput,
    IntegerWeight,
    float_matmul,
    has_integer_product,
    int_linear,
    int_linear_reference,
    int_matmul,
)
from quantailor.spec import KNOWN_SCHEMES, NF4, Balanced, Int, Scheme


def integers(*shape, low=-128, high=127):
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def draw(rows, length, group_size, shifted, per_tensor=False):
    groups = 1 if group_size is None else -(-length // group_size)
    shape = (1, 1) if per_tensor else (rows, groups)
    shift = torch.randint(-15, 1, shape).float() + 0.5 if shifted else None
    scale = (torch.rand(shape) + 0.01) * torch.where(torch.rand(shape) < 0.3, -1, 1)  # a weight's scale has a sign
    return IntegerWeight(integers(rows, length), scale, shift, group_size)


@pytest.mark.parametrize("has_instruction", [True, False])
def test_processors_without_an_int8_instruction_get_the_same_sums(monkeypatch, has_instruction):
    monkeypatch.setattr(ops, "multiplies_int8", lambda: has_instruction)
    x, w = (torch.randint(-128, 128, (n, 1500), dtype=torch.int8) for n in (9, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which is not to round integers
        assert torch.equal(int_matmul(x, w), (x.long() @ w.long().t()).float())


PRODUCT = """
import torch
from quantailor.kernels import ops
torch.manual_seed(0)
for tokens, length, rows in ((1, 8, 8), (33, 1000, 7), (64, 128, 64)):
    x, w = (torch.randint(-128, 128, (n, length), dtype=torch.int8) for n in (tokens, rows))
    assert torch.equal(ops.int_matmul(x, w), (x.long() @ w.long().t()).float()), (tokens, length, rows)
"""


@pytest.mark.parametrize("isa", ["SSE41", "AVX2", "AVX512_CORE", "DEFAULT"])
def test_a_product_of_torch_s_that_is_wrong_is_not_taken(isa):
    """Kept from its int8 instruction, oneDNN of torch 2.13 sums wrongly, and says nothing."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", PRODUCT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("wrong", [lambda y: y + 1, lambda y: y.clamp(max=2**15), lambda y: torch.zeros_like(y)])
def test_a_wrong_product_is_seen(wrong):
    assert ops._is_exact(lambda x, w: (x.long() @ w.long()).int())
    assert not ops._is_exact(lambda x, w: wrong((x.long() @ w.long()).int()))


@pytest.mark.parametrize("matmul", [int_matmul, float_matmul])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (3, 17, 9), (16, 64, 8), (17, 1024, 4), (40, 1025, 5)])
def test_the_inner_product_is_exact(matmul, shape):
    tokens, length, rows = shape
    for x, w in (
        (integers(tokens, length), integers(rows, length)),
        (torch.full((tokens, length), -128, dtype=torch.int8), torch.full((rows, length), -128, dtype=torch.int8)),
        (integers(tokens, length, low=127), integers(rows, length, low=126)),
    ):
        found = matmul(x, w)
        assert found.dtype == torch.float32
        assert torch.equal(found, (x.long() @ w.long().T).float())


@pytest.mark.parametrize("length", [1040, 4096, 5000])
def test_long_sums_round_once(length):
    """Beyond 2^24 a float32 sum would round on its way; both backends give the rounded exact sum."""
    x, w = integers(20, length, low=99), integers(11, length, low=98)
    exact = x.long() @ w.long().T
    assert length < 2000 or int(exact.max()) > 2**24
    assert torch.equal(int_matmul(x, w), exact.float()) and torch.equal(float_matmul(x, w), exact.float())


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("group_size", [None, 1, 7, 16, 32, 100])
@pytest.mark.parametrize("leading", [(), (1,), (6,), (2, 3)])
def test_the_formula_written_out(leading, group_size, shifted, per_token):
    x = IntegerInput(integers(*leading, 33), torch.rand((*leading, 1) if per_token else (1,)) + 0.1)
    weight = draw(5, 33, group_size, shifted)
    for bias in (None, torch.randn(5)):
        check_against_reference(x, weight, bias, leading)


def check_against_reference(x, weight, bias, leading):
    found = int_linear(x, weight, bias)
    assert found.dtype == torch.float32 and found.shape == (*leading, len(weight.q))
    reference = int_linear_reference(x, weight, bias)
    size = max(float(reference.abs().max()), 1.0)
    assert float((found.double() - reference).abs().max()) <= 1e-6 * size
    assert torch.equal(found, int_linear(x, weight, bias, matmul=float_matmul))


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("of_weight", ["none", "one a row", "the same"])
@pytest.mark.parametrize("group_size", [1, 7, 16, 32, 33, 100])
@pytest.mark.parametrize("leading", [(), (1,), (6,), (2, 3)])
def test_groups_of_activations(leading, group_size, of_weight, shifted):
    """Groups that do and do not divide the 33 inputs; a weight with one scale, one a row, or the same groups."""
    groups = -(-33 // group_size)
    x = IntegerInput(integers(*leading, 33), torch.rand(*leading, groups) + 0.1, group_size)
    weight = draw(5, 33, group_size if of_weight == "the same" else None, shifted, per_tensor=of_weight == "none")
    for bias in (None, torch.randn(5)):
        check_against_reference(x, weight, bias, leading)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("group_size", [None, 7, 32])
@pytest.mark.parametrize("columns", [[], [0], [32], [3, 6, 7, 31], list(range(33))])
@pytest.mark.parametrize("leading", [(), (1,), (2, 3)])
def test_columns_kept_in_float(leading, columns, group_size, shifted):
    x = kept_in_float(leading, columns)
    for bias in (None, torch.randn(5)):
        check_against_reference(x, draw(5, 33, group_size, shifted), bias, leading)


def kept_in_float(leading, columns):
    index = torch.tensor(columns, dtype=torch.long)
    q = integers(*leading, 33).index_fill(-1, index, 0)
    return IntegerInput(q, torch.rand(*leading, 1) + 0.1, None, index, 50 * torch.randn(*leading, len(columns)))


def test_what_is_kept_in_float_is_what_llm_int8_says():
    """Eq. 8: the int8 product without the columns of O, and the float product of these with the dequantized weight."""
    x, weight = kept_in_float((6,), [3, 17]), draw(5, 33, 8, shifted=False)
    w_hat = weight.q * weight.scale.repeat_interleave(8, 1)[:, :33]
    rest = [n for n in range(33) if n not in (3, 17)]
    eq_8 = (x.q * x.scale)[:, rest] @ w_hat[:, rest].T + x.values @ w_hat[:, [3, 17]].T
    torch.testing.assert_close(int_linear(x, weight, None), eq_8, rtol=1e-5, atol=1e-3)


def test_dequantized_inputs():
    q = torch.tensor([[1, -2, 3, 4, 0], [5, 6, -7, 8, 0]], dtype=torch.int8)
    token, group = torch.tensor([[0.5], [2.0]]), torch.tensor([[0.5, 1.0, 10.0], [2.0, 0.25, 10.0]])
    assert IntegerInput(q, token).dequantize().tolist() == [[0.5, -1, 1.5, 2, 0], [10, 12, -14, 16, 0]]
    assert IntegerInput(q, torch.tensor([2.0])).dequantize().tolist() == [[2, -4, 6, 8, 0], [10, 12, -14, 16, 0]]
    assert IntegerInput(q, group, 2).dequantize().tolist() == [[0.5, -1, 3, 4, 0], [10, 12, -1.75, 2, 0]]
    kept = IntegerInput(q, token, None, torch.tensor([4]), torch.tensor([[70.0], [-80.0]])).dequantize()
    assert kept.tolist() == [[0.5, -1, 1.5, 2, 70], [10, 12, -14, 16, -80]]


def test_groups_that_do_not_meet_are_refused():
    x = IntegerInput(integers(2, 33), torch.ones(2, 5), 8)
    with pytest.raises(ValueError, match="groups of 16 weights and of 8 activations have no common integer sums"):
        int_linear(x, draw(5, 33, 16, shifted=False), None)


def test_the_reference_is_the_formula():
    """By loops, on a case small enough for them."""
    weight, bias = draw(3, 7, 3, shifted=True), torch.randn(3)
    kept = {1: torch.randn(2), 6: torch.randn(2)}
    q = integers(2, 7).index_fill(1, torch.tensor(list(kept)), 0)
    columns, values = torch.tensor(list(kept)), torch.stack(list(kept.values()), 1)
    for x in (
        IntegerInput(q, torch.rand(2, 1)),
        IntegerInput(q, torch.rand(2, 3), 3),
        IntegerInput(q, torch.rand(2, 1), None, columns, values),
    ):
        expected = torch.zeros(2, 3, dtype=torch.float64)
        for t in range(2):
            for o in range(3):
                for n in range(7):
                    w_hat = (int(weight.q[o, n]) + float(weight.shift[o, n // 3])) * float(weight.scale[o, n // 3])
                    x_hat = int(q[t, n]) * float(x.scale[t, n // 3 if x.group_size else 0])
                    if x.columns is not None and n in kept:
                        x_hat = float(kept[n][t])
                    expected[t, o] += x_hat * w_hat
                expected[t, o] += float(bias[o])
        torch.testing.assert_close(int_linear_reference(x, weight, bias), expected)


@pytest.mark.parametrize("shifted", [True, False])
def test_one_scale_for_the_whole_tensor(shifted):
    x, weight = IntegerInput(integers(4, 20), torch.tensor([0.5])), draw(6, 20, None, shifted, per_tensor=True)
    found, reference = int_linear(x, weight, None), int_linear_reference(x, weight, None)
    torch.testing.assert_close(found.double(), reference, rtol=1e-6, atol=1e-6 * float(reference.abs().max()))


def test_integers_alone_are_exact():
    """With all scales 1 and whole shifts, the result is an integer, to the last bit."""
    x, q = integers(9, 50), integers(4, 50, low=-8, high=7)
    zero_point = torch.randint(0, 16, (4, 4)).float()
    weight = IntegerWeight(q, torch.ones(4, 4), -zero_point, 16)
    exact = x.long() @ (q.long() - zero_point.long().repeat_interleave(16, 1)[:, :50]).T
    assert torch.equal(int_linear(IntegerInput(x, torch.ones(1)), weight, None).long(), exact)
    assert torch.equal(int_linear(IntegerInput(x, torch.ones(9, 4), 16), weight, None).long(), exact)


def test_no_tokens_give_no_rows():
    for x in (
        IntegerInput(integers(2, 0, 8), torch.ones(2, 0, 1)),
        IntegerInput(integers(2, 0, 8), torch.ones(2, 0, 2), 4),
        IntegerInput(integers(2, 0, 8), torch.ones(2, 0, 1), None, torch.tensor([3]), torch.ones(2, 0, 1)),
    ):
        assert int_linear(x, draw(3, 8, None, False), None).shape == (2, 0, 3)


def test_which_grids_have_an_integer_product():
    expected = {name: "nf4" not in name for name in KNOWN_SCHEMES if name != "float"}
    assert {n: has_integer_product(Scheme.parse(n).weight.grid) for n in expected} == expected
    assert not has_integer_product(Int(8, symmetric=False)) and has_integer_product(Int(7, symmetric=False))
    assert has_integer_product(Balanced(2)) and not has_integer_product(NF4())
