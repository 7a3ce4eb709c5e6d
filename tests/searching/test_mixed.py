"""The search against every assignment there is, and what it promises."""

import itertools

import pytest
import torch

from quantailor import ptq
from quantailor.errors import UsageError
from quantailor.models.roles import find_roles
from quantailor.searching.fisher import second_order
from quantailor.searching.mixed import Search, _joint
from quantailor.searching.sensitivity import Study
from quantailor.searching.variants import unit_bytes
from quantailor.spec import Scheme
from tests.models import zoo

NAMES = ("w2a16-g16", "w3a16-g16", "w4a16-g16")


@pytest.fixture(scope="module")
def study():
    torch.manual_seed(1)
    model = zoo.llama()
    units = find_roles(model).of("q/k/v", "o", "ffn in", "ffn out")[:6]
    data = [zoo.tokens(16, 16) for _ in range(3)]
    return Study(model, units, [Scheme.parse(n) for n in NAMES], ptq.method("rtn"), data, data)


def costs_of(study):
    return {(u, s): unit_bytes(study.model, u, s) for u in study.units for s in study.schemes}


def budget_of(study, scheme):
    return sum(unit_bytes(study.model, u, Scheme.parse(scheme)) for u in study.units)


@pytest.fixture(scope="module")
def every(study):
    """Joint KL of all 3^6 assignments."""
    study.solve()
    return {
        chosen: study.measured({u: study.schemes[i] for u, i in zip(study.units, chosen)})
        for chosen in itertools.product(range(3), repeat=len(study.units))
    }


@pytest.mark.parametrize("how", ["measured", "fisher"])
def test_it_is_near_the_best_of_all_and_never_worse_than_uniform(study, every, how):
    costs, budget = costs_of(study), budget_of(study, "w3a16-g16")
    cost = {c: sum(costs[u, study.schemes[i]] for u, i in zip(study.units, c)) for c in every}
    feasible = {c: kl for c, kl in every.items() if cost[c] <= budget}
    found = Search(study, costs, budget, how=how).run()
    assert found.best.cost == cost[found.best.chosen] <= budget
    assert found.best.kl == pytest.approx(every[found.best.chosen], rel=1e-4)
    assert found.best.kl <= every[(1,) * len(study.units)] * (1 + 1e-6)
    better = sum(kl < found.best.kl * (1 - 1e-6) for kl in feasible.values())
    assert better <= (0.02 if how == "measured" else 0.15) * len(feasible), f"{better} of {len(feasible)} are better"


def test_rounds_measure_around_the_solution_and_never_lose(study):
    costs, budget = costs_of(study), budget_of(study, "w3a16-g16")
    none = Search(study, costs, budget).run(rounds=0)
    two = Search(study, costs, budget).run(rounds=2)
    assert two.best.kl <= none.best.kl
    assert [c.name for c in none.candidates] == ["uniform w2a16-g16", "uniform w3a16-g16", "sum of single layers"]
    names = [c.name for c in two.candidates]
    assert "around the solution, 1" in names
    # The second round is left out exactly where the first found nothing better to stand on.
    first = min(two.candidates[:3], key=lambda c: c.kl)
    after = [c for c in two.candidates if c.name.endswith(", 1")]
    assert ("around the solution, 2" in names) == (min(c.kl for c in after) < first.kl)


def test_differences_around_a_solution_are_measured_joint(study, every):
    search = Search(study, costs_of(study), budget_of(study, "w3a16-g16"))
    search._try("start", (1, 0, 2, 1, 1, 0))
    start = search.candidates[-1]
    scores = search._around(start)
    for u in range(len(study.units)):
        for i in range(3):
            moved = list(start.chosen)
            moved[u] = i
            assert scores[u][i] == pytest.approx(every[tuple(moved)] - start.kl, abs=1e-4 * start.kl + 1e-7)
    assert study.divergence() == pytest.approx(0.0, abs=1e-7), "the float model is back, and so is what is remembered"


def test_the_budgets_ends(study):
    costs = costs_of(study)
    least, most = budget_of(study, "w2a16-g16"), budget_of(study, "w4a16-g16")
    assert Search(study, costs, least).run().best.chosen == (0,) * len(study.units)
    assert Search(study, costs, most).run(rounds=0).best.kl <= study.measured(
        dict.fromkeys(study.units, study.schemes[2])
    )
    before = study.divergence.passes
    with pytest.raises(UsageError, match=f"{least:,}"):
        Search(study, costs, least - 1).run()
    assert study.divergence.passes == before, "told before anything is measured"


def test_joint_second_order_by_definition():
    a = torch.randn(40, 3, 2, dtype=torch.float64)
    found = _joint(a, 40.0, (1, 0, 1))

    def joint(chosen):
        return float(second_order(sum(a[:, u, c] for u, c in enumerate(chosen)), 40.0))

    for u in range(3):
        for c in range(2):
            moved = [1, 0, 1]
            moved[u] = c
            assert float(found[u, c]) == pytest.approx(joint(moved) - joint((1, 0, 1)), abs=1e-12)


def test_nothing_to_search(study):
    empty = Study(study.model, [], study.schemes, study.method, study.calibration, study.held)
    with pytest.raises(UsageError, match="no layer"):
        Search(empty, {}, 10).run()
