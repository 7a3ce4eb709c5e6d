"""The real peft: it reads our adapters, its own adapters run on packed layers and come back to us."""

import copy
import os
import warnings

import pytest
import torch

import quantailor as qt
from quantailor.errors import UsageError
from quantailor.evaluate.parity import digests
from quantailor.models.adapt import adapt
from quantailor.models.prepare import pack_model
from quantailor.models.structure import modules_of
from quantailor.nn.lora import LoRA, LoRALinear
from tests.formats.making import quantized

peft = pytest.importorskip("peft")
from quantailor.formats.peft_layers import LoraQuantLinear, with_packed_layers  # noqa: E402

IDS = torch.arange(3, 43)[None]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def lm(tiny_lm):
    return qt.load(tiny_lm)


@pytest.fixture(scope="module")
def base(lm, tmp_path_factory):
    """A packed folder."""
    return qt.save(quantized(lm, "w4a16-g32", method="rtn"), tmp_path_factory.mktemp("base") / "packed")


def shaken(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    return model


def config(**changes):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **changes})


def test_peft_reads_our_adapter_onto_the_float_model(lm, base, tmp_path):
    """On floats it is ordinary LoRA: W + (alpha / r) B A, the weight that ours rounds."""
    ours = qt.add_adapter(qt.load(base), LoRA(r=4, lora_alpha=6, target_modules=("q_proj", "v_proj")))
    shaken(ours.model)
    qt.save_adapter(ours, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(lm.model), tmp_path / "adapter")
    count = 0
    for name, layer in modules_of(ours.model, LoRALinear):
        adapter, other = layer.adapters["default"], theirs.base_model.model.get_submodule(name)
        assert torch.equal(other.lora_A["default"].weight, adapter.lora_A)
        assert torch.equal(other.lora_B["default"].weight, adapter.lora_B)
        torch.testing.assert_close(other.get_delta_weight("default"), 1.5 * adapter.lora_B @ adapter.lora_A)
        count += 1
    assert count == sum(isinstance(m, peft.tuners.lora.Linear) for m in theirs.modules()) == 4


def test_beside_the_rounding_ours_is_peft_s_on_the_same_base(base, tmp_path):
    """Logits of our QLoRA and of peft's layer around the packed one."""
    ours = qt.add_adapter(qt.load(base), LoRA(r=4, lora_alpha=6, inside=False))
    shaken(ours.model)
    qt.save_adapter(ours, tmp_path / "adapter")
    mapping = with_packed_layers(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    theirs = peft.PeftModel.from_pretrained(qt.load(base).model, tmp_path / "adapter", config=mapping)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(input_ids=IDS).logits, ours.model.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8", "nf4-dq"])
def test_get_peft_model_trains_on_packed_layers(lm, scheme, tmp_path):
    packed = qt.pack(quantized(lm, scheme, method="rtn"))
    plain = copy.deepcopy(packed.model)
    tuned = peft.get_peft_model(packed.model, with_packed_layers(config()))
    assert sum(isinstance(m, LoraQuantLinear) for m in tuned.modules()) == 4
    with torch.no_grad():
        assert torch.equal(tuned(input_ids=IDS).logits, plain(input_ids=IDS).logits)  # starts as the base
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = tuned(input_ids=IDS, labels=IDS).loss
        loss.backward()
        trained = {n for n, p in tuned.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01 and len(trained) == 8  # the gradient reaches the first block, through integers
    tuned.save_pretrained(tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    mapping = with_packed_layers(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter", config=mapping)
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=IDS).logits, tuned.eval()(input_ids=IDS).logits)


def test_an_adapter_of_peft_s_comes_to_us(base, tmp_path):
    tuned = shaken(peft.get_peft_model(qt.load(base).model, with_packed_layers(config())))
    tuned.save_pretrained(tmp_path / "adapter")
    ours = qt.load_adapter(base, tmp_path / "adapter")
    assert "saved by peft" in ours.notes[-1]
    with torch.no_grad():
        torch.testing.assert_close(ours.model.eval()(input_ids=IDS).logits, tuned.eval()(input_ids=IDS).logits)


def test_their_merge_rounds_again_warns_and_can_be_undone(base):
    tuned = shaken(peft.get_peft_model(qt.load(base).model, with_packed_layers(config())))
    layer = next(m for m in tuned.modules() if isinstance(m, LoraQuantLinear))
    before = layer.base_layer.packed.integers().clone()
    with torch.no_grad():
        target = layer.base_layer.packed.dequantize() + layer.get_delta_weight("default")
        with pytest.warns(UserWarning, match="off by"):
            layer.merge()
        expected = layer.base_layer.packed.encode(target, slice(0, len(target)))
    assert torch.equal(layer.base_layer.packed.integers(), expected) and not torch.equal(expected, before)
    layer.unmerge()
    assert torch.equal(layer.base_layer.packed.integers(), before)
    with pytest.warns(UserWarning, match="off by"):
        merged = tuned.merge_and_unload()
    assert not any(isinstance(m, LoraQuantLinear) for m in merged.modules())


def test_without_the_mapping_peft_says_so(base):
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(qt.load(base).model, config())


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}])
def test_what_looks_into_the_weight_is_refused(base, changes):
    with pytest.raises(UsageError, match=next(iter(changes))):
        peft.get_peft_model(qt.load(base).model, with_packed_layers(config(**changes)))


def test_what_we_cannot_hold_of_theirs_is_refused(lm, base, tmp_path):
    tuned = peft.get_peft_model(copy.deepcopy(lm.model), config(use_rslora=True))
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match="use_rslora"):
        qt.load_adapter(base, tmp_path / "adapter")


def test_ours_and_theirs_draw_a_alike(lm):
    """The same distribution: uniform with the same bound."""
    model = pack_model(quantized(lm, "w4a16-g32", method="rtn").model)
    expected = digests(model)
    adapt(model, LoRA(r=32))
    assert digests(model) == expected
    theirs = peft.get_peft_model(copy.deepcopy(lm.model), config(r=32, target_modules=["q_proj"]))
    name = "model.layers.0.self_attn.q_proj"
    a, b = model.get_submodule(name).adapters["default"].lora_A, theirs.base_model.model.get_submodule(name).lora_A
    assert float(a.abs().max()) == pytest.approx(float(b["default"].weight.abs().max()), rel=0.02)
