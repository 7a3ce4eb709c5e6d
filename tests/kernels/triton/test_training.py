"""A layer's step through the operators that torch.compile and autograd see: forward and gradients are those of the
simulated layer in float64, with our kernels beneath."""

import pytest
import torch

from quantailor.kernels import passes
from quantailor.kernels.ops import IntegerInput
from quantailor.nn.int_forward import WeightGrid, fake_quantized_weight, integer_linear
from quantailor.numerics.grouping import from_groups, to_groups
from quantailor.numerics.lsq import lsq
from tests.kernels.triton.where import device_of_tests

DEVICE = device_of_tests()


@pytest.mark.parametrize("in_bf16", [True, False])
@pytest.mark.parametrize("group_size", [None, 32])
def test_a_step_of_an_integer_layer(group_size, in_bf16):
    size = group_size or 80
    x, w, bias = torch.randn(2, 9, 80), torch.randn(30, 80), torch.randn(30)
    scale = to_groups(w, size).abs().amax(-1) / 100  # clipped, and nothing on the limits, where a last bit decides
    grid = WeightGrid(0.0, 0.0, 0.1, -128, 127, group_size)
    leaves = [t.clone().to(DEVICE).requires_grad_() for t in (x, w, scale, bias)]
    q, x_scale = passes.quantize_tokens(leaves[0], -128, 127)
    y = integer_linear(*leaves, IntegerInput(q, x_scale), None, grid, in_bf16)
    upper = torch.randn(2, 9, 30)
    y.backward(upper.to(DEVICE))
    doubles = [t.double().requires_grad_() for t in (x, w, scale, bias)]
    x_hat = doubles[0] + ((q * x_scale).cpu().double() - doubles[0]).detach()
    w_hat = lsq(to_groups(doubles[1], size), doubles[2].unsqueeze(-1), 0, -128, 127, g=0.1)
    expected = x_hat @ from_groups(w_hat, 80).t() + doubles[3]
    expected.backward(upper.double())
    torch.testing.assert_close(y.detach().cpu().double(), expected.detach(), rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(leaves, doubles):
        assert mine.grad is not None and theirs.grad is not None
        error = (mine.grad.cpu().double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < (0.01 if in_bf16 else 1e-5)


def test_a_step_of_a_weight_alone():
    w, scale, upper = torch.randn(20, 70), torch.rand(20, 3) + 0.1, torch.randn(20, 70)
    leaves = [t.clone().to(DEVICE).requires_grad_() for t in (w, scale)]
    w_hat = fake_quantized_weight(*leaves, None, WeightGrid(0.0, 0.0, 0.1, -8, 7, 32))
    w_hat.backward(upper.to(DEVICE))
    plain = [t.clone().requires_grad_() for t in (w, scale)]
    expected = from_groups(lsq(to_groups(plain[0], 32), plain[1].unsqueeze(-1), 0, -8, 7, g=0.1), 70)
    expected.backward(upper)
    assert torch.equal(w_hat.cpu(), expected) and torch.equal(leaves[0].grad.cpu(), plain[0].grad)
    torch.testing.assert_close(leaves[1].grad.cpu(), plain[1].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gradient_products", "int_linear"])
def test_compilers_see_one_operator(name):
    """Schema and fake results agree with the kernels' (torch.library.opcheck); the others' are in ../test_passes.py."""
    q, scale = torch.ones(6, 40, dtype=torch.int8), torch.rand(6, 3) + 0.1
    arguments = {
        "gradient_products": (torch.randn(6, 5), q[:5], torch.rand(5), q, torch.rand(6), torch.bfloat16),
        "int_linear": (q[:3], torch.ones(3, 1), None, None, None, q, scale, None, 16, torch.rand(6), torch.bfloat16),
    }[name]
    moved = [v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in arguments]
    torch.library.opcheck(getattr(torch.ops.quantailor, name).default, tuple(moved))
