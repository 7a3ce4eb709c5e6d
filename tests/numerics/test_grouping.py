import pytest
import torch

from quantailor.numerics.grouping import from_groups, num_groups, per_element, to_groups


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("size", [None, 1, 32, 33, 1000])
def test_groups_are_runs_of_a_row(length, size):
    x = torch.randn(3, length)
    runs = [x] if size is None else list(x.split(size, dim=1))
    groups = to_groups(x, size)
    assert groups.shape[:2] == (3, num_groups(length, size)) == (3, len(runs))
    for number, run in enumerate(runs):
        assert torch.equal(groups[:, number, : run.shape[1]], run)
        assert not groups[:, number, run.shape[1] :].any()  # padding is zero
    assert torch.equal(from_groups(groups, length), x)
    values = torch.randn(3, len(runs))
    expected = torch.cat([values[:, i : i + 1].expand(-1, run.shape[1]) for i, run in enumerate(runs)], dim=1)
    assert torch.equal(per_element(values, length, size), expected)


def test_nothing_is_copied_where_nothing_is_padded():
    x = torch.randn(4, 64)
    assert to_groups(x, 32).data_ptr() == to_groups(x, None).data_ptr() == x.data_ptr()
