import math

import torch

from quantailor.evaluate.divergence import kl_divergence


def test_the_sum_over_the_vocabulary():
    p, q = torch.rand(2, 3, 50, dtype=torch.float64).softmax(-1)
    expected = [[sum(a * math.log(a / b) for a, b in zip(*rows))] for rows in zip(p.tolist(), q.tolist())]
    torch.testing.assert_close(kl_divergence(p.log(), q.log())[:, None], torch.tensor(expected, dtype=torch.float64))


def test_zeros_and_nans():
    certain, open_ = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log()
    assert kl_divergence(certain, open_).item() == torch.tensor(2.0).log().item()
    assert kl_divergence(open_, certain).item() == math.inf
    assert kl_divergence(certain, certain).item() == 0.0
    broken = torch.full((2,), math.nan)
    for pair in ((broken, open_), (open_, broken), (broken, broken)):
        assert kl_divergence(*pair).item() == math.inf
