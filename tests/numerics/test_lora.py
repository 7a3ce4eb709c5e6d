"""The base in fixed point, and LoftQ, against their definitions."""

import pytest
import torch

from quantailor.numerics.lora import fraction, loftq


@pytest.mark.parametrize("bits", [0, 1, 2, 4, 6, 8])
def test_a_base_with_its_fraction_rounds_to_the_same_integers(bits):
    v = torch.cat([torch.linspace(-12, 11, 4001), torch.arange(-8, 8) + 0.5, torch.arange(-8.0, 8)])
    q = torch.round(v).clamp(-8, 7).to(torch.int32)
    r = fraction(v, q, bits, -8, 7)
    base = q + r / 2**bits
    assert torch.equal(torch.round(base).to(torch.int32), q)
    assert base.min() >= -8 and base.max() <= 7
    assert (r.abs() < max(1, 2**bits // 2)).all()
    if bits >= 2:  # nothing starts on the outer edge, and inside the error is that of the fraction's own grid
        assert base.min() > -8 and base.max() < 7
        inside = (q > -8) & (q < 7) & ((v - q).abs() <= 0.5 - 2.0**-bits)
        assert (base - v)[inside].abs().max() <= 2.0 ** -(bits + 1) + 1e-6


def loftq_by_definition(w, on_grid, rank, turns):
    """Algorithm 1, in its own words: A_0 = B_0 = 0; W - Q_t decomposed."""
    low_rank = torch.zeros_like(w)
    for _ in range(turns):
        q = on_grid(w - low_rank)
        u, s, v_t = torch.linalg.svd(w - q)
        low_rank = sum(s[i] * torch.outer(u[:, i], v_t[i]) for i in range(rank))
    return q, low_rank


@pytest.mark.parametrize("turns", [1, 2, 5])
@pytest.mark.parametrize(("rank", "shape"), [(1, (12, 20)), (4, (20, 12)), (12, (12, 12))])
def test_loftq_is_its_algorithm(turns, rank, shape):
    w = torch.randn(shape)

    def on_grid(x):
        scale = x.abs().amax(1, keepdim=True) / 3
        return torch.round(x / scale).clamp(-3, 3) * scale

    base, a, b = loftq(w, on_grid, rank, turns)
    expected, low_rank = loftq_by_definition(w, on_grid, rank, turns)
    torch.testing.assert_close(base, expected)
    torch.testing.assert_close(b @ a, low_rank, rtol=1e-4, atol=1e-5)
    assert a.shape == (rank, shape[1]) and b.shape == (shape[0], rank)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-4, atol=1e-5)  # shared out evenly
    assert (w - base - b @ a).norm() < (w - on_grid(w)).norm()
