import torch

from quantailor.numerics.sign import fake_quantize_sign, quantize_sign


def test_signs_and_the_mean_magnitude_of_a_row():
    x = torch.tensor([[[1.0, -2.0, 0.0, -0.0], [0.0, 0.0, 0.0, 0.0]]])
    q, scale = quantize_sign(x)
    assert q.dtype == torch.int8 and q.tolist() == [[[1, -1, 1, 1], [1, 1, 1, 1]]]
    assert scale.tolist() == [[[0.75], [1.0]]]


def test_the_gradient_is_that_of_the_clipped_identity_times_the_scale():
    """Section 3.1: d sign/dx = 1 where |x| <= 1; the scale is held fixed."""
    x = torch.tensor([[0.5, -1.0, 1.5, -3.0]], requires_grad=True)
    y = fake_quantize_sign(x)
    assert torch.equal(y, torch.tensor([[1.5, -1.5, 1.5, -1.5]]))
    y.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert torch.equal(x.grad, torch.tensor([[1.0, 2.0, 0.0, 0.0]]) * 1.5)


def test_half_precision_stays_half_precision():
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    y = fake_quantize_sign(x)
    y.sum().backward()
    q, scale = quantize_sign(x)
    assert y.dtype == x.grad.dtype == torch.bfloat16 and torch.equal(y, (q * scale).bfloat16())
