"""One-pass kernels against the torch operators that say the same at length."""

import pytest
import torch

from quantailor.kernels import passes
from quantailor.kernels.native import library as native
from quantailor.kernels.triton import library as gpu
from quantailor.numerics import affine, grids
from quantailor.numerics.grouping import from_groups, to_groups
from quantailor.numerics.lsq import lsq
from quantailor.spec import Balanced, Binary, Int, Ternary

GRIDS = [Int(8), Int(4), Int(3), Int(2), Int(4, symmetric=False), Balanced(2), Ternary(), Binary()]
SHAPES = [(1, 1, None), (3, 7, None), (5, 64, 32), (33, 100, 32), (16, 257, 64), (40, 96, 96), (2, 50, 200)]


@pytest.fixture(params=["native", "torch"] + ["triton"] * gpu.interprets(), autouse=True)
def way(request, monkeypatch):
    """Every test all ways: they must agree with the oracle, hence with each other. Triton's in its interpreter alone,
    in the process of triton/test_interpreted.py."""
    if request.param == "triton":
        return request.param
    monkeypatch.setattr(gpu, "takes", lambda *tensors: False)
    if request.param == "native":
        if native.library() is None:
            pytest.skip(native.why_not())
    else:
        monkeypatch.setattr(native, "library", lambda: None)
    return request.param


def weight(grid, rows, length, group_size, seed=0):
    """(w [O, N], scale [O, G], zero_point [O, G] or None), values on edges and beyond among them."""
    torch.manual_seed(seed)
    size, groups = passes.groups_of(length, group_size)
    qmin, qmax, offset = grids.limits(grid)
    scale = (torch.rand(rows, groups) + 0.01) * torch.where(torch.rand(rows, groups) < 0.3, -1.0, 1.0)
    zero_point = None
    if isinstance(grid, Int) and not grid.symmetric:
        zero_point = torch.randint(qmin, qmax + 1, (rows, groups), dtype=torch.int32)
    steps = torch.randn(rows, groups, size) * (qmax - qmin)
    steps[..., ::5] = torch.randint(2 * qmin - 1, 2 * qmax + 2, steps[..., ::5].shape) / 2  # ties and limits
    w = from_groups(steps * scale.unsqueeze(-1), length).contiguous()
    return w, scale, zero_point, (offset, qmin, qmax, size)


def oracle_lsq(w, scale, zero_point, numbers, stretch, g, grad):
    """(w_hat, d w, d scale) by numerics.lsq, float32, on groups."""
    offset, qmin, qmax, size = numbers
    w, scale = w.clone().requires_grad_(), scale.clone().requires_grad_()
    zero = 0 if zero_point is None else zero_point.unsqueeze(-1)
    w_hat = lsq(to_groups(w, size), scale.unsqueeze(-1), zero, qmin, qmax, g=g, offset=offset, stretch=stretch)
    w_hat = from_groups(w_hat, w.shape[1])
    w_hat.backward(grad)
    return w_hat.detach(), w.grad, scale.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("qmin", "qmax"), [(-128, 127), (-8, 7), (-2, 1)])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (2, 3, 64), (7, 1000), (0, 4), (3, 17, 768)])
def test_tokens_are_quantized_as_the_formula_says(shape, qmin, qmax, dtype):
    torch.manual_seed(0)
    x = (torch.randn(shape) * torch.logspace(-3, 3, shape[-1])).to(dtype)
    q, scale = passes.quantize_tokens(x, qmin, qmax)
    expected_q, expected_scale = affine.quantize_dynamic(x, qmin, qmax)
    assert torch.equal(q, expected_q) and torch.equal(scale, expected_scale)
    assert q.dtype == torch.int8 and scale.shape == (*shape[:-1], 1)


def test_tokens_at_the_ends_of_float32():
    """Zeros, denormals, the largest number: the scale is one that has a finite reciprocal."""
    x = torch.tensor([[0.0, -0.0], [1e-45, 0.0], [3.4e38, -3.4e38], [1.2e-38, 1e-38]])
    q, scale = passes.quantize_tokens(x, -128, 127)
    expected_q, expected_scale = affine.quantize_dynamic(x, -128, 127)
    assert torch.equal(q, expected_q) and torch.equal(scale, expected_scale) and torch.isfinite(scale).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_is_not_made_to_look_sound(bad):
    x = torch.ones(3, 40)
    x[1, 7] = bad
    _, scale = passes.quantize_tokens(x, -128, 127)
    assert torch.isnan(scale[1]).all() and torch.isfinite(scale[[0, 2]]).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weights_are_encoded_and_decoded_as_grids_does(grid, shape):
    w, scale, zero_point, numbers = weight(grid, *shape)
    offset, qmin, qmax, size = numbers
    zero = 0 if zero_point is None else zero_point.unsqueeze(-1)
    expected = grids.encode(to_groups(w, size), scale.unsqueeze(-1), zero, grid)
    q = passes.quantize_weight(w, scale, zero_point, offset, qmin, qmax, size)
    assert torch.equal(q, from_groups(expected, w.shape[1]))
    w_hat = passes.fake_quantize_weight(w, scale, zero_point, offset, qmin, qmax, size)
    decoded = grids.decode(expected, scale.unsqueeze(-1), zero, grid)
    assert torch.equal(w_hat, from_groups(decoded, w.shape[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_backward_is_lsq_s(grid, shape, dtype):
    w, scale, zero_point, numbers = weight(grid, *shape, seed=1)
    grad = torch.randn_like(w).to(dtype)
    stretch = 0.0 if isinstance(grid, Int) else 0.5
    offset, qmin, qmax, size = numbers
    w_hat, expected_w, expected_scale = oracle_lsq(w, scale, zero_point, numbers, stretch, 0.125, grad.float())
    assert torch.equal(passes.fake_quantize_weight(w, scale, zero_point, offset, qmin, qmax, size), w_hat)
    found_w, found_scale = passes.lsq_backward(w, grad, scale, zero_point, offset, stretch, 0.125, qmin, qmax, size)
    assert torch.equal(found_w, expected_w)
    torch.testing.assert_close(found_scale, expected_scale, rtol=1e-5, atol=1e-5 * float(expected_scale.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize(("rows", "out"), [(1, 1), (5, 17), (64, 100)])
def test_scales_are_folded_into_the_gradient_with_one_rounding(rows, out, one, dtype):
    torch.manual_seed(0)
    grad, w_scale, x_scale = torch.randn(rows, out).to(dtype), torch.rand(out), torch.rand(1 if one else rows)
    for scale in (w_scale, None):
        for_x, for_w = passes.fold_scales(grad, scale, x_scale)
        values = grad.float()
        assert torch.equal(for_x, (values if scale is None else values * scale).bfloat16())
        assert torch.equal(for_w, (values * x_scale[:, None]).bfloat16().t()) and for_w.is_contiguous()


def test_gradients_that_are_not_finite_stay_so():
    grad = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3.4e38]])
    for_x, _ = passes.fold_scales(grad, None, torch.ones(1))
    assert torch.equal(for_x, grad.bfloat16()) or torch.equal(for_x.isnan(), grad.isnan())
    assert torch.equal(for_x[0, 1:], grad.bfloat16()[0, 1:])


def test_every_int8_is_exact_in_bfloat16():
    q = torch.arange(-128, 128, dtype=torch.int8).repeat(700)[:, None]
    assert torch.equal(passes.int8_to_bf16(q), q.bfloat16())


@pytest.mark.parametrize(
    "name", ["quantize_tokens", "quantize_weight", "fake_quantize_weight", "lsq_backward", "gradient_products"]
)
def test_compilers_see_one_operator(name):
    """Schema and fake results agree with the real ones (torch.library.opcheck)."""
    w, scale, zero_point, (offset, qmin, qmax, size) = weight(Int(4, symmetric=False), 6, 40, 16)
    arguments = {
        "quantize_tokens": (w, -128, 127),
        "quantize_weight": (w, scale, zero_point, offset, qmin, qmax, size),
        "fake_quantize_weight": (w, scale, zero_point, offset, qmin, qmax, size),
        "gradient_products": (
            torch.randn(3, 6),
            torch.ones(6, 40, dtype=torch.int8),
            torch.rand(6),
            torch.ones(3, 40, dtype=torch.int8),
            torch.rand(3),
            torch.float32,
        ),
        "lsq_backward": (w, torch.randn_like(w), scale, zero_point, offset, 0.0, 0.5, qmin, qmax, size),
    }[name]
    torch.library.opcheck(getattr(torch.ops.quantailor, name).default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize(("rows", "length", "out"), [(1, 1, 1), (40, 33, 17), (64, 96, 128)])
def test_gradient_products_are_those_of_the_folded_gradient(rows, length, out, one, dtype):
    """Off the CPU the other factors have the scales."""
    torch.manual_seed(0)
    grad, w_scale, x_scale = torch.randn(rows, out), torch.rand(out), torch.rand(1 if one else rows)
    w_q = torch.randint(-128, 128, (out, length), dtype=torch.int8)
    x_q = torch.randint(-128, 128, (rows, length), dtype=torch.int8)
    for factor, scale in ((w_q, w_scale), (w_q * 0.3, None)):
        grad_x, grad_w = passes.gradient_products(grad, factor, scale, x_q, x_scale, dtype)
        if gpu.interprets():
            w_hat, x_hat = (factor if scale is None else factor * scale[:, None]).bfloat16(), (x_q * x_scale[:, None])
            assert torch.equal(grad_x, (grad.bfloat16() @ w_hat).to(dtype))
            assert torch.equal(grad_w, grad.bfloat16().t() @ x_hat.bfloat16())
            continue
        for_x = (grad if scale is None else grad * scale).bfloat16()
        assert torch.equal(grad_x, (for_x @ factor.bfloat16()).to(dtype))
        assert torch.equal(grad_w, (grad * x_scale[:, None]).bfloat16().t().contiguous() @ x_q.bfloat16())


def test_a_later_call_does_not_touch_an_earlier_result():
    arguments = (torch.randint(-9, 9, (6, 8), dtype=torch.int8), torch.rand(6))
    rest = (torch.randint(-9, 9, (5, 8), dtype=torch.int8), torch.rand(5))
    for dtype in (torch.float32, torch.bfloat16):
        first = passes.gradient_products(torch.randn(5, 6), *arguments, *rest, dtype)
        before = [t.clone() for t in first]
        passes.gradient_products(torch.randn(5, 6), *arguments, *rest, dtype)
        assert all(torch.equal(a, b) for a, b in zip(first, before))


def test_a_scale_in_half_precision_is_the_number_that_it_is():
    """That of a model turned into bfloat16 as a whole: native code reads float32."""
    w, scale, grad = torch.randn(6, 40), (torch.rand(6, 1) + 0.1).bfloat16(), torch.randn(6, 40)
    numbers = (None, 0.0, -8, 7, 40)
    for one in (passes.quantize_weight, passes.fake_quantize_weight):
        assert torch.equal(one(w, scale, *numbers), one(w, scale.float(), *numbers))
    rest = (None, 0.0, 0.5, 0.1, -8, 7, 40)
    pairs = zip(passes.lsq_backward(w, grad, scale, *rest), passes.lsq_backward(w, grad, scale.float(), *rest))
    assert all(torch.equal(a, b) for a, b in pairs)
