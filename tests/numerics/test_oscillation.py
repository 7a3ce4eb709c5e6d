"""Oscillation against the paper's algorithm, one weight and one step at a time."""

import pytest
import torch

from quantailor.numerics.oscillation import Oscillation


def by_definition(history, momentum, threshold):
    """(frequency, average, frozen, integer) of one weight after `history`, the first of which is the start."""
    last, direction, f, a, frozen = history[0], 0, 0.0, float(history[0]), False
    for q in history[1:]:
        if frozen:
            continue
        change = (q > last) - (q < last)
        oscillates = change != 0 and change == -direction
        f = momentum * oscillates + (1 - momentum) * f
        a = momentum * q + (1 - momentum) * a
        direction = change or direction
        last = q
        if f > threshold:
            frozen, a = True, float(round(a))
            last = int(a)
    return f, a, frozen, last


@pytest.mark.parametrize(("momentum", "threshold"), [(0.02, 0.05), (0.3, 0.4), (0.5, 1.0), (0.2, 0.0)])
def test_it_is_the_papers_algorithm(momentum, threshold):
    steps = [torch.randint(-2, 3, (7, 5)) for _ in range(40)]
    for number in range(0, 40, 3):  # some stand still for a while
        steps[number][::2] = steps[number - 1][::2]
    found = Oscillation.start(steps[0].to(torch.int8))
    for q in steps[1:]:
        found.update(q.to(torch.int8), threshold, momentum)
    some = False
    for row in range(7):
        for column in range(5):
            f, a, frozen, last = by_definition([int(q[row, column]) for q in steps], momentum, threshold)
            assert found.frequency[row, column].item() == pytest.approx(f, abs=1e-5)
            assert found.average[row, column].item() == pytest.approx(a, abs=1e-5)
            assert bool(found.frozen[row, column]) == frozen and int(found.target[row, column]) == last
            some |= frozen
    assert some == (threshold < 1)


def test_a_drift_is_no_oscillation():
    """One way, however far, counts nothing; back and forth does."""
    drift, swing = torch.arange(-8, 8), torch.tensor([0, 1] * 8)
    found = Oscillation.start(torch.stack([drift[:1], swing[:1]]).to(torch.int8))
    for q in torch.stack([drift, swing]).T[1:]:
        found.update(q[:, None].to(torch.int8), 1.0, 0.1)
    assert found.frequency[0] == 0 and found.frequency[1] > 0.5


def test_eight_asymmetric_bits_fit():
    found = Oscillation.start(torch.tensor([[255, 0]], dtype=torch.uint8))
    for q in ([0, 255], [255, 0], [0, 255]):
        found.update(torch.tensor([q], dtype=torch.uint8), 1.0, 0.5)
    assert found.frequency[0].tolist() == [0.75, 0.75]
    assert found.target.tolist() == [[0, 255]]


def test_what_it_keeps_is_named():
    assert set(Oscillation.start(torch.zeros(2, 2)).tensors()) == {
        "last",
        "direction",
        "frequency",
        "average",
        "frozen",
    }
