"""PACT against its equations, element by element."""

import pytest
import torch

from quantailor.numerics.affine import dequantize, quantize
from quantailor.numerics.pact import pact


def by_definition(x, scale, qmin, qmax, grad):
    """(x_hat, gradient of x, of scale): Eq. 1-3 on both sides of 0, one element at a time."""
    low, high = qmin * scale, qmax * scale
    x_hat, grad_x, grad_alpha_high, grad_alpha_low = [], [], 0.0, 0.0
    for value, g in zip(x.tolist(), grad.tolist()):
        x_hat.append(min(max(round(value / scale), qmin), qmax) * scale)
        inside = low < value < high
        grad_x.append(g if inside else 0.0)
        grad_alpha_high += g if value >= high else 0.0
        grad_alpha_low += g if value <= low else 0.0
    return x_hat, grad_x, grad_alpha_high * qmax + grad_alpha_low * qmin


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [0.5, 3.0, 40.0])
def test_pact_is_its_definition(bits, width):
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = (torch.randn(200, dtype=torch.float64) * width).requires_grad_()
    scale = torch.tensor([0.37], dtype=torch.float64, requires_grad=True)
    grad = torch.randn(200, dtype=torch.float64)
    found = pact(x, scale, qmin, qmax)
    found.backward(grad)
    x_hat, grad_x, grad_scale = by_definition(x.detach(), 0.37, qmin, qmax, grad)

    torch.testing.assert_close(found.detach(), torch.tensor(x_hat, dtype=torch.float64))
    torch.testing.assert_close(x.grad, torch.tensor(grad_x, dtype=torch.float64))
    assert scale.grad.item() == pytest.approx(grad_scale)


def test_its_integers_are_everybodys():
    x, scale = torch.randn(1000) * 4, torch.tensor([0.11])
    assert torch.equal(pact(x, scale, -8, 7), dequantize(quantize(x, scale, 0, -8, 7), scale, 0))


def test_on_the_clipping_level_the_gradient_is_the_levels():
    x = torch.tensor([7 * 0.5, -8 * 0.5, 6.9 * 0.5], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    pact(x, scale, -8, 7).sum().backward()
    assert x.grad.tolist() == [0, 0, 1] and scale.grad.tolist() == [7 - 8]
