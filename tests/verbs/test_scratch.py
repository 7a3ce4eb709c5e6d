"""From random weights of the same architecture."""

import shutil

import pytest
import torch

from quantailor import api
from quantailor.errors import UntrustedInput, UsageError
from quantailor.qat.checkpoint import fingerprint
from quantailor.verbs.scratch import random_start
from tests.formats.making import texts


def test_a_config_and_a_tokenizer_are_enough(tiny_lm, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_lm, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = api.Settings(steps=6, batch_size=4, evaluations=1, learning_rate=1e-2)
    made = api.train(
        bare, texts(20, seed=1), scheme="w2a16-g32", eval_data=texts(4, seed=2), settings=settings, context=32,
        from_scratch=True,
    )  # fmt: skip
    assert made.training.improved
    assert any("random weights, drawn by seed 0" in note for note in made.notes)
    assert any("weights are random, so the float model teaches nothing" in note for note in made.notes)
    api.save(made, tmp_path / "out")
    assert api.check(tmp_path / "out").equal


def test_the_seed_draws_the_weights_and_the_trained_ones_are_not_read(tiny_lm):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (random_start(tiny_lm, seed) for seed in (1, 1, 2))
    in_memory = random_start(api.load(tiny_lm), 1)
    prints = [fingerprint(m.model) for m in (one, same, other, in_memory, api.load(tiny_lm))]
    assert prints[0] == prints[1] == prints[3] and len(set(prints)) == 3
    assert torch.equal(before, torch.get_rng_state())
    assert one.parent["weights"] == "random weights, drawn by seed 1" and not one.model.training


def test_a_teacher_may_be_named(tiny_lm):
    settings = api.Settings(steps=1, batch_size=4, evaluations=1)
    data = texts(10, seed=1)
    made = api.train(
        tiny_lm, data, scheme="w4a16-g32", eval_data=data, settings=settings, context=32, from_scratch=True,
        teacher=tiny_lm,
    )  # fmt: skip
    assert not any("teaches nothing" in note for note in made.notes)


def test_what_has_no_start(tiny_bert, tiny_lm, tmp_path):
    with pytest.raises(UntrustedInput):
        random_start(tmp_path / "nowhere", 0)
    with pytest.raises(UsageError, match="quantized; give its float parent"):
        random_start(api.quantize(tiny_lm, "w8a16"), 0)
    shutil.copytree(tiny_bert, tmp_path / "bare")
    text = (tmp_path / "bare" / "config.json").read_text().replace("BertForSequenceClassification", "BertModel")
    (tmp_path / "bare" / "config.json").write_text(text)
    with pytest.raises(UsageError, match="bare encoder"):
        random_start(tmp_path / "bare", 0)
