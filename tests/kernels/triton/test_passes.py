"""The passes of a GPU at sizes beyond a tile; grids, groups and odd sizes are in ../test_passes.py, which the
interpreter's process runs as well. All against numerics/, on the CPU."""

import pytest
import torch

from quantailor.kernels import passes
from quantailor.numerics import affine, grids
from quantailor.numerics.grouping import from_groups, to_groups
from quantailor.spec import Int
from tests.kernels.test_passes import oracle_lsq, weight
from tests.kernels.triton.where import device_of_tests

DEVICE = device_of_tests()
from quantailor.kernels.triton import common, fake_quantize, lsq_backward, quantize_tokens, scaled_bf16  # noqa: E402, F401


def there(*values):
    return [v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 4096), (2, 4097), (1, 9000), (2, 2, 65)])
def test_long_tokens(shape, dtype):
    x = (torch.randn(shape) * torch.logspace(-2, 2, shape[-1])).to(dtype)
    q, scale = passes.quantize_tokens(*there(x), -128, 127)
    expected_q, expected_scale = affine.quantize_dynamic(x, -128, 127)
    assert torch.equal(q.cpu(), expected_q) and torch.equal(scale.cpu(), expected_scale)


@pytest.mark.parametrize("shape", [(2, 2500, None), (2, 2500, 1200), (34, 96, 32), (5, 172, 64)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_of_many_tiles(shape, symmetric):
    grid = Int(4, symmetric=symmetric)
    w, scale, zero_point, numbers = weight(grid, *shape)
    offset, qmin, qmax, size = numbers
    zero = 0 if zero_point is None else zero_point.unsqueeze(-1)
    expected = from_groups(grids.encode(to_groups(w, size), scale.unsqueeze(-1), zero, grid), w.shape[1])
    parts = there(w, scale, zero_point)
    assert torch.equal(passes.quantize_weight(*parts, offset, qmin, qmax, size).cpu(), expected)
    grad = torch.randn_like(w)
    w_hat, grad_w, grad_scale = oracle_lsq(w, scale, zero_point, numbers, 0.0, 0.25, grad)
    assert torch.equal(passes.fake_quantize_weight(*parts, offset, qmin, qmax, size).cpu(), w_hat)
    given = there(w, grad, scale, zero_point)
    found_w, found_scale = passes.lsq_backward(*given, offset, 0.0, 0.25, qmin, qmax, size)
    assert torch.equal(found_w.cpu(), grad_w)
    close = {"rtol": 1e-5, "atol": 1e-5 * float(grad_scale.abs().max())}
    torch.testing.assert_close(found_scale.cpu(), grad_scale, **close)


@pytest.mark.parametrize(("out", "rows", "length"), [(3, 2, 1), (1, 5, 130), (6, 1, 4097), (2, 3, 9000)])
@pytest.mark.parametrize("one", [True, False])
def test_two_matrices_are_scaled_in_one_launch(out, rows, length, one):
    w, x = (torch.randint(-128, 128, (n, length), dtype=torch.int8) for n in (out, rows))
    w_scale, x_scale = torch.rand(out), torch.rand(1 if one else rows)
    for factor, scale in ((w, w_scale), (w * 0.37, None)):
        found = scaled_bf16.scaled_bf16(*there(factor, scale, x, x_scale))
        expected = passes.scaled_bf16(factor, scale), passes.scaled_bf16(x, x_scale)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_products_are_those_of_what_was_multiplied(dtype):
    grad, w, x = torch.randn(9, 24), torch.randint(-128, 128, (24, 40)).char(), torch.randint(-128, 128, (9, 40)).char()
    w_scale, x_scale = torch.rand(24), torch.rand(9)
    grad_x, grad_w = passes.gradient_products(*there(grad.to(dtype), w, w_scale, x, x_scale), dtype)
    exact_x = grad.double() @ (w * w_scale.double()[:, None])
    exact_w = grad.double().t() @ (x * x_scale.double()[:, None])
    assert grad_x.dtype == dtype and grad_w.dtype == torch.bfloat16
    for found, exact in ((grad_x, exact_x), (grad_w, exact_w)):
        assert (found.cpu().double() - exact).norm() < 2**-8 * exact.norm()


def test_ties_round_to_even_and_what_is_not_finite_stays_so():
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.49, float("inf")]])
    grid = (torch.ones(1, 1), None, 0.0, -8, 7, 8)
    q = passes.quantize_weight(*there(w, *grid))
    assert q.tolist() == [[0, 2, 2, 0, -2, -2, 3, 7]]
    w[0, 3] = float("nan")
    assert passes.fake_quantize_weight(*there(w, *grid)).isnan().tolist() == [[False] * 3 + [True] + [False] * 4]


def test_a_scale_for_all_rows_may_be_a_view():
    w, scale = torch.randn(6, 40), torch.tensor([[0.1]]).expand(6, 1)
    found = passes.quantize_weight(*there(w), scale.to(DEVICE).expand(6, 1), None, 0.0, -8, 7, 40)
    assert torch.equal(found.cpu(), affine.quantize(w, scale, 0, -8, 7))
