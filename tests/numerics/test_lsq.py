import pytest
import torch

from quantailor.numerics.affine import fake_quantize
from quantailor.numerics.grids import decode, encode, limits
from quantailor.numerics.lsq import gradient_scale, lsq, lsq_plus
from quantailor.spec import Balanced, Binary, Int, Ternary

GRIDS = [
    *(Int(b) for b in (2, 3, 4, 8)),
    *(Int(b, symmetric=False) for b in (2, 4, 8)),
    Int(4, narrow=True),
    Balanced(2),
    Ternary(),
    Binary(),
]
SHAPES = [((6, 10), ()), ((6, 10), (6, 1)), ((6, 10), (10,)), ((4, 3, 8), (4, 3, 1)), ((4, 3, 8), (1, 1, 1))]


def by_the_paper(x, scale, zero_point, grid, g, grad):
    """Eq. 1-3, an element at a time; zero points and half-step levels move the grid, nothing else."""
    qmin, qmax, offset = limits(grid)
    stretch = 0.0 if isinstance(grid, Int) else 0.5
    x_hat, grad_x, grad_scale = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    scales, zero_points = scale.expand_as(x), torch.as_tensor(zero_point).expand_as(x)
    for index in map(tuple, torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist()):
        s, z, v = scales[index].item(), zero_points[index].item(), (x[index] / scales[index]).item()
        q = min(max(round(v - offset) + z, qmin), qmax)
        level = q - z + offset
        x_hat[index] = level * s
        inside = qmin - stretch < v - offset + z < qmax + stretch
        grad_x[index] = grad[index] if inside else 0.0
        grad_scale[index] = grad[index] * (level - v if inside else level) * g
    return x_hat, grad_x, grad_scale.sum_to_size(scale.shape)


def draw(grid, x_shape, scale_shape):
    """x inside and outside the grid, never on an edge; the scale and zero point of each share."""
    scale = torch.empty(scale_shape, dtype=torch.float64).uniform_(0.05, 3.0)
    qmin, qmax, offset = limits(grid)
    zero_point = 0
    if isinstance(grid, Int) and not grid.symmetric:
        zero_point = torch.randint(qmin, qmax + 1, scale_shape, dtype=torch.int32)
    steps = torch.empty(x_shape, dtype=torch.float64).uniform_(qmin - 2, qmax + 2)
    steps = steps.floor() + 0.05 + 0.4 * steps.frac().abs() + 0.5 * (torch.rand(x_shape) > 0.5)
    return (steps + offset - zero_point) * scale, scale, zero_point


@pytest.mark.parametrize("x_shape, scale_shape", SHAPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_and_gradients_are_those_of_the_paper(grid, x_shape, scale_shape):
    x, scale, zero_point = draw(grid, x_shape, scale_shape)
    g, grad = 0.37, torch.randn(x_shape, dtype=torch.float64)
    qmin, qmax, offset = limits(grid)
    leaves = x.clone().requires_grad_(), scale.clone().requires_grad_()
    stretch = 0.0 if isinstance(grid, Int) else 0.5
    y = lsq(leaves[0], leaves[1], zero_point, qmin, qmax, g=g, offset=offset, stretch=stretch)
    y.backward(grad)
    expected = by_the_paper(x, scale, zero_point, grid, g, grad)
    for found, value in zip((y.detach(), leaves[0].grad, leaves[1].grad), expected):
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-9)
    assert torch.equal(decode(encode(x, scale, zero_point, grid), scale, zero_point, grid), y.detach())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_are_finite_differences_of_the_surrogate(grid):
    """The surrogate: rounding adds a constant, clipping is what it is. Central differences in float64."""
    x, scale, zero_point = draw(grid, (5, 8), (5, 1))
    qmin, qmax, offset = limits(grid)
    stretch = 0.0 if isinstance(grid, Int) else 0.5
    weights = torch.randn(5, 8, dtype=torch.float64)
    v = x / scale - offset + zero_point
    residual = (torch.round(x / scale - offset) + zero_point).clamp(qmin, qmax) - v

    def surrogate(x, scale):
        v_now = x / scale - offset + zero_point
        inside = (v > qmin - stretch) & (v < qmax + stretch)
        level = torch.where(inside, v_now + residual, v.clamp(qmin, qmax))
        return ((level - zero_point + offset) * scale * weights).sum()

    leaves = x.clone().requires_grad_(), scale.clone().requires_grad_()
    (lsq(*leaves, zero_point, qmin, qmax, g=1.0, offset=offset, stretch=stretch) * weights).sum().backward()
    for leaf, argument in zip(leaves, (0, 1)):
        for index in range(leaf.numel()):
            step = torch.zeros(leaf.numel(), dtype=torch.float64)
            step[index] = 1e-5 * float(leaf.detach().flatten()[index].abs().clamp(min=0.01))
            at = [x, scale]
            ends = []
            for sign in (1, -1):
                moved = list(at)
                moved[argument] = at[argument] + sign * step.view_as(at[argument])
                ends.append(surrogate(*moved))
            difference = (ends[0] - ends[1]) / (2 * step[index])
            gradient = leaf.grad.flatten()[index]
            assert abs(difference - gradient) <= 1e-5 * max(1.0, abs(gradient)), (argument, index)


def test_the_gradient_scale_is_that_of_section_2_2():
    assert gradient_scale(4096, 7) == (4096 * 7) ** -0.5
    assert gradient_scale(100, 0) == gradient_scale(100, -1) == 0.1  # one bit: no positive integer


def test_on_a_clip_edge_the_weight_gets_no_gradient():
    x = torch.tensor([-8.0, -7.9, 6.9, 7.0], requires_grad=True)
    scale = torch.ones(1, requires_grad=True)
    lsq(x, scale, 0, -8, 7, g=1.0).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    torch.testing.assert_close(scale.grad, torch.tensor([-8.0 - 0.1 + 0.1 + 7.0]))


def test_the_forward_is_the_plain_fake_quantization():
    x, scale = torch.randn(64, 50), torch.rand(64, 1) + 0.01
    assert torch.equal(lsq(x, scale, 0, -8, 7, g=1.0), fake_quantize(x, scale, 0, -8, 7))


def test_a_fixed_scale_costs_no_gradient():
    x = torch.randn(4, requires_grad=True)
    lsq(x, torch.ones(1), 0, -8, 7, g=1.0).sum().backward()
    assert x.grad is not None


def plus_by_definition(x, scale, zero, qmin, qmax, g, grad):
    """(x_hat, gradients of x, scale, zero), one element at a time, a scale and a zero point for all."""
    z = round(zero)
    x_hat, grad_x, grad_scale, grad_zero = [], [], 0.0, 0.0
    for value, one in zip(x.tolist(), grad.tolist()):
        v = value / scale + z
        q = min(max(round(value / scale) + z, qmin), qmax)
        x_hat.append((q - z) * scale)
        if qmin < v < qmax:
            grad_x.append(one)
            grad_scale += one * (q - v)
        else:
            grad_x.append(0.0)
            grad_scale += one * (q - z)
            grad_zero += one * -scale
    return x_hat, grad_x, grad_scale * g, grad_zero * g


@pytest.mark.parametrize("zero", [-8.0, -2.4, 0.0, 0.49, 5.5, 7.0])
@pytest.mark.parametrize("width", [0.2, 2.0, 9.0])
def test_lsq_plus_is_its_definition(zero, width):
    x = (torch.randn(300, dtype=torch.float64) * width).requires_grad_()
    scale = torch.tensor(0.31, dtype=torch.float64, requires_grad=True)
    z = torch.tensor(zero, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(300, dtype=torch.float64)
    found = lsq_plus(x, scale, z, -8, 7, g=0.05)
    found.backward(grad)
    x_hat, grad_x, grad_scale, grad_zero = plus_by_definition(x.detach(), 0.31, zero, -8, 7, 0.05, grad)

    torch.testing.assert_close(found.detach(), torch.tensor(x_hat, dtype=torch.float64))
    torch.testing.assert_close(x.grad, torch.tensor(grad_x, dtype=torch.float64))
    assert scale.grad.item() == pytest.approx(grad_scale) and z.grad.item() == pytest.approx(grad_zero)


def test_the_zero_points_gradient_is_that_of_the_papers_offset():
    """beta = -z * scale: d/d beta is 1 where clipped and 0 elsewhere, so d/d z = -scale where clipped."""
    x, scale = torch.tensor([-9.0, 0.1, 9.0]), torch.full((3,), 0.5)
    z = torch.zeros(3, requires_grad=True)
    lsq_plus(x, scale, z, -8, 7, g=1.0).sum().backward()
    assert z.grad.tolist() == [-0.5, 0.0, -0.5]


def test_lsq_plus_at_a_whole_zero_point_is_lsq():
    x, scale = torch.randn(4, 3, 16), torch.rand(4, 3, 1) + 0.01
    zero = torch.randint(-8, 8, (4, 3, 1))
    assert torch.equal(lsq_plus(x, scale, zero.float(), -8, 7, g=1.0), lsq(x, scale, zero, -8, 7, g=1.0))
    z = zero.float().requires_grad_()
    lsq_plus(x, scale, z, -8, 7, g=1.0).sum().backward()
    assert z.grad.shape == z.shape
