"""Measured divergence against two plain passes; rankings against brute force on a trained model."""

import math

import pytest
import torch

from quantailor import ptq
from quantailor.models.roles import Unit, find_roles
from quantailor.searching.sensitivity import (
    MEASURED_UNITS,
    MEASURED_WEIGHTS,
    Divergence,
    Study,
    choose_how,
    score,
)
from quantailor.spec import Scheme
from tests.models import zoo

SCHEMES = [Scheme.parse("w4a16-g16"), Scheme.parse("w2a16-g16")]


def kl_by_definition(model, other, batches):
    """Position by position, in float64, padding left out."""
    total, count = 0.0, 0
    for batch in batches:
        p, q = (m(**batch).logits.double().softmax(-1) for m in (model, other))
        for row in range(len(p)):
            places = [()] if p.dim() == 2 else [(t,) for t in range(p.shape[1]) if batch["attention_mask"][row, t]]
            for place in places:
                a, b = p[(row, *place)], q[(row, *place)]
                total += float((a * (a / b).log()).sum())
                count += 1
    return total / count


def study(name, batches=None, method="rtn", roles=None):
    model = getattr(zoo, name)()
    batches = batches or [zoo.tokens(9, 6), zoo.tokens(8, 8)]
    units = [u for u in find_roles(model) if roles is None or u.role in roles]
    return Study(model, units, SCHEMES, ptq.method(method), batches, batches)


@pytest.mark.parametrize("name", ["llama", "bert", "albert"])
def test_divergence_is_the_mean_kl_over_what_counts(name):
    model, other = getattr(zoo, name)(), getattr(zoo, name)()
    other.load_state_dict(model.state_dict())
    batches = [zoo.tokens(9, 6), zoo.tokens(5, 7, 3)]
    divergence = Divergence(model, batches)
    assert divergence() == 0.0
    last = [p for n, p in model.named_parameters() if p.dim() == 2][-3]
    with torch.no_grad():
        last.add_(torch.randn_like(last) * 0.1)
        assert divergence() == pytest.approx(kl_by_definition(other, model, batches), rel=1e-3)
    assert divergence.positions == (9 + 6 + 5 + 7 + 3 if name == "llama" else 5)


def test_a_broken_layer_is_infinitely_far():
    model = zoo.llama()
    divergence = Divergence(model, [zoo.tokens(6)])
    model.lm_head.weight.data.fill_(math.nan)
    assert divergence() == math.inf


def test_skipping_blocks_changes_no_figure():
    s = study("llama")
    s.solve()
    quick = s.measure()
    s.divergence.suffix.can_skip = False
    for (unit, scheme), kl in quick.items():
        assert s.measured({unit: scheme}) == pytest.approx(kl, rel=1e-5, abs=1e-9), unit.name


@pytest.mark.parametrize("how", ["measured", "fisher"])
def test_every_unit_and_type_has_its_figure(how):
    s = study("llama", [zoo.tokens(12, 12, 12, 12) for _ in range(6)])
    scores = score(s, how)
    weighted = [u for u in s.units if how == "measured" or u.role != "scores"]
    assert set(scores.units) == {(u, c) for u in weighted for c in SCHEMES}
    assert set(scores.types) == {(u.role, c) for u in weighted for c in SCHEMES}
    assert all(0 <= v < 50 for v in (*scores.units.values(), *scores.types.values()))
    head = next(u for u in s.units if u.role == "head")
    assert scores.types["head", SCHEMES[0]] == pytest.approx(scores.units[head, SCHEMES[0]], rel=1e-6)
    assert any("scores" in note for note in scores.notes) == (how == "fisher")


def test_a_type_together_is_measured_and_not_added_up():
    s = study("llama")
    scores = score(s, "measured")
    members = [u for u in s.units if u.role == "ffn out"]
    assert scores.types["ffn out", SCHEMES[1]] == s.measured(dict.fromkeys(members, SCHEMES[1]))


def test_gradients_are_taken_a_part_of_the_units_at_a_time(monkeypatch):
    data = [zoo.tokens(9, 9)]
    one = study("llama", data)
    a, positions, units = one.estimate(seed=2)
    monkeypatch.setattr("quantailor.searching.sensitivity.SOLVED_BYTES", 2 * 3000)
    parts = study("llama", data)
    parts.model.load_state_dict(one.model.state_dict())
    parts = Study(parts.model, parts.units, SCHEMES, ptq.method("rtn"), data, data)
    b, same, _ = parts.estimate(seed=2)
    assert positions == same and torch.allclose(a, b, rtol=1e-4, atol=1e-7) and not parts.variants.solved
    assert [u.name for u in units] == [u.name for u in one.units if u.role != "scores"]


def test_what_suits_the_size():
    small = [Unit((f"l{i}",), "o", i, 1000) for i in range(MEASURED_UNITS)]
    assert choose_how(small) == "measured" and choose_how([*small, small[0]]) == "fisher"
    assert choose_how([Unit(("l",), "o", 0, MEASURED_WEIGHTS + 1)]) == "fisher"
