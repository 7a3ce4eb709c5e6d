"""What holds for every method that a name may call, on weights and inputs that break naive ones."""

import dataclasses
import math

import pytest
import torch

from quantailor.models.prepare import prepare
from quantailor.models.structure import modules_of
from quantailor.nn.fake_quant import FakeQuantLinear
from quantailor.numerics import grids
from quantailor.numerics.grouping import to_groups
from quantailor.ptq import METHODS
from quantailor.ptq.chain import parse_method
from quantailor.ptq.driver import calibrate
from quantailor.ptq.method import Before
from quantailor.ptq.rtn import RTN
from quantailor.ptq.statistics import Statistics
from quantailor.recipe import Recipe
from quantailor.spec import NF4, Balanced, Binary, Int, PerChannel, PerGroup, QuantSpec, Scheme, Ternary
from tests.models import zoo

ROWS, LENGTH = 5, 40  # a group of 32 and a ragged one of 8
# What they promise here does not depend on how long they search.
QUICK = {
    **METHODS,
    "adaround": dataclasses.replace(METHODS["adaround"], steps=5),
    "autoround": dataclasses.replace(METHODS["autoround"], steps=4, looks=1),
    "awq": dataclasses.replace(METHODS["awq"], alphas=(0.0, 0.5)),
    "magr": dataclasses.replace(METHODS["magr"], iterations=5),
}
CHAINS = {name: parse_method(name, QUICK) for name in QUICK}
# The others do their work on blocks or models: what they leave to `solve` is RTN's, which one test below holds.
SOLVING = [n for n, c in CHAINS.items() if hasattr(QUICK[n], "solve") or c.parts_with(Before)]

SPECS = [
    QuantSpec(Int(bits, symmetric=symmetric), granularity, range="mse" if bits in (2, 4) else "minmax")
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for granularity in (PerChannel(), PerGroup(32))
]
SPECS += [QuantSpec(grid, PerGroup(32)) for grid in (Balanced(2), Ternary(), Binary(), NF4())]

WEIGHTS = {
    "ordinary": lambda w: None,
    "all zero": lambda w: w.zero_(),
    "zero group": lambda w: w[:, 32:].zero_(),
    "zero row": lambda w: w[2].zero_(),
    "constant rows": lambda w: w.copy_(torch.tensor([0.3, -2.0, 1e-5, 0.0, 7.0])[:, None].expand_as(w)),
    "1e30": lambda w: w.mul_(1e30),
    "one row of 1e30": lambda w: w[1].mul_(1e30),
    "denormal": lambda w: w.mul_(1e-42),
    "one outlier": lambda w: w[0, 0].fill_(1e4),
}


def few(x):
    return x[:7]


def duplicated(x):
    return torch.cat([x[:, :20], x[:, :20]], 1)


def dead(x):
    x[:, [0, 33]] = 0
    return x


def drowned(x):
    x[:, 5] *= 1e9
    return x


def tiny(x):
    return x * 1e-25  # squares that are 0 in float32


INPUTS = {
    "fewer rows than inputs": few,
    "duplicated columns": duplicated,
    "one token": lambda x: x[:1],
    "dead columns": dead,
    "all dead": lambda x: x * 0,
    "one input drowns the others": drowned,
    "inputs whose squares vanish": tiny,
    "inputs whose squares overflow": lambda x: x * 1e25,
    "no data": lambda x: None,
}
CASES = [(weight, "ordinary") for weight in WEIGHTS] + [("ordinary", inputs) for inputs in INPUTS]
CASES += [("1e30", "one token"), ("denormal", "dead columns"), ("all zero", "all dead")]


def case(weight, inputs, method):
    """(weight, statistics) as the driver would hand them to this method."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(ROWS, LENGTH, generator=generator)
    WEIGHTS[weight](w)
    x = torch.randn(60, LENGTH, generator=generator)
    x = x if inputs == "ordinary" else INPUTS[inputs](x)
    if x is None:
        return w, None
    statistics = Statistics.empty(LENGTH, CHAINS[method].needs_hessian, x.device, CHAINS[method].needs_float_path)
    noise = 1 + 0.05 * torch.randn(x.shape, generator=generator)
    statistics.add(x, x * noise)
    return w, statistics


def own_name(method):
    """What a solver calls itself in a report; AutoRound starts from another's solution."""
    solver = CHAINS[method].solver
    return type(getattr(solver, "start", solver)).__name__.lower()


@pytest.mark.parametrize(("weight", "inputs"), CASES, ids=str)
@pytest.mark.parametrize("method", SOLVING)
def test_every_solution_is_sound(method, weight, inputs):
    w, statistics = case(weight, inputs, method)
    before = w.clone()
    for spec in SPECS:
        solution = CHAINS[method].solve(w, statistics, spec)
        qmin, qmax, _ = grids.limits(spec.grid)
        assert solution.q.shape == w.shape and not solution.q.is_floating_point(), spec
        assert qmin <= int(solution.q.min()) and int(solution.q.max()) <= qmax, spec
        groups = 1 if spec.group_size is None else 2
        assert solution.scale.shape == solution.zero_point.shape == (ROWS, groups, 1), spec
        assert torch.isfinite(solution.scale).all() and (solution.scale != 0).all(), spec
        zero_point = solution.zero_point
        assert not zero_point.is_floating_point(), spec
        if isinstance(spec.grid, Int) and not spec.grid.symmetric:
            assert qmin <= int(zero_point.min()) and int(zero_point.max()) <= qmax, spec
        else:
            assert not zero_point.any(), spec
        levels = grids.decode(to_groups(solution.q, spec.group_size), solution.scale, zero_point, spec.grid)
        assert torch.isfinite(levels).all(), spec
        assert solution.report["method"] == own_name(method) or solution.report["fallback"], (spec, solution.report)
    assert torch.equal(w, before)


@pytest.mark.parametrize(("weight", "inputs"), CASES[:: len(WEIGHTS)] + CASES[-3:], ids=str)
@pytest.mark.parametrize("method", SOLVING)
def test_the_same_problem_has_the_same_solution(method, weight, inputs):
    for spec in (SPECS[5], SPECS[6], SPECS[-1]):
        one, other = (CHAINS[method].solve(*case(weight, inputs, method), spec) for _ in range(2))
        assert torch.equal(one.q, other.q) and torch.equal(one.scale, other.scale)
        assert torch.equal(one.zero_point, other.zero_point) and one.report == other.report


@pytest.mark.parametrize("method", [name for name in QUICK if name not in SOLVING])
def test_a_part_that_finds_no_integers_leaves_them_to_rtn_or_to_what_it_is_published_with(method):
    w, statistics = case("ordinary", "ordinary", method)
    for spec in SPECS:
        found, expected = (
            m.solve(w, statistics, spec) for m in (CHAINS[method], getattr(QUICK[method], "rounds_by", RTN()))
        )
        assert torch.equal(found.q, expected.q) and torch.equal(found.scale, expected.scale)
        assert found.report == expected.report


@pytest.mark.parametrize("method", SOLVING)
def test_a_weight_that_is_on_its_grid_is_left_alone(method):
    """Rounding has nothing to do: the solution's error is 0 as far as floats go, whatever is searched besides."""
    if CHAINS[method].parts_with(Before):
        return  # it is asked to change the weight
    _, statistics = case("ordinary", "ordinary", method)
    q = torch.randint(-8, 8, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    q[:, ::8], q[:, 1::8] = -8, 7  # both ends in every group
    w = q * 0.25
    for spec in (QuantSpec(Int(4, symmetric=False), PerGroup(32)), QuantSpec(Int(4, symmetric=False), PerChannel())):
        if statistics.cross is not None:
            statistics.cross = statistics.hessian.clone()  # no error of the past to make up for
        found = CHAINS[method].solve(w, statistics, spec)
        levels = grids.decode(to_groups(found.q, spec.group_size), found.scale, found.zero_point, spec.grid)
        torch.testing.assert_close(levels.flatten(1)[:, :LENGTH], w, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model", [zoo.llama, zoo.bert, zoo.gpt2], ids=lambda model: model.__name__)
@pytest.mark.parametrize("method", QUICK)
def test_every_layer_of_a_model_has_its_report(method, model):
    model = model()
    prepare(model, Recipe(Scheme.parse("w3a16-g32")))
    state = calibrate(model, [zoo.tokens(9, 6), zoo.tokens(5, 8)], lambda _: CHAINS[method])
    layers = dict(modules_of(model, FakeQuantLinear))
    assert set(state.layers) == set(layers) and len(layers) >= 8
    known = {*QUICK, own_name(method), "rtn"}
    for name, layer in layers.items():
        report = state.layers[name]
        assert report["method"] in known, name
        assert 0 <= report["weight_error"] < math.inf and torch.isfinite(layer.fake_weight()).all(), name
        found = layer.weight_quantizer.integers(layer.weight_ON)
        assert int(found.min()) >= -4 and int(found.max()) <= 3, name
        if "fallback" in report:
            assert any(name in note for note in state.notes), name
        if method not in SOLVING:  # what it did, or why it did nothing, stands beside RTN's lines
            assert set(report) - {"method", "range", "weight_error", "output_error", "rows"}, name
    logits = model(**zoo.tokens(4)).logits
    assert torch.isfinite(logits).all()
