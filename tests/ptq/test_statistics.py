import math

import pytest
import torch
from torch import nn

from quantailor.errors import UntrustedInput
from quantailor.ptq.statistics import Statistics, rows_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("full", [True, False])
def test_sums_over_rows(full):
    batches = [torch.randn(n, 7) for n in (5, 1, 12, 0)]
    statistics = Statistics.empty(7, full, CPU)
    for batch in batches:
        statistics.add(batch.bfloat16() if len(batch) == 1 else batch)
    x = torch.cat([b.bfloat16().float() if len(b) == 1 else b for b in batches]).double()
    torch.testing.assert_close(statistics.diagonal.double(), (x.T @ x).diagonal(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.importance.double(), x.square().mean(0), rtol=1e-5, atol=1e-6)
    assert (statistics.num_rows, statistics.batches, statistics.rejected) == (18, 4, 0)
    if full:
        torch.testing.assert_close(statistics.hessian.double(), x.T @ x, rtol=1e-5, atol=1e-5)
    else:
        assert statistics.hessian is None


def test_how_rows_fall_into_batches_does_not_matter():
    """Every row counts once, however many came with it."""
    x = torch.randn(30, 5).round()  # whole numbers: sums are exact
    one, many = Statistics.empty(5, True, CPU), Statistics.empty(5, True, CPU)
    one.add(x)
    for part in x.split([1, 9, 20]):
        many.add(part)
    assert torch.equal(one.hessian, many.hessian) and torch.equal(one.importance, many.importance)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_is_left_out(bad):
    x = torch.randn(4, 3)
    broken = x.clone()
    broken[1, 1] = bad
    statistics, clean = Statistics.empty(3, True, CPU), Statistics.empty(3, True, CPU)
    for _ in range(99):
        statistics.add(x)
        clean.add(x)
    statistics.add(broken)
    statistics.check("layer")  # 1 of 100 is tolerated
    assert torch.equal(statistics.hessian, clean.hessian) and statistics.num_rows == clean.num_rows
    statistics.add(broken)
    with pytest.raises(UntrustedInput) as error:
        statistics.check("model.layers.3.q_proj")
    assert str(error.value).startswith("model.layers.3.q_proj: 2 of 101 calibration batches held NaN or Inf inputs")


def test_no_importance_without_data():
    assert Statistics.empty(3, True, CPU).importance is None
    zeros = Statistics.empty(3, True, CPU)
    zeros.add(torch.zeros(5, 3))
    assert zeros.importance is None
    Statistics.empty(3, True, CPU).check("nothing seen is no NaN")


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (1, 4), "padding": (0, 2), "stride": (2, 1)},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": (4, 2), "padding": "same"},  # one more on the right
        {"kernel_size": 2, "padding": "valid", "stride": 2},
        {"kernel_size": 3, "padding": 1, "groups": 3},
        {"kernel_size": (2, 3), "padding": "same", "groups": 6},
    ],
    ids=str,
)
def test_rows_of_a_convolution_times_its_weight_are_its_output(options):
    conv, x = nn.Conv2d(6, 12, bias=False, **options), torch.randn(2, 6, 9, 8)
    rows = rows_of(x, conv, None)
    weight = conv.weight.flatten(1)
    assert rows.shape[1] == weight.shape[1]
    y = conv(x)
    groups = conv.groups
    # Rows come image by image, group by group, position by position.
    per_group = rows.view(2, groups, -1, rows.shape[1])
    for group, (part, expected) in enumerate(zip(weight.chunk(groups), y.chunk(groups, dim=1))):
        found = per_group[:, group] @ part.T
        torch.testing.assert_close(found.transpose(1, 2), expected.flatten(2), rtol=1e-4, atol=1e-5)


def test_rows_of_a_linear_leave_padding_out():
    linear, x = nn.Linear(4, 2), torch.randn(2, 3, 4)
    mask = torch.tensor([[0, 1, 1], [0, 0, 1]])
    expected = torch.stack([x[0, 1], x[0, 2], x[1, 2]])
    assert torch.equal(rows_of(x, linear, mask), expected)
    assert torch.equal(rows_of(x.flatten(0, 1), linear, mask), expected)
    assert torch.equal(rows_of(x, linear, None), x.flatten(0, 1))
    pooled = torch.randn(2, 3)
    assert torch.equal(rows_of(pooled, nn.Linear(3, 2), mask), pooled)
