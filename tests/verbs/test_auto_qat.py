"""`search` on a tiny model: what it finds is what it saves, and what it cannot do it says."""

import dataclasses
import json

import pytest

from quantailor import api
from quantailor.errors import UsageError
from quantailor.searching.latency import size_bytes
from quantailor.verbs.auto_qat import SEARCH
from tests.formats.making import texts, trained

SPACE = api.Space(bits=(4, 2), group=(32,), scales=("learned",), learning_rate=(1.0, 3.0), steps=(4,), frozen=(0.0,))


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_lm):
    return api.load(trained(tiny_lm, tmp_path_factory.mktemp("trained") / "model"))


def searched(model, out, **options):
    settings = api.Settings(batch_size=4)
    base = {
        "eval_data": texts(25, seed=2),
        "space": SPACE,
        "settings": settings,
        "samples": 8,
        "context": 48,
        "minutes": 5,
    }
    return api.search(model, texts(60, seed=1), out=out, **{**base, **options})


def test_the_winner_is_saved_measured_again_and_meets_its_budgets(model, tmp_path):
    found = searched(model, tmp_path / "out", accuracy="90%", latency_ms=1.0, bandwidth=1.0)
    assert found.verdict == "feasible" and found.meets
    data = json.loads((tmp_path / "out" / SEARCH).read_text())
    assert data == json.loads(json.dumps(found.data))
    assert len(data["trials"]) == 4 and data["stopped"] == "every point of the space has been tried"
    assert {t["scheme"] for t in data["trials"]} == {"w4a16-g32", "w2a16-g32"}
    assert set(data["front"]) <= {t["number"] for t in data["trials"]}
    # measured again, by other means than the search's own
    saved = api.load(tmp_path / "out")
    valid = texts(25, seed=2)
    assert api.evaluate(saved, valid, context=48).value == pytest.approx(data["final"]["value"], rel=1e-5)
    base = api.evaluate(model, valid, context=48).value
    assert data["final"]["value"] <= base / 0.9 and data["budgets"]["loss"] == pytest.approx(1 / 0.9 - 1)
    assert data["final"]["latency_ms"] == pytest.approx(size_bytes(saved.model) / 1e6) and "predicted" in found.text()
    assert data["cost"]["seconds"] <= 300 and api.check(tmp_path / "out").equal
    assert not (tmp_path / ".out.study").exists()
    assert "feasible: " in found.text() and "<- winner" in found.text() and "the search cost" in found.text()


def test_a_rank_is_searched_and_what_is_saved_are_merged_integers(model, tmp_path):
    space = dataclasses.replace(SPACE, bits=(2,), learning_rate=(3.0,), steps=(30,), lora=(4, 8))
    found = searched(model, tmp_path / "out", accuracy="1%", space=space)
    assert {t["point"]["lora"] for t in found.data["trials"]} == {4, 8}
    assert all(t["loss"] <= t["ptq_loss"] for t in found.data["trials"])
    assert "LoRA of rank" in found.text() and found.data["final"]["steps"] > 0
    saved = api.load(tmp_path / "out")
    assert saved.state.method.endswith("+lora") and not any("adapters" in n for n, _ in saved.model.named_modules())
    assert api.check(tmp_path / "out").equal
    value = api.evaluate(saved, texts(25, seed=2), context=48).value
    assert value == pytest.approx(found.data["final"]["value"], rel=1e-5)


def test_infeasible_says_what_is_closest_and_saves_it(model, tmp_path):
    found = searched(model, tmp_path / "out", accuracy=1.5, size_bytes=1000, trials=2, study=tmp_path / "study")
    assert found.verdict == "infeasible" and not found.meets
    assert "infeasible, closest is w2a16-g32" in found.text() and "over its budget" in found.text()
    assert all(t["steps_done"] == 0 for t in found.data["trials"]), "over the bytes: not trained"
    assert (tmp_path / "out" / SEARCH).exists() and (tmp_path / "study" / "journal.log").exists()


def test_a_worker_only_tries_and_another_goes_on_behind_it(model, tmp_path):
    one = searched(model, None, trials=2, study=tmp_path / "study", accuracy="50%")
    assert one.verdict == "trials" and len(one.data["trials"]) == 2 and one.out is None
    two = searched(model, None, study=tmp_path / "study", accuracy="50%")
    assert len(two.data["trials"]) == 4 and two.data["cost"]["workers"] == 2
    with pytest.raises(UsageError, match="another question"):
        searched(model, None, study=tmp_path / "study", accuracy="60%")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"minutes": 0}, "minutes=0 is no time"),
        ({"latency_ms": 1.0, "size_bytes": 5}, "both costs"),
        ({"latency_ms": -1.0}, "latency_ms=-1.0 must be above 0"),
        ({"bandwidth": 5.0}, "none is asked for"),
        ({"latency_ms": 1.0, "bandwidth": 0.0}, "bandwidth=0.0 GB/s"),
        ({"accuracy": "most"}, "accuracy='most' is no figure"),
        ({"accuracy": "0%"}, "above 0"),
        ({"accuracy": -1}, "must be above 0"),
        ({"latency_ms": 1.0, "latency_tokens": 4096}, "a row of the data has 48 tokens"),
        ({"trials": 0}, "trials=0"),
        ({"space": api.Space(frozen=(0.1,))}, "frozen=0.1 of 2 blocks is none; use at least 0.5"),
        ({"format": "gguf"}, "gguf"),
    ],
)
def test_what_is_refused(model, tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        searched(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_share_of_less_than_a_block_is_left_out_and_told(model, tmp_path):
    space = api.Space(bits=(4,), group=(32,), scales=("learned",), learning_rate=(1.0,), steps=(2,), frozen=(0.0, 0.25))
    found = searched(model, None, space=space)
    assert len(found.data["trials"]) == 1 and any("less than one of 2 blocks" in note for note in found.data["notes"])
