import pytest
import torch

from quantailor.kernels.ops import (
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
    return IntegerWeight(integers(rows, length), torch.rand(shape) + 0.01, shift, group_size)


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
    x, x_scale = integers(*leading, 33), torch.rand((*leading, 1) if per_token else (1,)) + 0.1
    weight = draw(5, 33, group_size, shifted)
    for bias in (None, torch.randn(5)):
        found = int_linear(x, x_scale, weight, bias)
        assert found.dtype == torch.float32 and found.shape == (*leading, 5)
        reference = int_linear_reference(x, x_scale, weight, bias)
        size = max(float(reference.abs().max()), 1.0)
        assert float((found.double() - reference).abs().max()) <= 1e-6 * size
        assert torch.equal(found, int_linear(x, x_scale, weight, bias, matmul=float_matmul))


def test_the_reference_is_the_formula():
    """By loops, on a case small enough for them."""
    x, weight, bias = integers(2, 7), draw(3, 7, 3, shifted=True), torch.randn(3)
    x_scale = torch.rand(2, 1)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for t in range(2):
        for o in range(3):
            for group in range(3):
                inner = sum(
                    int(x[t, n]) * (int(weight.q[o, n]) + float(weight.shift[o, group]))
                    for n in range(group * 3, min(group * 3 + 3, 7))
                )
                expected[t, o] += inner * float(weight.scale[o, group])
            expected[t, o] = expected[t, o] * float(x_scale[t]) + float(bias[o])
    torch.testing.assert_close(int_linear_reference(x, x_scale, weight, bias), expected)


@pytest.mark.parametrize("shifted", [True, False])
def test_one_scale_for_the_whole_tensor(shifted):
    x, weight = integers(4, 20), draw(6, 20, None, shifted, per_tensor=True)
    found = int_linear(x, torch.tensor([0.5]), weight, None)
    reference = int_linear_reference(x, torch.tensor([0.5]), weight, None)
    torch.testing.assert_close(found.double(), reference, rtol=1e-6, atol=1e-6 * float(reference.abs().max()))


def test_integers_alone_are_exact():
    """With all scales 1 and whole shifts, the result is an integer, to the last bit."""
    x, q = integers(9, 50), integers(4, 50, low=-8, high=7)
    zero_point = torch.randint(0, 16, (4, 4)).float()
    weight = IntegerWeight(q, torch.ones(4, 4), -zero_point, 16)
    exact = x.long() @ (q.long() - zero_point.long().repeat_interleave(16, 1)[:, :50]).T
    assert torch.equal(int_linear(x, torch.ones(1), weight, None).long(), exact)


def test_no_tokens_give_no_rows():
    assert int_linear(integers(2, 0, 8), torch.ones(2, 0, 1), draw(3, 8, None, False), None).shape == (2, 0, 3)


def test_which_grids_have_an_integer_product():
    expected = {name: "nf4" not in name for name in KNOWN_SCHEMES if name != "float"}
    assert {n: has_integer_product(Scheme.parse(n).weight.grid) for n in expected} == expected
    assert not has_integer_product(Int(8, symmetric=False)) and has_integer_product(Int(7, symmetric=False))
    assert has_integer_product(Balanced(2)) and not has_integer_product(NF4())
