import math

import torch

from quantailor.numerics.measures import relative_error, relative_max_difference


def test_relative_error_is_of_norms():
    x, x_hat = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert relative_error(x_hat, x) == 0.1
    assert relative_error(x, x) == 0.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(x, torch.zeros(2)) == 5.0
    assert math.isclose(relative_error(x_hat.bfloat16(), x.bfloat16()), 0.1)
    assert math.isclose(relative_error(x_hat * 1e30, x * 1e30), 0.1, rel_tol=1e-6)  # no overflow of squares


def test_relative_max_difference_never_hides_a_nan():
    x = torch.tensor([1.0, -4.0])
    assert relative_max_difference(torch.tensor([1.0, -3.0]), x) == 0.25
    assert relative_max_difference(x, torch.zeros(2)) == 4.0
    for bad in (math.nan, math.inf, -math.inf):
        assert relative_max_difference(torch.tensor([1.0, bad]), x) == math.inf
        assert relative_max_difference(x, torch.tensor([bad, 1.0])) == math.inf
        assert relative_max_difference(torch.tensor([bad]), torch.tensor([bad])) == math.inf
