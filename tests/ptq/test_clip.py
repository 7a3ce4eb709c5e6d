"""Clipped ranges against the paper's search written with loops over rows, groups and ratios."""

import dataclasses
import itertools

import pytest
import torch

from quantailor.models.prepare import prepare
from quantailor.numerics import grids
from quantailor.observers.weights import weight_scale
from quantailor.ptq.clip import Clip, diagonal_blocks
from quantailor.ptq.driver import calibrate
from quantailor.ptq.rtn import RTN
from quantailor.ptq.statistics import Statistics
from quantailor.recipe import Recipe
from quantailor.spec import PerTensor, QuantSpec, Scheme
from tests.models import zoo

RATIOS = Clip().ratios


def correlated(length, rows=60):
    x = torch.randn(rows, length) @ (torch.eye(length) + 0.4 * torch.randn(length, length) / length**0.5)
    return x, Statistics(x.square().sum(0), x.T @ x, num_rows=rows, batches=1)


def by_definition(w, x, spec):
    """Every group of every row tries every range on the real inputs; the searched range wins ties."""
    size, plain = spec.group_size or w.shape[1], dataclasses.replace(spec, range="minmax")
    searched = weight_scale(w, spec, x.square().mean(0))
    q = torch.empty_like(w, dtype=torch.int8)
    for row, start in itertools.product(range(len(w)), range(0, w.shape[1], size)):
        part = slice(start, start + size)
        group, inputs, largest = w[row, part], x[:, part].double(), w[row, part].abs().max()
        tries = [tuple(t[row, start // size, 0] for t in searched)]
        for ratio in RATIOS:
            clamped = group.clamp(-ratio * largest, ratio * largest)
            tries.append(tuple(t[0, 0, 0] for t in weight_scale(clamped[None], plain)))
        errors = []
        for scale, zero_point in tries:
            levels = grids.decode(grids.encode(group, scale, zero_point, spec.grid), scale, zero_point, spec.grid)
            errors.append(float((inputs @ (levels - group).double()).square().sum()))
        scale, zero_point = tries[errors.index(min(errors))]
        q[row, part] = grids.encode(group, scale, zero_point, spec.grid)
    return q


@pytest.mark.parametrize(
    "scheme", ["w4a16-g32", "w3a16-g32-asym", "w2a16-g16", "w4a16", "w3a16-asym", "w2a16-g32-balanced"]
)
@pytest.mark.parametrize("length", [32, 72])  # one group, and a last one that is short
def test_each_group_takes_the_range_with_the_least_output_error(scheme, length):
    torch.manual_seed(1)
    w, spec = torch.randn(7, length), Scheme.parse(scheme).weight
    w[:, ::9] *= 4  # outliers, so that clipping pays
    x, statistics = correlated(length)
    found = Clip().solve(w, statistics, spec)
    assert torch.equal(found.q, by_definition(w, x, spec))
    assert found.report["method"] == "clip" and 0 < found.report["clipped"] <= 1


def test_one_scale_for_all_is_chosen_by_the_error_of_all():
    torch.manual_seed(2)
    w = torch.randn(5, 24)
    w[0, 0] = 9.0
    x, statistics = correlated(24)
    spec = QuantSpec(Scheme.parse("w4a16").weight.grid, PerTensor())
    found = Clip().solve(w, statistics, spec)
    errors = []
    for scale in [weight_scale(w, spec, statistics.importance)[0]] + [
        weight_scale(w.clamp(-r * 9.0, r * 9.0), dataclasses.replace(spec, range="minmax"))[0] for r in RATIOS
    ]:
        levels = grids.decode(grids.encode(w, scale[0], 0, spec.grid), scale[0], 0, spec.grid)
        errors.append((float((x @ (levels - w).t()).square().sum()), float(scale)))
    assert found.scale.shape == (1, 1, 1) and float(found.scale) == min(errors)[1]


def test_the_blocks_of_a_matrix():
    h = torch.arange(49.0).view(7, 7)
    blocks = diagonal_blocks(h, 3)
    assert torch.equal(blocks[0], h[:3, :3]) and torch.equal(blocks[1], h[3:6, 3:6])
    assert blocks[2].tolist() == [[48, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert torch.equal(diagonal_blocks(h, None)[0], h)


def test_its_output_error_within_groups_is_never_above_that_of_rtn():
    torch.manual_seed(3)
    w, spec = torch.randn(40, 96), Scheme.parse("w3a16-g32").weight
    x, statistics = correlated(96)

    def errors(q, scale):
        d = (q.float().view(40, 3, 32) * scale - w.view(40, 3, 32)).transpose(0, 1)
        return torch.stack([(d[g] @ x.view(-1, 3, 32)[:, g].T).square().sum(-1) for g in range(3)])

    clip, rtn = (m.solve(w, statistics, spec) for m in (Clip(), RTN()))
    ours, theirs = errors(clip.q, clip.scale), errors(rtn.q, rtn.scale)
    assert bool((ours <= theirs * (1 + 1e-5)).all()) and float(ours.sum()) < 0.97 * float(theirs.sum())


@pytest.mark.parametrize("broken", [None, "no rows", "no hessian", "nan"])
def test_without_usable_statistics_it_is_rtn_and_says_why(broken):
    w, spec = torch.randn(4, 32), Scheme.parse("w4a16-g32").weight
    _, statistics = correlated(32)
    if broken == "no rows":
        statistics = Statistics.empty(32, True, torch.device("cpu"))
    elif broken == "no hessian":
        statistics.hessian = None
    elif broken == "nan":
        statistics.hessian[0, 0] = float("nan")
    else:
        statistics = None
    found, rtn = Clip().solve(w, statistics, spec), RTN().solve(w, statistics, spec)
    assert torch.equal(found.q, rtn.q) and found.report["method"] == "rtn" and found.report["fallback"]


def test_a_model_is_clipped_by_name():
    model = zoo.llama()
    state = prepare(model, Recipe(Scheme.parse("w3a16-g32")))
    calibrate(model, [zoo.tokens(20, 11)], lambda _: Clip())
    assert {report["method"] for report in state.layers.values()} == {"clip"}
