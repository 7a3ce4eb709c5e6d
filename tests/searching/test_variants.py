"""Layers swapped onto a grid and back."""

import pytest
import torch

from quantailor import ptq
from quantailor.data.batching import PadCollator
from quantailor.errors import UsageError
from quantailor.models.prepare import prepare
from quantailor.models.roles import find_roles
from quantailor.ptq.driver import calibrate, methods_of
from quantailor.recipe import Keep, Recipe, Rule
from quantailor.searching.sensitivity import Study
from quantailor.searching.variants import check_choices, unit_bytes
from quantailor.spec import Scheme
from tests.models import zoo


def study(name, method, schemes, batches=None):
    model = getattr(zoo, name)()
    batches = batches or [zoo.tokens(20, 16), zoo.tokens(18, 18)]
    found = Study(
        model, find_roles(model).units, [Scheme.parse(s) for s in schemes], ptq.method(method), batches, batches
    )
    found.solve()
    return found


@pytest.mark.parametrize("scheme", ["w3a16-g16", "w4a8"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_one_unit_alone_is_what_quantize_makes_of_it(name, scheme):
    """The library's own walk, with everything else kept, on the first block: its statistics are the float model's."""
    s = study(name, "gptq", [scheme])
    for unit in (u for u in s.units if u.block == 0 and u.role not in ("norm", "scores")):
        twin = getattr(zoo, name)()
        twin.load_state_dict(s.model.state_dict())
        rules = [Rule(s.schemes[0], pattern=n) for n in unit.layers] + [Rule(Keep("alone"), pattern="*")]
        state = prepare(twin, Recipe(Scheme(), tuple(rules)))
        calibrate(twin, s.calibration, methods_of(state, "gptq"))
        with torch.no_grad(), s.variants.applied({unit: s.schemes[0]}):
            mine = s.model(**s.held[0]).logits
            wanted = twin(**s.held[0]).logits
        assert torch.allclose(mine, wanted, atol=2e-5), unit.name


def test_afterwards_the_very_tensors_are_back_even_after_a_failure():
    s = study("llama", "rtn", ["w2a16-g16", "w4a8"])
    storage = {n: p.data_ptr() for n, p in s.model.named_parameters()}
    with pytest.raises(ZeroDivisionError), s.variants.applied(dict.fromkeys(s.units, s.schemes[1])):
        assert any(p.data_ptr() != storage[n] for n, p in s.model.named_parameters())
        raise ZeroDivisionError
    assert {n: p.data_ptr() for n, p in s.model.named_parameters()} == storage
    assert not any(m._forward_pre_hooks for m in s.model.modules())


def test_applied_within_applied_goes_back_to_the_outer_one():
    s = study("llama", "rtn", ["w2a16-g16", "w4a16-g16"])
    unit = s.units[-1]
    with s.variants.applied({unit: s.schemes[0]}):
        outer = s.model.lm_head.weight.clone()
        with s.variants.applied({unit: s.schemes[1]}):
            assert not torch.equal(s.model.lm_head.weight, outer)
        assert torch.equal(s.model.lm_head.weight, outer)


def test_bytes_count_what_is_shared_once_and_scores_not():
    model = zoo.llama(tie=True)
    units = {u.role: u for u in find_roles(model) if u.block in (None, 0)}
    scheme = Scheme.parse("w8a16")
    assert unit_bytes(model, units["embedding"], scheme) == 50 * 32 + 50 * 4
    assert unit_bytes(model, units["embedding"], None) == 50 * 32 * 4
    assert (
        unit_bytes(model, units["ffn in"], scheme) == 2 * (44 * 32 + 44 * 4)
        and unit_bytes(model, units["scores"], scheme) == 0
    )


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ([], "no choices"),
        (["float"], "float is no choice"),
        (["w8a8-static"], "dynamic"),
        (["w4a16", "w4a16"], "twice"),
    ],
)
def test_choices_that_cannot_be_tried(schemes, message):
    with pytest.raises(UsageError, match=message):
        check_choices([Scheme.parse(s) for s in schemes])


def test_a_layer_that_no_data_reaches_is_told():
    model = zoo.llama()
    model.spare = torch.nn.Linear(32, 8)
    batches = [PadCollator(0)([{"input_ids": [3, 4, 5, 6], "labels": 0}])]
    s = Study(model, find_roles(model).units, [Scheme.parse("w4a16")], ptq.method("gptq"), batches, batches)
    s.solve()
    assert any(note.startswith("spare: no data reached it") for note in s.notes)
