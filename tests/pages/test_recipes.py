"""Pages of `search` and `nas`, from documents as those verbs write them; in a browser as well."""

import copy
import re
from typing import Any

import pytest

from quantailor.pages import results
from quantailor.pages.document import Lines, Pareto, Table
from quantailor.pages.html import MAX_BYTES, page
from tests.pages.browser import Browser, found
from tests.pages.making import HOSTILE, Page

TRIALS = [
    {"number": i, "recipe": f"w{bits}a16-g32, learned scales, rate x1, 50 steps", "point": {"bits": bits}, "loss": loss,
     "cost": cost, "steps_done": steps, "seconds": 12.5, "reason": reason, "looks": [[0.25, 0.3]]}
    for i, (bits, loss, cost, steps, reason) in enumerate([
        (4, 0.01, 4.0, 50, None), (3, 0.05, 3.0, 50, None), (2, 0.6, 2.0, 12, "stopped at 25%: others were better"),
        (8, 0.001, 8.0, 0, "not trained: over the limit before a step was made"),
    ])
]  # fmt: skip
SEARCH: dict[str, Any] = {
    "verdict": "feasible", "metric": "perplexity", "float": {"value": 10.0},
    "budgets": {"accuracy": "95%", "loss": 1 / 0.95 - 1, "latency_ms": 5.0, "size_bytes": None, "minutes": 10.0},
    "cost_unit": "ms", "latency_how": "measured on this machine: one pass", "winner": TRIALS[0], "front": [0, 1, 2, 3],
    "trials": TRIALS, "stopped": "the time for searching is over", "space": {"bits": [8, 4], "learning_rate": [0.3, 3]},
    "cost": {"search_seconds": 300.0, "trial_seconds": 290.0, "winner_seconds": 200.0, "seconds": 580.0,
             "budget_seconds": 600.0, "trials": 4, "workers": 2, "processor_seconds": 100.0},
    "final": {"value": 10.2, "loss": 0.02, "latency_ms": 6.0, "size_bytes": 5e6, "steps": 200},
    "notes": ["recipes are compared on 64 rows"], "environment": {"torch": "2"}, "sentence": "feasible",
}  # fmt: skip
CANDIDATES = [
    {"name": f"{d} blocks", "depth": d, "width": 64, "heads": 8, "ffn": 172, "bits": 4, "score": 2.0 - d / 10,
     "size_bytes": 1000 * d} for d in (5, 4, 3)
]  # fmt: skip
NAS: dict[str, Any] = {
    "winner": CANDIDATES[0], "candidates": CANDIDATES, "space": {"depth": [5, 4, 3], "group": 32}, "max_bytes": 6000,
    "metric": "perplexity", "float": {"value": 5.0, "size_bytes": 20_000}, "final": {"value": 5.5, "loss": 0.1},
    "supernet": {"steps": 3, "losses": [3.0, 2.5, 2.25]}, "notes": [], "environment": {"torch": "2"},
    "cost": {"supernet_seconds": 5.0, "search_seconds": 4.0, "winner_seconds": 3.0, "seconds": 12.0},
}  # fmt: skip
DOCUMENTS = {"search": SEARCH, "nas": NAS}


def one(document, section, kind):
    return next(b for s in document.sections if s.id == section for b in s.blocks if isinstance(b, kind))


def test_a_search_has_its_verdict_budgets_front_trials_and_cost():
    made = results.of(SEARCH, "s.json")
    assert (made.verb, made.verdict.state, made.verdict.sentence.key) == ("search", "good", "verdict.feasible")
    chart = one(made, "front", Pareto)
    assert [(p.x, p.y, p.chosen) for p in chart.points] == [
        (4.0, 1.0, True), (3.0, 5.0, False), (2.0, 60.0, False), (8.0, 0.1, False)
    ]  # fmt: skip
    assert chart.limit.value == pytest.approx(100 * (1 / 0.95 - 1))
    budgets = one(made, "budgets", Table)
    assert [row[3].state for row in budgets.rows] == ["good", "bad", "good"], "loss, latency, time"
    assert len(one(made, "trials", Table).rows) == 4
    text = Page(page(made, "en")).text
    for part in ("Within every budget", "stopped at 25%", "4 min 50 s", "9 min 40 s", "measured on this machine"):
        assert part in text, part


def test_the_other_verdicts():
    assert results.of({**SEARCH, "verdict": "infeasible"}, "s").verdict.state == "bad"
    worker = {k: v for k, v in SEARCH.items() if k != "final"} | {"verdict": "trials"}
    made = results.of(worker, "s")
    assert made.verdict.sentence.key == "verdict.trials" and all(s.id != "budgets" for s in made.sections)
    in_bytes = {**SEARCH, "cost_unit": "bytes", "trials": [{**t, "cost": 1e6 * t["cost"]} for t in TRIALS]}
    assert [p.x for p in one(results.of(in_bytes, "s"), "front", Pareto).points] == [4.0, 3.0, 2.0, 8.0], "MB"


def test_architectures():
    made = results.of(NAS, "n.json")
    assert made.verb == "nas" and made.verdict.sentence.values["winner"] == "5 blocks"
    assert [(p.y, p.chosen) for p in one(made, "front", Pareto).points] == [(1.5, True), (1.6, False), (1.7, False)]
    assert one(made, "training", Lines).series[0].points == ((1.0, 3.0), (2.0, 2.5), (3.0, 2.25))
    assert [c.text for c in one(made, "candidates", Table).rows[0]][:5] == ["5", "64", "8", "172", "4"]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:24]))
@pytest.mark.parametrize("name", DOCUMENTS)
def test_hostile_documents_stay_text(name, text):
    data = copy.deepcopy(DOCUMENTS[name])
    data["metric"] = data["stopped"] = data["latency_how"] = text
    data["notes"] = [text]
    data["space"][text[:300]] = [text]
    for row in data.get("trials", data.get("candidates")):
        row["recipe"] = row["name"] = row["reason"] = text
    data["winner"] = {"recipe": text, "name": text, "number": text}
    written = page(results.of(data, "x"), "en")
    parsed = Page(written)
    assert [tag for tag, _ in parsed.tags].count("script") == 1 and len(written.encode()) < MAX_BYTES
    assert not any(attribute.startswith("on") for _, attributes in parsed.tags for attribute in attributes)


@pytest.mark.parametrize("broken", [{"trials": 5}, {"front": None}, {"budgets": []}, {"cost": "x"}, {"space": 7}])
def test_damaged_documents_make_a_page_or_say_so(broken):
    written = page(results.of({**SEARCH, **broken}, "x"), "zh")
    Page(written)
    assert written.lstrip().lower().startswith("<!doctype html") and "x" in written


@pytest.fixture(scope="module")
def browser():
    path = found()
    if path is None:
        pytest.skip("no Chromium here; name one in CHROMIUM")
    with Browser(path) as opened:
        yield opened


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_browser_shows_it_without_a_complaint(browser, tmp_path, name, language):
    file = tmp_path / "page.html"
    file.write_text(page(results.of(DOCUMENTS[name], "x"), language), encoding="utf-8")
    browser.open(file.as_uri(), width=390 if language == "zh" else 1280)
    browser.picture(tmp_path / f"{name}-{language}.png")
    assert browser.complaints == [] and browser.requests == [file.as_uri()]
    assert browser.value("document.documentElement.scrollWidth <= window.innerWidth"), "nothing sticks out"
    assert browser.value("document.querySelectorAll('svg circle').length") >= 3
    words = browser.value("document.body.innerText")
    assert bool(re.search("[\u4e00-\u9fff]", words)) == (language == "zh")
