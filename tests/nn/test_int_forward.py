import torch

from quantailor.kernels.ops import IntegerInput, IntegerWeight, int_linear
from quantailor.nn.int_forward import integer_forward


def draw(group_size):
    x_q, q = torch.randint(-128, 128, (2, 3, 20), dtype=torch.int8), torch.randint(-8, 8, (5, 20), dtype=torch.int8)
    groups = 1 if group_size is None else -(-20 // group_size)
    x_scale, scale = torch.rand(2, 3, 1) + 0.1, torch.rand(5, groups) + 0.1
    w_hat = q * scale.repeat_interleave(group_size or 20, 1)[:, :20]
    return IntegerInput(x_q, x_scale), IntegerWeight(q, scale, None, group_size), x_q * x_scale, w_hat, torch.randn(5)


def test_forward_is_the_integer_product():
    for group_size in (None, 8):
        x, weight, x_hat, w_hat, bias = draw(group_size)
        found = integer_forward(x_hat, w_hat, bias, x, weight)
        assert torch.equal(found, int_linear(x, weight, bias))
        torch.testing.assert_close(found, torch.nn.functional.linear(x_hat, w_hat, bias), rtol=1e-5, atol=1e-4)


def test_backward_is_the_product_s_by_finite_differences():
    """The surrogate x_hat @ w_hat^T + bias is linear in each argument: central differences in float64 are exact."""
    x, weight, x_hat, w_hat, bias = draw(8)
    grad = torch.randn(2, 3, 5)
    leaves = [t.clone().requires_grad_() for t in (x_hat, w_hat, bias)]
    integer_forward(*leaves, x, weight).backward(grad)
    values = [t.double() for t in (x_hat, w_hat, bias)]
    for position, leaf in enumerate(leaves):
        for index in range(leaf.numel()):
            ends = []
            for sign in (1, -1):
                moved = [v.clone() for v in values]
                moved[position].view(-1)[index] += sign * 0.5
                ends.append((torch.nn.functional.linear(*moved) * grad).sum())
            difference = float(ends[0] - ends[1])
            assert abs(difference - float(leaf.grad.flatten()[index])) <= 1e-5 * max(1.0, abs(difference))


def test_only_what_asks_for_a_gradient_gets_one():
    x, weight, x_hat, w_hat, _ = draw(None)
    w_hat.requires_grad_()
    integer_forward(x_hat, w_hat, None, x, weight).sum().backward()
    assert w_hat.grad is not None and x_hat.grad is None
