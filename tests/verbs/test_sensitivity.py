"""`sensitivity` on models in memory: figures, recommendations, and rules that `quantize` takes."""

import json

import pytest
import torch

from quantailor import api
from quantailor.errors import UntrustedInput, UsageError
from quantailor.verbs.sensitivity import sensitivity
from tests.formats.making import records, texts, trained

SMALL = {"samples": 8, "rows": 4, "context": 48}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_lm):
    return api.load(trained(tiny_lm, tmp_path_factory.mktemp("trained") / "model"))


@pytest.fixture(scope="module")
def data():
    return texts(40, seed=21)


@pytest.fixture(scope="module")
def found(model, data):
    return sensitivity(model, data, **SMALL)


def test_the_model_is_left_as_it_was(model, data):
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    sensitivity(model, data, (2,), **SMALL)
    assert model.state is None and all(torch.equal(p, before[n]) for n, p in model.model.named_parameters())


def test_every_type_is_there_and_fewer_bits_cost_more(found):
    assert found.how == "measured" and found.positions == 4 * 48
    assert set(found.types) == {"embedding", "q/k/v", "scores", "o", "ffn in", "ffn out", "norm", "head"}
    for role, by_bits in found.types.items():
        assert by_bits[8] < by_bits[4] < by_bits[2], role
    assert [r.kl[2] for r in found.ranking(2)] == sorted((r.kl[2] for r in found.rows), reverse=True)
    with pytest.raises(UsageError, match="bits=5 was not tried"):
        found.ranking(5)


def test_the_recommendation_is_the_fewest_bits_that_are_good_enough(found):
    for tolerance in (1e-9, 0.002, 0.05, 100.0):
        for r in found.recommend(tolerance):
            good = [b for b in found.bits if all(found.types[r.role][c] <= tolerance for c in found.bits if c >= b)]
            assert r.bits == min(good, default=None) and (r.bits is None or r.kl <= tolerance)
    assert {r.bits for r in found.recommend(100.0)} == {2} and {r.bits for r in found.recommend(1e-12)} == {None}
    with pytest.raises(UsageError, match="tolerance=0"):
        found.recommend(0)


def test_the_recommendations_rules_are_what_quantize_takes(model, data, found):
    tolerance = sorted(kl for role in ("q/k/v", "head", "ffn in") for kl in found.types[role].values())[6]
    rules = found.rules(tolerance)
    made = api.quantize(model, "w8a16", data=data, rules=rules, samples=8, context=48, method="rtn")
    bits = {r.role: r.bits for r in found.recommend(tolerance)}
    for row in found.rows:
        for layer in row.unit.layers if row.unit.role not in ("scores", "norm") else ():
            scheme = made.state.inventory.quantized.get(layer)
            assert (scheme.weight.grid.bits if scheme else None) == bits[row.unit.role], layer


def test_as_json(found):
    document = json.loads(json.dumps(found.to_json()))
    assert document["types"]["head"]["2"] == found.types["head"][2] and len(document["units"]) == len(found.rows)


def test_from_gradients(model, data):
    found = sensitivity(model, data, (4, 2), how="fisher", **SMALL)
    assert found.how == "fisher" and all((row.kl[2] is None) == (row.unit.role == "scores") for row in found.rows)


def test_a_classifier(tiny_bert):
    found = sensitivity(tiny_bert, records(60, seed=4), (8, 2), samples=24, rows=20)
    assert found.positions == 20 and found.types["q/k/v"][8] < found.types["q/k/v"][2]


def test_mistakes_of_sensitivity(model, data):
    for options, message in (({"roles": ("nose",)}, "'nose'"), ({"bits": (9,)}, "w9"), ({"bits": ()}, "no choices")):
        with pytest.raises(UsageError, match=message):
            sensitivity(model, data, **{**SMALL, **options})
    with pytest.raises(UsageError, match="one row"):
        sensitivity(model, ["the cat"], (4,), **SMALL)
    with pytest.raises((UsageError, UntrustedInput)):
        sensitivity(model, [], (4,), **SMALL)
    made = api.quantize(model, "w8a16", method="rtn")
    with pytest.raises(UsageError, match="quantized already"):
        sensitivity(made, data, (4,), **SMALL)


def test_little_data_is_shared_out_and_told(model):
    found = sensitivity(model, texts(4, seed=3), (4,), samples=128, rows=24, context=32)
    assert any("rows: " in note and "to measure on" in note for note in found.notes)
