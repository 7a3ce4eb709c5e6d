"""Running from a block on is running all of it."""

import pytest
import torch

from quantailor.searching.suffix import Suffix
from tests.models import zoo


def whole(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_every_start_gives_the_very_logits(name):
    model = getattr(zoo, name)()
    batches = [zoo.tokens(7, 5), zoo.tokens(6, 6)]
    suffix = Suffix(model, batches)
    assert suffix.can_skip and suffix.notes == []
    for index, batch in enumerate(batches):
        for start in range(3):
            assert torch.equal(suffix.logits(index, start), whole(model, batch))


def test_a_change_behind_the_start_is_seen_and_one_before_it_only_after_a_refresh():
    model = zoo.llama()
    suffix = Suffix(model, [zoo.tokens(8)])
    before = suffix.logits(0)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(2)
    late = suffix.logits(0, 1)
    assert torch.equal(late, whole(model, suffix.batches[0])) and not torch.equal(late, before)
    model.model.layers[0].mlp.down_proj.weight.data.mul_(2)
    assert torch.equal(suffix.logits(0, 1), late), "what ran before is taken as it was"
    suffix.refresh()
    assert torch.equal(suffix.logits(0, 1), whole(model, suffix.batches[0])) and not torch.equal(
        suffix.logits(0, 1), late
    )


def test_where_each_layer_starts():
    suffix = Suffix(zoo.llama(), [zoo.tokens(8)])
    assert suffix.start_of["model.embed_tokens"] == 0 == suffix.start_of["model.layers.0.self_attn.q_proj"]
    assert suffix.start_of["model.layers.1.mlp.up_proj"] == 1 and suffix.start_of["lm_head"] == 2


@pytest.mark.parametrize("name", ["albert", "t5"])
def test_models_that_are_no_plain_chain(name):
    """A layer that runs three times cannot be skipped; a decoder that reads the encoder can."""
    model = getattr(zoo, name)()
    batch = zoo.tokens(6, 6)
    batch |= {"decoder_input_ids": batch["input_ids"]} if name == "t5" else {}
    suffix = Suffix(model, [batch])
    for start in range(4):
        assert torch.equal(suffix.logits(0, start), whole(model, batch))
    model.get_submodule("classifier" if name == "albert" else "decoder.final_layer_norm").weight.data.mul_(2)
    assert torch.equal(suffix.logits(0, 4), whole(model, batch))
    if name == "albert":
        assert not suffix.can_skip and "whole model" in suffix.notes[0]


def test_outputs_that_do_not_fit_are_not_kept():
    model = zoo.llama()
    suffix = Suffix(model, [zoo.tokens(8), zoo.tokens(8)], cache_bytes=3000)
    assert not suffix.can_skip and "GiB" in suffix.notes[0]
    assert torch.equal(suffix.logits(1, 1), whole(model, suffix.batches[1]))


def test_blocks_have_their_own_forward_back():
    model = zoo.llama()
    suffix = Suffix(model, [zoo.tokens(8)])
    with pytest.raises(ZeroDivisionError):
        suffix.until(0, 1, model.lm_head, lambda x: 1 / 0)
    assert all("forward" not in vars(block) for block in model.model.layers)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
