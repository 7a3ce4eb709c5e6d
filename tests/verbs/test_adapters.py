"""Adapters through the verbs: trained, saved alone, put onto their base again, merged to what was trained."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantailor as qt
from quantailor.errors import UntrustedInput, UsageError
from quantailor.evaluate.parity import digests
from quantailor.models.adapt import active, adapters
from quantailor.models.structure import modules_of
from quantailor.nn.lora import LoRALinear
from tests.formats.making import bytes_of, quantized, records, texts

FAST = qt.Settings(steps=4, batch_size=4, evaluations=2, learning_rate=1e-2)
SCHEMES = ["w4a16-g32", "w2a16-g32-balanced", "w4a16-g32-asym", "w8a8", "w4a8-g32", "w8a8-static", "w1.58a8"]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def lm(tiny_lm):
    return qt.load(tiny_lm)


def tuned(model, scheme="w4a16-g32", lora=None, settings=FAST, **options):
    data = texts(24, seed=1) if model.task == "lm" else records(40, seed=1)
    held = texts(6, seed=2) if model.task == "lm" else records(20, seed=2)
    lora = lora or qt.LoRA(r=4)
    return qt.train(model, data, scheme=scheme, eval_data=held, settings=settings, lora=lora, context=48, **options)


def moved(model):
    """Its adapter has moved integers: else nothing below would show anything."""
    layers = [m for _, m in modules_of(model.model, LoRALinear)]
    return any(not torch.equal(m.merged().packed.integers(), m.packed.integers()) for m in layers)


def shaken(model):
    """With an adapter that is surely not the base."""
    with torch.no_grad():
        for name, p in model.model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(std=0.05)
            if name.endswith("log_scale"):
                p.normal_(std=0.05)
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_saved_is_what_was_trained(lm, scheme, tmp_path):
    trained = shaken(tuned(lm, scheme))
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        logits = trained.model.eval()(input_ids=ids).logits
        merged = qt.merge(trained)
        assert merged.is_packed and not trained.is_packed and moved(trained)
        difference = (merged.model(input_ids=ids).logits - logits).abs().max()
    assert difference <= 1e-5
    assert digests(merged.model) == digests(trained.model)
    qt.save(trained, tmp_path / "out")
    parity = qt.check(tmp_path / "out")
    assert parity.equal and not parity.differing and parity.max_logit_difference <= (1e-5 if "a16" in scheme else 1e-3)
    assert digests(qt.load(tmp_path / "out").model) == digests(trained.model)


def test_training_an_adapter_moves_it_and_nothing_else(lm):
    trained = tuned(lm)
    assert trained.training.improved and moved(trained)
    assert trained.state.method.endswith("+lora") and "trainable" in " ".join(trained.notes)
    layers = dict(modules_of(trained.model, LoRALinear))
    assert trained.training.trainable == sum(4 * (m.in_features + m.out_features) for m in layers.values())
    for name, parameter in trained.model.named_parameters():
        if ".adapters." not in name:
            assert torch.equal(parameter, lm.model.get_parameter(name))


def test_beside_the_rounding_a_merge_changes_the_model_and_says_so(lm, tmp_path):
    trained = shaken(tuned(lm, lora=qt.LoRA(r=4, inside=False)))
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        logits, merged = trained.model.eval()(input_ids=ids).logits, qt.merge(trained)
        assert (merged.model(input_ids=ids).logits - logits).abs().max() > 1e-3
    assert "rounded 14 layers again" in merged.notes[-1]
    qt.save(merged, tmp_path / "out")
    assert qt.check(tmp_path / "out").equal


def test_a_classifier_and_its_receipt(tiny_bert, tmp_path):
    trained = tuned(qt.load(tiny_bert), "w8a8", qt.LoRA(r=2, target_modules=("query", "value")), task_options())
    qt.save(shaken(trained), tmp_path / "out")
    assert qt.check(tmp_path / "out").equal


def task_options():
    return qt.Settings(steps=3, batch_size=8, evaluations=1, learning_rate=1e-2, kl_weight=0.0, task_weight=1.0)


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def trained(lm):
    return shaken(tuned(lm, lora=qt.LoRA(r=4, lora_alpha=6, lora_dropout=0.1, scales=True)))


@pytest.fixture(scope="module")
def folders(trained, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return qt.save_base(trained, root / "base"), qt.save_adapter(trained, root / "adapter")


def test_an_adapter_alone_comes_back_on_its_base(trained, folders):
    base, adapter = folders
    assert qt.check(base).equal
    again = qt.load_adapter(base, adapter)
    assert digests(again.model) == digests(trained.model) and digests(qt.merge(again).model) == digests(trained.model)
    assert active(again.model) == "default" and not any("other integers" in n for n in again.notes)
    lora = next(modules_of(again.model, LoRALinear))[1].adapters["default"].lora
    assert (lora.r, lora.alpha, lora.lora_dropout, lora.inside, lora.scales) == (4, 6.0, 0.1, True, True)


def test_saving_it_again_gives_the_same_bytes(folders, tmp_path):
    base, adapter = folders
    again = qt.load_adapter(base, adapter)
    qt.save_adapter(again, tmp_path / "again")
    qt.save_base(again, tmp_path / "base")
    for name in ("adapter_model.safetensors", "adapter_config.json", "scales.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (adapter / name).read_bytes()
    for name in ("quantailor.safetensors", "fractions.safetensors", "config.json"):
        assert (tmp_path / "base" / name).read_bytes() == (base / name).read_bytes()


def test_several_on_one_base_are_swapped(folders, trained, tmp_path):
    base, first = folders
    other = shaken(qt.train(base, texts(24, seed=9), lora=qt.LoRA(r=2), teacher=None, settings=FAST, context=48))
    qt.save_adapter(other, tmp_path / "second")
    both = qt.load_adapter(qt.load_adapter(base, first, name="one"), tmp_path / "second", name="two")
    assert adapters(both.model) == ["one", "two"] and active(both.model) == "two"
    assert digests(both.model) == digests(other.model)
    assert digests(qt.set_adapter(both, "one").model) == digests(trained.model)
    assert digests(qt.set_adapter(both, None).model) == digests(qt.load(base).model)
    assert digests(qt.set_adapter(both, "two").model) == digests(other.model)
    with pytest.raises(UsageError, match="'three'; this model has one, two"):
        qt.set_adapter(both, "three")


def test_another_base_is_refused(lm, folders, tmp_path):
    base, adapter = folders
    other = qt.save(quantized(lm, "w4a16-g32", method="gptq"), tmp_path / "other")
    with pytest.raises(UsageError, match="belongs to another base"):
        qt.load_adapter(other, adapter)
    with pytest.raises(UsageError, match="belongs to another base"):
        qt.load_adapter(qt.load(base), adapter)  # read as a model to serve, without the fractions
    with pytest.raises(UsageError, match="float"):
        qt.load_adapter(lm, adapter)


def test_a_packed_folder_is_a_base_as_it_is(lm, tmp_path):
    base = qt.save(quantized(lm, "w4a16-g32", method="rtn"), tmp_path / "base")
    before = bytes_of(base)
    trained = qt.train(base, texts(24, seed=1), lora=4, teacher=None, settings=FAST, context=48)
    assert any("no fractions" in note for note in trained.notes) and trained.training.improved
    qt.save_adapter(trained, tmp_path / "adapter")
    again = qt.load_adapter(base, tmp_path / "adapter")
    assert digests(again.model) == digests(trained.model) and bytes_of(base) == before


def test_training_goes_on_with_the_adapter_that_is_there(folders):
    base, adapter = folders
    both = qt.load_adapter(base, adapter)
    before = digests(both.model)
    more = qt.train(both, texts(24, seed=1), teacher=None, settings=FAST, context=48)
    assert more.training.improved and digests(both.model) == before != digests(more.model)
    with pytest.raises(UsageError, match="leave lora out"):
        qt.train(both, texts(24, seed=1), lora=4, teacher=None, settings=FAST, context=48)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        ("bit", "sha256"),
        ("missing", "adapter_model.safetensors"),
        ("rank", "rank"),
        ("half", "one half"),
        ("stranger", "no half"),
        ("nan", "NaN"),
        ("layer", "does not have"),
        ("dora", "use_dora"),
        ("kind", "not of a LoRA"),
        ("version", "version 9"),
    ],
)
def test_a_damaged_adapter_is_refused(folders, tmp_path, damage, word):
    base, adapter = folders
    copied = tmp_path / "adapter"
    copied.mkdir()
    for path in adapter.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    weights, config, own = (
        copied / n for n in ("adapter_model.safetensors", "adapter_config.json", "quantailor_adapter.json")
    )
    if damage == "bit":
        raw = bytearray(weights.read_bytes())
        raw[-5] ^= 4
        weights.write_bytes(raw)
    else:
        (copied / "MANIFEST.json").unlink()
        tensors = load_file(weights)
        first = sorted(tensors)[0]
        settings = json.loads(config.read_text())
        match damage:
            case "rank":
                settings["r"] = 5
            case "half":
                del tensors[first]
            case "stranger":
                tensors["base_model.model.x.magnitude"] = torch.ones(3)
            case "nan":
                tensors[first][0, 0] = float("nan")
            case "layer":
                tensors = {n.replace("layers.0", "layers.7"): t for n, t in tensors.items()}
                own.unlink()
            case "dora":
                settings["use_dora"] = True
            case "kind":
                settings["peft_type"] = "IA3"
            case "version":
                own.write_text(json.dumps({**json.loads(own.read_text()), "format_version": 9}))
        config.write_text(json.dumps(settings))
        save_file(tensors, weights)
        if damage == "missing":
            weights.unlink()
    with pytest.raises((UntrustedInput, UsageError), match=word):
        qt.load_adapter(base, copied)


# ------------------------------------------------------------------------------------------------ training


def test_loftq_finds_the_integers_itself(lm):
    inside = tuned(lm, lora=qt.LoRA(r=16, init="loftq"))
    assert inside.state.method == "loftq+lora" and moved(inside)
    assert digests(qt.merge(inside).model) == digests(inside.model)
    with pytest.raises(UsageError, match="method"):
        tuned(lm, lora=qt.LoRA(r=16, init="loftq"), method="gptq")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"gradient": "ste"}, "gradient"),
        ({"trains": "scales"}, "trains"),
        ({"cage": 1.0}, "cage"),
        ({"freeze_ranges": 0.5}, "freeze_ranges"),
        ({"parallel": "fsdp2"}, "parallel"),
        ({"train_only": ("*.q_proj",)}, "train_only"),
    ],
)
def test_settings_about_float_weights_are_refused(lm, settings, word):
    with pytest.raises(UsageError, match=word):
        tuned(lm, settings=qt.Settings(steps=2, **settings))


def test_float_is_no_grid_for_an_adapter(lm):
    with pytest.raises(UsageError, match="float"):
        tuned(lm, "float")


@pytest.mark.parametrize("extra", [{"gradient_checkpointing": True}, {"precision": "bfloat16"}])
def test_checkpointing_and_mixed_precision_merge_as_exactly(lm, extra):
    settings = qt.Settings(steps=3, batch_size=4, evaluations=1, learning_rate=1e-2, **extra)
    trained = tuned(lm, settings=settings)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        difference = trained.model.eval()(input_ids=ids).logits - qt.merge(trained).model(input_ids=ids).logits
    assert difference.abs().max() <= 1e-5


def test_checkpointing_gives_the_gradients_of_none(lm):
    ends = []
    for on in (False, True):
        settings = qt.Settings(steps=2, batch_size=4, evaluations=1, learning_rate=1e-2, gradient_checkpointing=on)
        trained = tuned(lm, settings=settings, lora=qt.LoRA(r=4, lora_dropout=0.2))
        ends.append({n: p.detach().clone() for n, p in trained.model.named_parameters() if ".adapters." in n})
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-3, atol=1e-5)


def test_the_source_stays_as_it_was(lm):
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    tuned(lm)
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in lm.model.named_parameters())
