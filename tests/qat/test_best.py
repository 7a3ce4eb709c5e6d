"""The best iterate is kept, and put back bit for bit."""

import math

import torch
from torch import nn

from quantailor.qat.best import Best


def model_at(value: float) -> nn.Linear:
    model = nn.Linear(2, 2)
    move(model, value)
    return model


def move(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def offered(*scores):
    model = model_at(0.0)
    best = Best(model)
    taken = []
    for step, score in enumerate(scores):
        move(model, float(step))
        taken.append(best.offer(step, score))
    return model, best, taken


def test_only_what_is_strictly_better_is_taken():
    model, best, taken = offered((3.0,), (2.0,), (2.0,), (1.0,), (5.0,))
    best.restore()

    assert taken == [True, True, False, True, False] and best.step == 3 and best.score == (1.0,)
    assert torch.equal(model.weight, torch.full((2, 2), 3.0))
    best.restore_start()
    assert torch.equal(model.weight, torch.zeros(2, 2))


def test_scores_are_compared_left_to_right():
    assert offered((-0.9, 2.0), (-0.9, 1.0), (-0.8, 0.1))[1].step == 1


def test_nan_is_the_worst_of_all():
    assert offered((1.0,), (math.nan,))[1].step == 0
    assert offered((math.nan,), (9.0,))[1].step == 1
    assert offered((-0.9, math.nan), (-0.9, 1e9))[1].step == 1


def test_copies_do_not_follow_the_model_and_frozen_ones_stay():
    model = model_at(1.0)
    model.bias.requires_grad_(False)
    best = Best(model)
    best.offer(0, (1.0,))
    move(model, 7.0)
    best.restore()

    assert torch.equal(model.weight, torch.ones(2, 2)) and torch.equal(model.bias, torch.full((2,), 7.0))
    assert "bias" not in best.state
