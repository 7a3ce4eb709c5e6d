"""A short run, a forecast, and the full run on request."""

import pytest

from quantailor import api
from quantailor.errors import UsageError
from tests.cli.shell import shell
from tests.formats.making import texts, trained, write_corpus

SETTINGS = api.Settings(steps=24, batch_size=4, learning_rate=3e-3)


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_lm):
    return trained(tiny_lm, tmp_path_factory.mktemp("trained") / "model")


def test_the_probe_is_that_short_run_and_nothing_else(model):
    source = api.load(model)
    rows = api.examples_for(source, texts(24, seed=41), context=32)
    held = api.examples_for(source, texts(6, seed=42), context=32)
    found = api.probe(
        source, rows, scheme="w1.58a8", eval_data=held, samples=16, epochs=3, settings=SETTINGS, method="rtn"
    )
    few = rows.drawn(16, 0)
    settings = api.Settings(epochs=3, batch_size=4, learning_rate=3e-3, evaluations=12)
    done = api.train(source, few, scheme="w1.58a8", eval_data=held, settings=settings, method="rtn").training
    assert (found.rows, found.steps, found.full_steps) == (16, 12, 24)
    assert found.curve == tuple((step, score[0]) for step, score in done.curve) and len(found.curve) == 13
    assert (found.before, found.reached) == (done.start[0], done.best[0])
    assert found.full.interval[0] <= found.full.value <= found.full.interval[1]
    assert found.original < found.before and found.recovery(found.full.value) > 0
    document = found.to_json()
    assert document["before"] > document["forecast"] and document["worthwhile"] == found.worthwhile


def test_rows_are_drawn_once_each_in_order(model):
    rows = api.examples_for(api.load(model), texts(24, seed=41), context=32)
    ids = {tuple(rows.dataset[i]["input_ids"].tolist()): i for i in range(len(rows))}
    places = [ids[tuple(row["input_ids"].tolist())] for row in rows.drawn(9, 5).dataset]
    assert places == sorted(set(places)) and len(places) == 9
    assert len(rows.drawn(10**6, 0)) == len(rows) and rows.drawn(9, 6).fingerprint != rows.drawn(9, 5).fingerprint


def test_a_probe_longer_than_the_run_is_refused(model):
    with pytest.raises(UsageError, match="the full run of 2 steps is shorter than the probe's 4"):
        settings = api.Settings(steps=2, batch_size=4)
        api.probe(
            model, texts(9, seed=1), scheme="w8a16", method="rtn", samples=16, epochs=1, settings=settings, context=32
        )


def test_go_makes_the_full_run_where_a_gain_is_certain(model, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    options = ("--data", corpus / "train.txt", "--eval-data", corpus / "valid.txt", "--samples", 32, "--context", 32)
    fast = ("--scheme", "w1.58a8", "--method", "rtn", "--epochs", 1, "--steps", 12, "--batch-size", 4, "--quiet")
    ran = shell("probe", model, *options, *fast, "--go", "--out", tmp_path / "out", "--json")
    assert ran.status == 0, ran.err
    found = ran.document
    assert found["worthwhile"] and found["full"] < found["before"] and api.check(tmp_path / "out").equal
    alone = shell("probe", model, *options, *fast, "--go")
    assert alone.status == 2 and "--go and --out belong together" in alone.err
