"""The residual stream is followed, whatever the order of sum and norm."""

import pytest
import torch
from torch import nn

from quantailor.errors import QuantailorError
from quantailor.nn.residual import Stream, follow_norm, give_points


class Block(nn.Module):
    """[B, T, 6] -> [B, T, 6]; `after`: norms after the sums, as BERT has them."""

    def __init__(self, after=False, in_place=False):
        super().__init__()
        self.after, self.in_place = after, in_place
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm_one, self.norm_two = nn.LayerNorm(6), nn.LayerNorm(6)
        for norm in (self.norm_one, self.norm_two):
            norm.register_forward_hook(follow_norm)

    def forward(self, hidden_states):
        x = hidden_states
        if self.after:
            x = self.norm_one(x + self.one(x))
            return self.norm_two(self.two(x) + x)
        inner = self.one(self.norm_one(x))
        inner = inner + torch.ones_like(inner)  # no part of the stream
        if self.in_place:
            inner += x
            x = inner
        else:
            x = x + inner
        return torch.add(self.two(self.norm_two(x)), x)


@pytest.mark.parametrize("options", [{}, {"after": True}, {"in_place": True}])
def test_sums_of_the_stream_are_counted_and_no_others(options):
    block, x = Block(**options), torch.randn(2, 3, 6)
    with Stream(x, None) as stream:
        block(x)
    assert stream.count == 2


def on_grid(step):
    return lambda x: torch.round(x / step) * step


class OnGrid(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, x):
        return on_grid(self.step)(x)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_points_are_what_the_sums_go_through(after, by_name):
    block, x = Block(after), torch.randn(2, 3, 6)
    first, second, start = on_grid(0.25), on_grid(0.5), on_grid(0.125)
    y = start(x)
    if after:
        y = block.norm_one(first(y + block.one(y)))
        expected = block.norm_two(second(block.two(y) + y))
    else:
        y = first(y + block.one(block.norm_one(y)) + 1)
        expected = second(block.two(block.norm_two(y)) + y)
    block.residual_points = nn.ModuleList([OnGrid(0.25), OnGrid(0.5)])
    block.embedding_point = OnGrid(0.125)
    give_points(block)
    found = block(hidden_states=x) if by_name else block(x)
    assert torch.allclose(found, expected, atol=1e-6)
    assert type(block).__name__ == "Block"
    assert isinstance(block, Block)


def test_another_number_of_sums_than_were_seen_is_an_error():
    for number in (1, 3):
        block = Block()
        block.residual_points = nn.ModuleList([OnGrid(0.25) for _ in range(number)])
        give_points(block)
        with pytest.raises(QuantailorError, match="residual adds"):
            block(torch.randn(2, 3, 6))


def test_an_exception_leaves_no_mode_behind():
    class Fails(Block):
        def forward(self, hidden_states):
            super().forward(hidden_states)
            raise KeyboardInterrupt

    block = Fails()
    block.residual_points = nn.ModuleList([OnGrid(10.0), OnGrid(10.0)])
    give_points(block)
    x = torch.ones(2, 3, 6)
    with pytest.raises(KeyboardInterrupt):
        block(x)
    assert torch.equal(x + x, torch.full_like(x, 2.0))
