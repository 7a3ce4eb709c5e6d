"""A prepared or packed model has the blocks that the float one had: calibration walks them, one at a time."""

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from quantailor.models.prepare import pack_model, prepare
from quantailor.models.structure import blocks
from quantailor.ptq.driver import calibrate
from quantailor.ptq.rtn import RTN
from quantailor.recipe import Recipe
from quantailor.spec import Scheme


@pytest.mark.parametrize("kind", ["tiny_lm", "tiny_bert"])
def test_blocks_are_the_same(kind, request):
    auto = AutoModelForCausalLM if kind == "tiny_lm" else AutoModelForSequenceClassification
    model = auto.from_pretrained(request.getfixturevalue(kind))
    names = [name for name, _ in blocks(model)]
    assert len(names) > 1
    prepare(model, Recipe(Scheme.parse("w8a8")))
    assert [name for name, _ in blocks(model)] == names
    assert [name for name, _ in blocks(pack_model(model))] == names


def test_each_block_runs_by_itself_while_calibrating(tiny_lm):
    """The whole model runs once for the chain, once for capture: not once a layer."""
    import torch

    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    prepare(model, Recipe(Scheme.parse("w4a16-g32")))
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    ids = torch.randint(3, 200, (2, 16))
    calibrate(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], lambda _name: RTN())
    assert len(passes) == 2
