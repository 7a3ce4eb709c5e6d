import math

import pytest
import torch

from quantailor.numerics.hadamard import paley, random_orthogonal, rotation, walsh_hadamard


def sylvester_by_definition(n):
    """(-1)^(number of ones that i and j share in binary)."""
    rows = [[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_transform_is_a_product_with_sylvesters_matrix(size):
    x = torch.randn(3, 2, size).double()
    expected = x @ sylvester_by_definition(size) / math.sqrt(size)
    assert torch.allclose(walsh_hadamard(x), expected, atol=1e-14, rtol=0)


# I: 4, 8, 12, 20, 24, 44, 60, 84, 104 (q = order - 1).   II: 28, 36, 76 (q = 13, 17, 37), where order - 1 is no prime.
@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 36, 44, 60, 76, 84, 104])
def test_paleys_matrices_are_hadamard(order):
    matrix = paley(order)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [1, 2, 3, 5, 6, 10, 16, 22, 40, 52, 92])
def test_orders_that_no_prime_gives(order):
    """16 = 15 + 1 = 2 (7 + 1), 40 = 39 + 1 = 2 (19 + 1) and 92 = 7 * 13 + 1; 52 needs the prime power 25."""
    assert paley(order) is None


POWERS, PALEY, ODD = (
    (1, 2, 64, 512),
    (12, 20, 24, 28, 36, 40, 80, 96, 104, 144, 384, 448),
    (3, 6, 7, 14, 52, 92, 172, 43),
)


@pytest.mark.parametrize("size", [*POWERS, *PALEY, *ODD])
def test_any_size_is_orthogonal_and_hadamard_where_that_exists(size):
    q = rotation(size, seed=3)
    matrix = q.matrix()
    assert matrix.dtype == torch.float64 and matrix.shape == (size, size) and q.size == size
    assert float((matrix @ matrix.T - torch.eye(size, dtype=torch.float64)).abs().max()) < 1e-12
    assert q.is_hadamard == (size not in ODD)
    flat = float((matrix.abs() - 1 / math.sqrt(size)).abs().max())
    assert flat < 1e-12 if q.is_hadamard else flat > 1e-3


@pytest.mark.parametrize("size", [64, 40, 14, 9])
def test_rotating_is_a_product_with_signs_sylvester_and_core(size):
    q = rotation(size, seed=1)
    s = size // len(q.core)
    expected = torch.diag(q.signs) @ torch.kron(sylvester_by_definition(s) / math.sqrt(s), q.core)
    assert torch.allclose(q.matrix(), expected, atol=1e-14, rtol=0)
    x = torch.randn(2, 5, size)
    assert q.rotated(x).dtype == torch.float32
    assert torch.allclose(q.rotated(x), (x.double() @ expected).float(), atol=1e-6, rtol=0)
    assert torch.allclose(q.rotated(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


@pytest.mark.parametrize("size", [64, 12, 7])
def test_the_seed_decides(size):
    again, same, other = (
        rotation(size, seed=5).matrix(),
        rotation(size, seed=5).matrix(),
        rotation(size, seed=6).matrix(),
    )
    assert torch.equal(again, same) and not torch.equal(same, other)
    before = torch.get_rng_state()
    rotation(size, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_large_entry_is_spread_evenly():
    x = torch.zeros(1, 448)
    x[0, 17] = 448.0
    assert torch.allclose(rotation(448).rotated(x).abs(), torch.full((1, 448), math.sqrt(448)))


def test_random_orthogonal_has_no_preferred_sign():
    """Householder QR alone would give diagonals of one sign: the correction makes the mean entry vanish."""
    generator = torch.Generator().manual_seed(0)
    diagonals = torch.stack([random_orthogonal(3, generator).diagonal() for _ in range(400)])
    assert float(diagonals.mean().abs()) < 0.1


@pytest.mark.parametrize("size", [0, -4])
def test_a_size_below_one_is_refused(size):
    with pytest.raises(ValueError, match=f"n={size}"):
        rotation(size)
