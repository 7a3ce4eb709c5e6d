"""What the builders take out of receipts: verdicts, figures, rows, curves with alarms; and what they leave out."""

import copy
import json
import math

import pytest

from quantailor.errors import UntrustedInput
from quantailor.pages import folders, results
from quantailor.pages.curves import loss_chart, training_chart
from quantailor.pages.document import (
    Bins,
    Heat,
    Intervals,
    Lines,
    Pairs,
    Pareto,
    Remarks,
    Table,
    finite,
    pair,
    say,
    section,
)
from quantailor.pages.layers import error_heat, inventory_table, merged_rows
from quantailor.pages.reading import Found
from quantailor.pages.several import compared
from tests.pages.making import FIT, MANIFEST, RECEIPT


def blocks(document, id):
    return next((s.blocks for s in document.sections if s.id == id), ())


def one(document, id, kind):
    (found,) = [b for b in blocks(document, id) if isinstance(b, kind)]
    return found


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


# ------------------------------------------------------------------------------------------------ fit


def test_fit_gives_the_verdict_and_the_four_figures():
    page = folders.fitted(FIT, RECEIPT, MANIFEST, "w4")
    assert (page.verb, page.subject, page.verdict.state) == ("fit", "w4", "good")
    assert page.verdict.sentence.key == "verdict.hybrid"
    values = page.verdict.sentence.values
    assert (values["before"], values["after"], values["tolerance"]) == ("10", "10.10", "2 %")
    assert values["loss"] == say("loss.worse", share="1.00 %")
    assert [f.value for f in page.figures] == ["10.10", "1.00 MB", "4.50", say("proof.equal")]
    assert page.figures[1].detail == say("figure.smaller", ratio="8.0×", before="8.00 MB")


@pytest.mark.parametrize(
    ("verdict", "equal", "state"),
    [("ptq", True, "good"), ("qat", True, "good"), ("infeasible", True, "bad"), ("ptq", False, "bad")],
)
def test_the_state_follows_the_verdict_and_the_proof(verdict, equal, state):
    page = folders.fitted({**FIT, "verdict": verdict, "check": {"equal": equal}}, None, None, "x")
    assert page.verdict.state == state
    assert page.verdict.sentence.key == f"verdict.{verdict}" if equal else "verdict.unequal"


def test_before_and_after_has_intervals_and_what_the_interval_shows():
    table = one(folders.fitted(FIT, None, None, "x"), "comparison", Table)
    quality, nats, kl, top1, size, bits, time = table.rows
    assert [c.text for c in quality[1:3]] == ["10.000", "10.100"]
    assert [c.detail for c in quality[1:3]] == ["9.000 – 11.000", "9.100 – 11.100"]
    assert quality[3].state == "neutral", "an interval with 0 in it shows no change"
    assert quality[4].text == "−0.100 … +0.300"
    assert nats[3].text == "+0.0099" and kl[2].text == "0.01230" and top1[2].text == "91.0 %"
    assert size[3].text == "−87.5 %" and bits[3].text == "−85.9 %" and time[2].text == "9.0 s"
    worse = copy.deepcopy(FIT)
    worse["steps"][2]["change_interval"] = [0.1, 0.3]
    assert one(folders.fitted(worse, None, None, "x"), "comparison", Table).rows[0][3].state == "fair"
    worse["metric"] = "accuracy"  # more is better
    assert one(folders.fitted(worse, None, None, "x"), "comparison", Table).rows[0][3].state == "good"


def test_steps_are_drawn_with_the_tolerance():
    page = folders.fitted(FIT, None, None, "x")
    chart = one(page, "steps", Intervals)
    assert chart.limit.value == pytest.approx(10.2)
    assert [(r.value, r.low, r.state) for r in chart.rows] == [
        (10.0, 9.0, "neutral"), (11.0, 10.0, "fair"), (10.1, 9.1, "good")
    ]  # fmt: skip
    assert not [b for b in blocks(page, "steps") if isinstance(b, Pareto)], "two steps: nothing to see over time"
    assert one(page, "steps", Table).note.key == "recovery.control"
    accuracy = {**FIT, "metric": "accuracy", "float": {"value": 0.9}}
    assert one(folders.fitted(accuracy, None, None, "x"), "steps", Intervals).limit.value == pytest.approx(0.882)


def test_time_is_summed_up_step_by_step():
    data = copy.deepcopy(FIT)
    data["steps"].insert(2, {"name": "qronos", "value": 10.5, "seconds": 3.0, "loss": 0.05, "result": {}})
    chart = one(folders.fitted(data, None, None, "x"), "steps", Pareto)
    assert [(p.name, p.x, round(p.y, 9), p.chosen) for p in chart.points] == [
        ("gptq", 3.0, 10.0, False), ("qronos", 6.0, 5.0, False), ("hybrid", 12.0, 1.0, True)
    ]  # fmt: skip


def test_what_is_missing_is_left_out():
    least = {k: FIT[k] for k in ("verdict", "metric", "float", "final", "scheme", "steps")}
    least["steps"] = [{"name": "float", "value": 10.0}]
    page = folders.fitted(least, None, None, "x")
    assert {s.id for s in page.sections} == {"comparison", "steps", "again"}
    assert all(s.blocks for s in page.sections) and section("proof", None).blocks == ()


@pytest.mark.parametrize("key", ["verdict", "metric", "float", "final", "scheme", "steps"])
def test_a_damaged_report_is_named(key):
    with pytest.raises(UntrustedInput, match=f"report.json has no '{key}'"):
        folders.fitted({k: v for k, v in FIT.items() if k != key}, None, None, "x")
    with pytest.raises(UntrustedInput, match="verdict"):
        folders.fitted({**FIT, "verdict": "splendid"}, None, None, "x")


NOISE = [None, True, -1, 1e400, math.nan, "text", [], [None], {}, {"a": {}}, [[1]], [{}], 10**400, "x" * 10]


@pytest.mark.parametrize("noise", NOISE, ids=lambda v: repr(v)[:12])
def test_values_of_any_type_are_no_bug(noise):
    """Each key of each receipt in turn holds something else: a page, or an error that names the key."""
    for key in FIT:
        try:
            folders.fitted({**FIT, key: noise}, RECEIPT, MANIFEST, "x")
        except UntrustedInput as error:
            assert key in str(error)
    for step in range(3):
        for key in FIT["steps"][2]:
            data = copy.deepcopy(FIT)
            data["steps"][step][key] = noise
            folders.fitted(data, None, None, "x")
    for key in RECEIPT:
        try:
            folders.saved({**RECEIPT, key: noise}, {**MANIFEST, "files": noise}, "x")
        except UntrustedInput as error:
            assert key in str(error)
    training = copy.deepcopy(FIT["steps"][2]["training"])
    for key in training:
        folders.saved({**RECEIPT, "details": {"training": {**training, key: noise}}}, None, "x")
        folders.saved(
            {**RECEIPT, "details": {"training": {**training, "curve": [noise, [0, noise], [noise, 1]]}}}, None, "x"
        )


# ------------------------------------------------------------------------------------------------ train, quantize


def test_a_trained_folder_tells_start_and_best():
    training = {"steps": 40, "best_step": 30, "start": [2.5], "best": [2.25], "curve": [[0, 2.5], [30, 2.25]]}
    page = folders.saved({**RECEIPT, "details": {"training": training}}, MANIFEST, "w2")
    assert (page.verb, page.verdict.state) == ("train", "good")
    assert page.verdict.sentence.values["best"] == say("score.nats", value="2.2500")
    kept = folders.saved({**RECEIPT, "details": {"training": {**training, "best_step": 0}}}, MANIFEST, "w2")
    assert kept.verdict.state == "fair" and kept.verdict.sentence.key == "verdict.kept_start"


def test_a_quantized_folder_claims_no_quality():
    page = folders.saved(RECEIPT, MANIFEST, "w4")
    assert (page.verb, page.verdict.state) == ("quantize", "neutral")
    weights = 1000 + 6 * 4096 + 5
    assert page.figures[1].value == f"{8 * 1_000_000 / weights:.2f}", "the probe's file is no weight"
    assert one(page, "comparison", Table).note == say("not_measured.quality")
    hashes = one(page, "again", Table)
    assert texts(hashes)[0] == [say("hash.parent", name="model"), "", "ab" * 32]
    assert texts(hashes)[-1] == ["MANIFEST.json", "", "12" * 32]


# ------------------------------------------------------------------------------------------------ curves


def test_alarms_of_a_curve():
    training = {
        "best_step": 40,
        "curve": [[0, 2.0], [10, 2.5], [20, None], [30, 3.0], [40, 1.5]],
        "alarms": [{"step": 33, "what": "oscillation"}, {"what": "no step"}],
        "notes": ["3 steps skipped: their gradient was not finite", "all went well"],
    }
    chart = training_chart(Found(training))
    assert chart.series[0].points == ((0, 2.0), (10, 2.5), (30, 3.0), (40, 1.5))
    assert [(m.value, m.state) for m in chart.alarms] == [
        (40, "good"), (20, "bad"), (30, "fair"), (33, "bad"), (None, "bad")
    ]  # fmt: skip
    assert chart.calm == "" and chart.levels[0].value == 2.0
    calm = training_chart(Found({"best_step": 1, "curve": [[0, 2.0], [1, 1.0]]}))
    assert calm.calm == say("alarm.none")
    assert training_chart(Found({"curve": [[0, 1.0]]})) is None and training_chart(Found({})) is None


def test_scores_of_classifiers_are_stored_negative_and_shown_as_accuracies():
    chart = training_chart(Found({"curve": [[0, -0.8, 0.5], [10, -0.7, 0.4], [20, -0.9, 0.3]], "best_step": 20}))
    assert [y for _, y in chart.series[0].points] == [0.8, 0.7, 0.9]
    worse = [m for m in chart.alarms if m.state == "fair"]
    assert [m.value for m in worse] == [10]


def test_a_spike_is_twice_the_median_of_those_before():
    losses = [[i, 1.0] for i in range(6)] + [[6, 2.1], [7, 1.9], [8, 2.5]]
    chart = loss_chart(Found({"losses": losses}))
    assert [m.value for m in chart.alarms] == [6, 8]
    assert loss_chart(Found({"losses": losses[:2]})) is None


# ------------------------------------------------------------------------------------------------ layers


def layers(count):
    return [
        Found({"name": f"model.layers.{i}.q", "type": "Linear", "scheme": "w4a16", "reason": "r", "num_weights": 10,
               "report": {"output_error": i / count}})
        for i in range(count)
    ]  # fmt: skip


def test_a_long_inventory_is_brought_together_and_says_so():
    table = inventory_table(layers(1000), most=400)
    assert texts(table) == [["model.layers.*.q × 1,000", "Linear", "w4a16", "10,000", "0.9990", "r"]]
    assert table.note == say("inventory.aggregated", layers="1,000", rows="1")
    assert len(inventory_table(layers(400), most=400).rows) == 400
    odd = [
        Found({"name": chr(65 + i % 26) * (1 + i // 26), "type": "T", "scheme": "", "reason": ""}) for i in range(500)
    ]
    cut = inventory_table(odd, most=400)
    assert len(cut.rows) == 400 and cut.note.values["left"] == "100"
    assert inventory_table([]) is None


def test_layer_errors_by_block_and_the_worst_of_neighbours():
    heat = error_heat([Found(e) for e in FIT["inventory"]])
    assert heat.rows == ("0", "1", "2") and heat.columns == ("q_proj", "k_proj")
    assert [[round(v, 9) for v in row] for row in heat.values] == [[0.1, 0.1], [0.11, 0.11], [0.12, 0.12]]
    assert error_heat(layers(1)) is None
    many = error_heat(layers(1000))
    assert len(many.rows) <= 64 and many.note == say("heat.merged") and many.values[-1][0] == 0.999
    assert merged_rows(["a", "b", "c"], [[1.0, None], [3.0, None], [2.0, 5.0]], 2) == (
        ["a – b", "c"], [[3.0, None], [2.0, 5.0]], True
    )  # fmt: skip


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="another shape"):
        Heat("t", ("a",), ("x", "y"), ((1.0,),), "u")
    with pytest.raises(ValueError, match="edges"):
        Bins("b", (0.0, 1.0), (0.5, 0.5))


# ------------------------------------------------------------------------------------------------ several, results


def test_several_fits_and_the_smallest_that_is_good_enough():
    small = {**FIT, "size_bytes": 500_000, "verdict": "infeasible", "final": {"name": "qat", "value": 15, "loss": 0.5}}
    page = compared([("big", FIT), ("small", small)], "runs")
    assert page.verdict.sentence == say("verdict.compare", best="big", size="1.00 MB", ratio="8.0×")
    chart = one(page, "pareto", Pareto)
    assert [(p.x, p.y, p.chosen) for p in chart.points] == [(1.0, 1.0, True), (0.5, 50.0, False), (8.0, 0.0, False)]
    losses = one(page, "pareto", Intervals)
    assert (losses.rows[0].low, losses.rows[0].high) == (pytest.approx(-1.0), pytest.approx(3.0)), "in % of 10"
    assert losses.limit.value == 2.0
    none = compared([("small", small)], "runs")
    assert none.verdict.state == "bad" and none.verdict.sentence.key == "verdict.compare_none"


def test_sensitivities_by_layer_and_bits():
    document = {
        "bits": [2, 4], "how": "measured", "positions": 100, "notes": [], "seconds": 1.0,
        "units": [{"name": f"model.layers.{i}.q", "role": "query", "kl": {"2": kl, "4": 0.01}}
                  for i, kl in enumerate((0.5, 0.4, 0.3))],
        "types": {"query": {"2": 0.9, "4": 0.02}},
        "recommendation": [{"role": "query", "bits": 4, "kl": 0.02, "reason": "KL"}],
    }  # fmt: skip
    page = results.of(document, "s.json")
    assert page.verb == "sensitivity"
    assert page.verdict.sentence.values["worst"] == "model.layers.0.q" and page.verdict.sentence.values["bits"] == "2"
    heat = one(page, "sensitivity", Heat)
    assert heat.values == ((0.5, 0.01), (0.4, 0.01), (0.3, 0.01)) and heat.chosen == {(0, 1), (1, 1), (2, 1)}
    assert one(page, "types", Heat).values == ((0.9, 0.02),)


def test_a_mix_against_the_best_uniform_choice():
    document = {
        "budget": 900, "budget_unit": "bytes", "kl": 0.1, "uniform": "w4a16", "uniform_kl": 0.2, "average_bits": 4.0,
        "assigned": [{"unit": f"layers.{b}.{n}", "role": n, "scheme": s}
                     for b in range(2) for n, s in (("q", "w2a16-g32"), ("v", "w8a16"))],
        "candidates": [{"name": "a", "cost": 800e6, "kl": 0.1}, {"name": "b", "cost": 900e6, "kl": 0.3}],
    }  # fmt: skip
    page = results.of(document, "m.json")
    assert (page.verb, page.verdict.state, page.verdict.sentence.key) == ("search", "good", "verdict.mix_better")
    assert one(page, "choice", Heat).values == ((2.0, 8.0), (2.0, 8.0))
    assert [(p.x, p.chosen) for p in one(page, "pareto", Pareto).points] == [(800.0, True), (900.0, False)]
    assert results.of({**document, "uniform_kl": 0.05}, "m").verdict.state == "fair"
    assert results.of({**document, "uniform_kl": None}, "m").verdict.sentence.key == "verdict.mix_alone"


def figure(value, low, high, basis="assumed"):
    return {"value": value, "low": low, "high": high, "basis": basis, "source": "somewhere"}


PLAN = {
    "model": "m", "scheme": "w4a16", "storage": {"total": 10}, "command": "quantailor fit m", "notes": ["n"],
    "ways": {name: {"steps": 10, "seconds": figure(s, s / 2, s * 2), "money": figure(0.001, 0.0005, 3),
                    "peak_bytes": figure(2e9, 1e9, 3e9), "disk_bytes": 5e6, "fits": name != "qat"}
             for name, s in (("ptq", 60.0), ("qat", 7200.0))},
    "decision": {"way": "ptq", "meaning": "rounding", "expected_within_tolerance": True,
                 "reasons": [{"rule": "r", "text": "because", "basis": "assumed", "source": "s"}]},
    "checklist": [{"item": "epochs", "level": "warning", "text": "many"}],
    "environment": {"torch": "2"}, "roi": None,
}  # fmt: skip


def test_a_plan_says_which_way_and_what_it_rests_on():
    page = results.of(PLAN, "p.json")
    assert (page.verb, page.subject, page.verdict.state) == ("plan", "m", "good")
    values = page.verdict.sentence.values
    assert (values["time"], values["memory"], values["money"]) == ("1 min 0 s", "2.00 GB", "< 0.01")
    assert [f.detail for f in page.figures] == ["30.0 s – 2 min 0 s", "1.00 GB – 3.00 GB", "< 0.01 – 3.00", ""]
    chart = one(page, "plan", Intervals)
    assert [(r.low, r.value, r.high) for r in chart.rows] == [(30, 60, 120), (3600, 7200, 14400)] and chart.log_x
    assert one(page, "plan", Table).rows[1][-1].state == "bad"
    assert (
        one(page, "reasons", Table).rows[0][2].state == "fair"
        and one(page, "checklist", Table).rows[0][1].state == "fair"
    )
    unsure = {**PLAN, "decision": {**PLAN["decision"], "expected_within_tolerance": False}}
    assert results.of(unsure, "p").verdict.state == "fair"
    assert results.of({**PLAN, "decision": {"way": "none", "meaning": "m"}}, "p").verdict.state == "bad"


def test_any_other_document_is_shown_whole():
    document = {
        "speed": figure(3.0, 2.0, 4.0, "measured"), "size_bytes": 1500, "fine": True, "nothing": None,
        "rows": [{"name": "a", "latency_ms": 1.5}, {"name": "b", "latency_ms": 2.5, "note": "x" * 60}],
        "deep": {"one": {"two": {"three": {"four": 4}}}}, "plain": [1, "two"], "notes": ["remember"],
        "trials": [{"name": "t1", "size_bytes": 10, "loss": 2}, {"name": "t2", "size_bytes": 20, "loss": 1}],
        "scores": [{"layer": "l1", "scheme": "w2", "kl": 1}, {"layer": "l1", "scheme": "w4", "kl": 0.1},
                   {"layer": "l2", "scheme": "w2", "kl": 2}, {"layer": "l2", "scheme": "w4", "kl": 0.2}],
    }  # fmt: skip
    page = results.of(document, "bench.json")
    assert page.verb == "result"
    kinds = {s.id: [type(b) for b in s.blocks] for s in page.sections}
    assert kinds["figures"] == [Table, Pairs] and kinds["of-rows"] == [Table] and kinds["of-plain"] == [Remarks]
    assert kinds["of-trials"] == [Pareto, Table] and kinds["of-scores"] == [Heat, Table]
    assert "four: 4" in json.dumps([str(b) for b in blocks(page, "of-deep")])
    assert one(page, "of-rows", Table).rows[0][1].text == "1.500 ms"


@pytest.mark.parametrize("value", [None, [], 3, "x", {}, {"error": "it broke", "exit_code": 3}])
def test_what_is_no_result_is_refused(value):
    with pytest.raises(UntrustedInput, match=r"x\.json"):
        results.of(value, "x.json")


def test_numbers_that_cannot_be_drawn():
    assert [finite(v) for v in (1, 1.5, True, "1", None, math.inf, math.nan, 10**400)] == [1, 1.5, *[None] * 6]
    assert pair([2, 1]) == (1, 2) and [pair(v) for v in ("ab", [1], [1, None], None, 3)] == [None] * 5
    assert isinstance(training_chart(Found({"curve": [[0, 1], [1, 2]]})), Lines)
