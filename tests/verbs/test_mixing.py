"""`mixed` on models in memory: what it promises is what `quantize`, `train` and `fit` then do."""

import json

import pytest

from quantailor import api
from quantailor.errors import UsageError
from quantailor.models.prepare import pack_model
from quantailor.nn.packed import QuantLinear
from quantailor.recipe import Keep, Rule
from quantailor.spec import Scheme
from quantailor.verbs.mixing import mixed, rule_lines
from tests.formats.making import records, texts, trained

CHOICES = ("w2a16-g32", "w3a16-g32", "w4a16-g32", "w8a16-g32")
SMALL = {"samples": 8, "rows": 4, "context": 48}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_lm):
    return api.load(trained(tiny_lm, tmp_path_factory.mktemp("trained") / "model"))


@pytest.fixture(scope="module")
def data():
    return texts(40, seed=21)


@pytest.fixture(scope="module")
def mix(model, data):
    return mixed(model, data, average_bits=4.2, choices=CHOICES, **SMALL)


def test_as_json(mix):
    document = json.loads(json.dumps(mix.to_json()))
    assert document["size_bytes"] == mix.size_bytes and len(document["assigned"]) == 8
    assert document["rules"] == rule_lines(mix.rules)


def test_the_mix_keeps_its_budget_in_packed_bytes_and_its_ties(model, data, mix):
    made = api.quantize(model, mix.scheme, data=data, rules=mix.rules, samples=8, context=48, method="rtn")
    layers = [(n, m.packed) for n, m in pack_model(made.model).named_modules() if isinstance(m, QuantLinear)]
    size = sum(b.numel() * b.element_size() for _, p in layers for b in p.buffers())
    weights = sum(p.out_features * p.in_features for _, p in layers)
    assert size == mix.size_bytes <= mix.budget and mix.average_bits == 8 * size / weights <= 4.2
    schemes = {n: str(s) for n, s in made.state.inventory.quantized.items()}
    for i in range(2):
        assert len({schemes[f"model.layers.{i}.self_attn.{n}_proj"] for n in "qkv"}) == 1
        assert len({schemes[f"model.layers.{i}.mlp.{n}_proj"] for n in ("gate", "up")}) == 1
    assert len(set(schemes.values())) > 1, "a mix"


def test_it_is_at_least_as_good_as_the_best_uniform_one_within_the_budget(mix):
    assert mix.uniform == "w3a16-g32" and mix.kl <= mix.uniform_kl
    assert mix.kl == min(c.kl for c in mix.found.candidates)


def test_train_and_fit_take_the_mix(model, data, mix, tmp_path):
    settings = api.Settings(steps=2, batch_size=4, evaluations=1)
    tuned = api.train(
        model, data, scheme=mix.scheme, rules=mix.rules, settings=settings, samples=8, context=48, method="rtn"
    )
    wanted = {layer: s for u, s in mix.assigned for layer in u.layers}
    assert tuned.state.inventory.quantized == wanted and tuned.training.steps == 2
    goal = api.Goal(tolerance=0.9, methods=("rtn",), calibration=8)
    result = api.fit(model, data, mix.scheme, tmp_path / "out", rules=mix.rules, goal=goal, context=48)
    assert result.data["check"]["equal"]
    assert {e["name"]: e["scheme"] for e in result.data["inventory"] if e["scheme"]} == {
        n: str(s) for n, s in wanted.items()
    }


def test_rules_decide_first_and_what_they_decide_is_not_searched(model, data):
    rules = [Rule(Keep("mine"), pattern="*.k_proj"), Rule(Scheme.parse("w8a16"), pattern="*layers.0.mlp*")]
    mix = mixed(model, data, bytes=10**9, choices=CHOICES[:2], rules=rules, rounds=0, **SMALL)
    layers = [n for u, _ in mix.assigned for n in u.layers]
    assert not any("k_proj" in n or "layers.0.mlp" in n for n in layers) and mix.rules[:2] == tuple(rules)
    made = api.quantize(model, mix.scheme, data=data, rules=mix.rules, samples=4, context=48, method="rtn")
    assert str(made.state.inventory.quantized["model.layers.0.mlp.up_proj"]) == "w8a16"
    assert "model.layers.0.self_attn.k_proj" not in made.state.inventory.quantized
    for rule, message in (
        (Rule(Keep("all"), "*"), "quantize nothing"),
        (Rule(rules[1].action, "*_proj"), "no layer is"),
    ):
        with pytest.raises(UsageError, match=message):
            mixed(model, data, average_bits=4, rules=[rule], **SMALL)


def test_embedding_and_head_where_asked(model, data):
    mix = mixed(
        model, data, bytes=10**9, choices=("w8a16-g32", "w4a16-g32"), also=("embedding", "head"), rounds=0, **SMALL
    )
    roles = {u.role: s for u, s in mix.assigned}
    assert str(roles["head"]) == str(roles["embedding"]) == "w8a16-g32"


def test_a_time_budget_is_of_measured_times(model, data):
    mix = mixed(model, data, milliseconds=1e3, choices=("w8a16-g32", "w4a16-g32"), rounds=0, **SMALL)
    assert mix.budget_unit == "nanoseconds" and mix.found.best.cost <= mix.budget == 10**9
    with pytest.raises(UsageError, match=r"nanoseconds, .* ms"):
        mixed(model, data, milliseconds=1e-6, choices=("w8a16-g32", "w4a16-g32"), **SMALL)


def test_from_gradients(model, data):
    mix = mixed(model, data, average_bits=4.2, choices=CHOICES, how="fisher", **SMALL)
    assert mix.kl <= mix.uniform_kl and mix.average_bits <= 4.2


def test_a_classifier(tiny_bert):
    rows = records(60, seed=4)
    mix = mixed(tiny_bert, rows, average_bits=5, choices=CHOICES, samples=24, rows=20)
    made = api.quantize(tiny_bert, mix.scheme, data=rows, rules=mix.rules, samples=24)
    assert len(made.state.inventory.quantized) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one budget"),
        ({"average_bits": 4, "bytes": 10}, "exactly one budget"),
        ({"average_bits": 1}, r"below the least .* bytes, \d\.\d+ bits a weight"),
        ({"average_bits": 4, "choices": ("w4a16", "w8a8-static")}, "dynamic"),
        ({"average_bits": 4, "also": ("norm",)}, "also='norm'"),
        ({"average_bits": 4, "rounds": -1}, "rounds=-1"),
        ({"average_bits": 4, "rows": 0}, "rows=0"),
        ({"average_bits": 4, "seed": -1}, "seed=-1"),
        ({"average_bits": 4, "method": "magic"}, "magic"),
    ],
)
def test_a_mistake_is_one_line(model, data, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        mixed(model, data, **{"choices": CHOICES, **SMALL, **options})
    assert "\n" not in str(caught.value)


def test_rules_that_have_no_line():
    assert rule_lines([Rule(Scheme.parse("w8a16"), "*.q", method="rtn"), Rule(Keep("so"), "*.k")]) == [
        "*.q=w8a16:rtn",
        "*.k=keep",
    ]
    with pytest.raises(UsageError, match="no PATTERN=SCHEME form"):
        rule_lines([Rule(Keep("so"), module_type="Linear")])
