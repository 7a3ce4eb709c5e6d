"""The tree: every leaf is reached, every set of facts has an answer with reasons, and every other way a why-not."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest

from quantailor.errors import UsageError
from quantailor.searching import decision
from quantailor.searching.decision import FRAGILE, LEAVES, LOSSES, WAYS, Facts, decide

BIG, SMALL = 10**9, 10**5
F = Facts(bits=4, grouped=True, parameters=BIG, rows=10_000)


def facts(**changes) -> Facts:
    return dataclasses.replace(F, **changes)


TABLE = [  # facts, way, leaf, whether the tolerance is expected to be met
    ({"kernel": False, "must_be_faster": True}, "none", "no kernel", None),
    ({"pretrained": False, "architecture": "native", "bits": 1}, "scratch", "native scratch", None),
    ({"pretrained": False}, "scratch", "no weights", None),
    ({"pretrained": False, "rows": None}, "none", "no weights, no data", None),
    ({"bits": 8}, "ptq", "ptq is enough", True),
    ({}, "ptq", "ptq is enough", True),
    ({"rows": None, "bits": 2}, "ptq", "no data", False),
    ({"bits": 2, "budget": 1.0, "costs": {"hybrid": 2.0}}, "ptq", "no money", False),
    ({"bits": 2, "fits": {"qat": False, "lora-qat": False}}, "ptq", "no memory", False),
    ({"bits": 2, "fits": {"qat": False}}, "lora-qat", "lora", None),
    ({"bits": 2}, "qat", "few bits", None),
    ({"bits": 2, "parameters": SMALL}, "qat", "few bits", False),
    ({"bits": 1, "ternary_or_binary": True}, "qat", "few bits", None),
    ({"bits": 2, "budget": 2.0, "costs": {"hybrid": 1.0, "qat": 3.0}}, "hybrid", "short of money", False),
    ({"bits": 2, "rows": 500}, "hybrid", "few rows", False),
    ({"bits": 4, "parameters": SMALL, "rows": 500}, "hybrid", "few rows", None),
    ({"bits": 4, "parameters": SMALL, "tolerance": 0.03}, "hybrid", "near", True),
    ({"bits": 4, "parameters": SMALL, "budget": 2.0, "costs": {"qat": 3.0}}, "hybrid", "short of money", None),
    ({"bits": 4, "parameters": SMALL}, "qat", "within reach", True),
    ({"bits": 4, "grouped": False}, "qat", "within reach", True),
    ({"bits": 3, "parameters": SMALL}, "qat", "far", False),
    ({"bits": 4, "grouped": False, "tolerance": 0.005}, "qat", "far", False),
]  # fmt: skip


@pytest.mark.parametrize(("change", "way", "leaf", "within"), TABLE)
def test_each_leaf(change, way, leaf, within):
    found = decide(facts(**change))

    assert (found.way, found.leaf) == (way, leaf)
    assert found.within is within
    assert found.reasons and all(r.text and r.source for r in found.reasons)
    json.dumps(found.to_json(), allow_nan=False)


def test_the_table_reaches_every_leaf():
    assert {row[2] for row in TABLE} == set(LEAVES)


def test_every_combination_is_answered_and_every_other_way_has_its_why_not():
    seen = set()
    for bits, grouped, size, pretrained, signs, rows, money, memory, kernel, faster in itertools.product(
        (1, 2, 3, 4, 5, 8), (True, False), (SMALL, BIG), (True, False), (True, False), (None, 10, 10**6),
        (None, 0.5, 1.5, 2.5), ({}, {"qat": False}, {"qat": False, "lora-qat": False}), (True, False), (True, False),
    ):  # fmt: skip
        costs = {"ptq": 0.1, "hybrid": 1.0, "qat": 2.0, "progressive": 3.0, "lora-qat": 1.8, "scratch": 1e6}
        given = Facts(
            bits=bits, grouped=grouped, parameters=size, pretrained=pretrained, ternary_or_binary=signs and bits < 3,
            rows=rows, budget=money, costs=costs, fits=memory, kernel=kernel, must_be_faster=faster,
        )  # fmt: skip
        found = decide(given)
        seen.add(found.leaf)
        assert found.way in WAYS and set(found.rejected) == set(WAYS) - {found.way}
        for other in found.rejected:
            assert len(found.why_not(other)) > 20
        if found.way in ("hybrid", "qat", "progressive", "lora-qat"):
            assert rows is not None and pretrained and (money is None or costs["hybrid"] <= money)
        if found.way == "qat":
            assert given.holds("qat")
    assert seen >= set(LEAVES) - {"native scratch", "near"}


def test_why_not_of_what_was_chosen_or_of_nothing():
    found = decide(F)
    with pytest.raises(UsageError, match="chosen"):
        found.why_not("ptq")
    with pytest.raises(UsageError, match="no way"):
        found.why_not("magic")


def test_a_missing_kernel_is_a_warning_before_anything_runs():
    found = decide(facts(kernel=False))
    assert found.way == "ptq" and any("not faster" in w for w in found.warnings)


@pytest.mark.parametrize(
    "change", [{"bits": 0}, {"bits": 9}, {"architecture": "x"}, {"tolerance": 1.0}, {"tolerance": -0.1}]
)
def test_facts_that_cannot_be(change):
    with pytest.raises(UsageError):
        facts(**change)


RESULTS = Path(__file__).parents[2] / "bench" / "results"


@pytest.mark.parametrize(("model", "size"), [("stories260k", 260_032), ("tinystories-llama-4m", 3_700_000)])
def test_the_tree_against_what_fit_found(model, size):
    """PTQ exactly where `fit` stopped at PTQ; training wherever `fit` trained."""
    for row in json.loads((RESULTS / f"fit_{model}.json").read_text())["fits"]:
        found = decide(Facts(bits=int(row["scheme"][1]), grouped="-g" in row["scheme"], parameters=size, rows=100_000))
        for verdict in row["verdicts"]:
            assert (found.way == "ptq") == (verdict == "ptq"), row["scheme"]


def test_losses_are_those_of_the_result_files():
    def ratio(name, scheme, rung):
        row = next(r for r in json.loads((RESULTS / f"fit_{name}.json").read_text())["fits"] if r["scheme"] == scheme)
        return row["runs"][0]["values"][rung] / row["runs"][0]["values"]["float"] - 1

    assert LOSSES[8, True].low == pytest.approx(ratio("tinystories-llama-4m", "w8a8", "rtn"), abs=1e-4)
    assert LOSSES[8, True].high == pytest.approx(ratio("stories260k", "w8a8", "rtn"), abs=1e-4)
    assert all(e.low <= e.high and e.source for e in LOSSES.values()) and math.isinf(LOSSES[1, True].high)
    fits = json.loads((RESULTS / "fit_stories260k.json").read_text())["fits"]
    (at_4_bits,) = [row for row in fits if row["scheme"] == "w4a16-g32"]
    assert abs(decision._TAKEN_BACK["qat"] - at_4_bits["recovery"]["mean"]) < 5e-3
    runs = [run["values"] for run in at_4_bits["runs"]]
    short = [(v["blockap"] - v["hybrid"]) / (v["blockap"] - v["float"]) for v in runs]
    assert abs(decision._TAKEN_BACK["hybrid"] - sum(short) / len(short)) < 5e-3
    assert FRAGILE > 260_032
