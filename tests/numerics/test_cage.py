"""The pull of CAGE against its formula."""

import pytest
import torch

from quantailor.numerics.affine import dequantize, quantize
from quantailor.numerics.cage import pull_, strength


@pytest.mark.parametrize("silence", [0.0, 0.25, 0.9, 1.0])
def test_strength_is_silent_and_then_a_line_to_its_largest(silence):
    steps = 40
    for step in range(steps + 1):
        begin = silence * steps
        expected = 0.0 if step <= begin else 3.0 * (step - begin) / (steps - begin)
        assert strength(3.0, step, steps, silence) == pytest.approx(expected)
    assert strength(3.0, steps, steps, 0.0) == 3.0


def test_each_weight_goes_its_share_of_the_way():
    w = torch.randn(6, 8, dtype=torch.float64)
    scale = torch.full((6, 1), 0.3, dtype=torch.float64)
    grid = dequantize(quantize(w, scale, 0, -8, 7), scale, 0)
    expected = [[a - 0.01 * 4.0 * (a - b) for a, b in zip(*rows)] for rows in zip(w.tolist(), grid.tolist())]
    pull_(w, grid, 0.01 * 4.0)
    torch.testing.assert_close(w, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("share", [1.0, 1.5, 1e9])
def test_no_weight_is_pulled_past_its_grid_point(share):
    w, grid = torch.randn(5, 5), torch.randn(5, 5)
    pull_(w, grid, share)
    torch.testing.assert_close(w, grid)


def test_the_pull_leaves_integers_alone():
    w, scale = torch.randn(30, 30), torch.tensor(0.2)
    q = quantize(w, scale, 0, -8, 7)
    for _ in range(5):
        pull_(w, dequantize(quantize(w, scale, 0, -8, 7), scale, 0), 0.3)
    assert torch.equal(quantize(w, scale, 0, -8, 7), q)
