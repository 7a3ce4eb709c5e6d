"""Against plain counting on real tensors, and against torch's own counter of flops."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from quantailor.cost.trace import Tracer


def traced(run, *there):
    tracer = Tracer()
    tracer.own(there)
    with tracer, tracer.phase("all"):
        result = run()
    return tracer, result


def test_bytes_live_until_they_are_let_go():
    x = torch.ones(1000)

    def run():
        a = x * 2  # 4000
        b = a + 1  # 8000
        del a
        c = b * b  # 8000: a is gone
        return c.sum()  # 8000 + 4

    tracer, _ = traced(run, x)
    assert tracer.trace.peaks["all"] == 8004
    assert tracer.live == 4


def test_views_and_in_place_work_take_no_memory():
    x = torch.ones(100, 10)
    tracer, _ = traced(lambda: x.t().reshape(10, 100)[2:].add_(1), x)
    assert tracer.trace.peaks["all"] == 0
    moved = {op.name: op.moved for op in tracer.trace.ops}
    assert moved["view"] == 0 and moved["add_"] == 2 * 8 * 100 * 4


def test_flops_of_a_network_with_backward_are_those_of_torchs_counter():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8 * 36, 5))
    x = torch.randn(2, 3, 8, 8)

    def run():
        net.zero_grad()
        net(x).sum().backward()

    with FlopCounterMode(display=False) as counter:
        run()
    # torch's counter takes a grouped convolution's weight as dense in backward, which ours does not
    depthwise = 2 * 2 * 8 * 36 * 9
    tracer, _ = traced(run, x, *net.parameters())
    ours, theirs = tracer.trace.flops, counter.get_total_flops()
    first = 2 * 2 * 8 * 64 * 27
    linear = 2 * 2 * 288 * 5
    assert ours == (first * 2) + (depthwise * 3) + (linear * 3)  # the first layer's input has no gradient
    assert ours <= theirs


def test_attention_counts_both_products_and_five_in_backward():
    q = torch.randn(2, 4, 16, 8, requires_grad=True)

    def run():
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()

    tracer, _ = traced(run, q)
    product = 2 * 2 * 4 * 16 * 16 * 8
    assert tracer.trace.flops == 7 * product
