"""Other tools' folders come in with exactly their integers; what does not fit is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantailor import api
from quantailor.errors import UntrustedInput, UsageError
from quantailor.models.prepare import unpack_model
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.spec import PerGroup, QuantSpec
from tests.formats import foreign_making as make
from tests.formats.making import bytes_of, texts

DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
IN_FLOAT = {
    "gptq 4, asymmetric": lambda: make.gptq(),
    "gptq 4, symmetric": lambda: make.gptq(symmetric=True),
    "gptq 4, act-order": lambda: make.gptq(act_order=True),
    "gptq 4, act-order, symmetric": lambda: make.gptq(act_order=True, symmetric=True),
    "gptq 4, zero points of 0": lambda: make.gptq(lowest_zero=0),
    "gptq 3, v2": lambda: make.gptq(3, version=2, lowest_zero=0),
    "gptq 4, v2": lambda: make.gptq(version=2, lowest_zero=0),
    "gptq 2": lambda: make.gptq(2, lowest_zero=0),
    "gptq 3": lambda: make.gptq(3),
    "gptq 8": lambda: make.gptq(8),
    "gptq 8, symmetric": lambda: make.gptq(8, symmetric=True),
    "gptq 4, channel": lambda: make.gptq(group_size=-1),
    "awq": lambda: make.awq(),
    "ct 4, group": lambda: make.compressed(),
    "ct 2, group, half scales": lambda: make.compressed(2, scale_dtype=torch.float16),
    "ct 8, channel": lambda: make.compressed(8, "channel"),
    "ct 4, asymmetric": lambda: make.compressed(symmetric=False),
    "ct 4, act-order": lambda: make.compressed(act_order=True),
    "ct 4, asymmetric, act-order": lambda: make.compressed(symmetric=False, act_order=True),
    "ct 3, dense": lambda: make.compressed(3),
    "ct 3, whole fields": lambda: make.compressed(3, dense=False),
    "ct 3, asymmetric, whole fields": lambda: make.compressed(3, symmetric=False, dense=False),
    "ct 8, int-quantized, asymmetric": lambda: make.compressed(8, "channel", symmetric=False, kind="int-quantized"),
    "ct 8, int-quantized, tensor": lambda: make.compressed(8, "tensor", kind="int-quantized"),
    "ct 4, naive": lambda: make.compressed(4, kind="naive-quantized"),
    "ct by pattern": lambda: make.compressed(targets=(r"re:.*self_attn\..*", r"re:.*(mlp)\.\w")),
    "nf4": lambda: make.nf4(),
    "nf4, doubled": lambda: make.nf4(doubled=True),
    "nf4, blocks of 16": lambda: make.nf4(block=16),
}
ON_INTEGERS = {
    "ct w8a8": lambda: make.compressed(8, "channel", kind="int-quantized", inputs=DYNAMIC),
    "ct w8a8 static": lambda: make.compressed(8, "channel", kind="int-quantized", inputs=STATIC),
    "ct w8a8 static, tensor": lambda: make.compressed(8, "tensor", kind="int-quantized", inputs=STATIC),
    "bitsandbytes int8": lambda: make.int8(),
    "bitsandbytes int8, no outliers": lambda: make.int8(0.0),
}
PROBE = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_lm):
    """made(case) -> (folder, float model with the weights that its integers stand for), each made once."""
    done = {}

    def one(case: str):
        if case not in done:
            config, pack = (IN_FLOAT | ON_INTEGERS)[case]()
            done[case] = make.write(tmp_path_factory.mktemp("theirs") / "model", tiny_lm, config, pack)
        return done[case]

    return one


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(PROBE).logits


@pytest.mark.parametrize("case", IN_FLOAT)
def test_the_weights_are_those_of_the_arithmetic_to_the_last_bit(made, case):
    folder, reference = made(case)
    model = api.load(folder)

    assert model.is_packed and len(model.state.inventory.quantized) == 14
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert torch.equal(model.model.get_submodule(name).weight, module.weight), name
    assert torch.equal(logits(model.model), logits(reference))


@pytest.mark.parametrize("case", ON_INTEGERS)
def test_layers_that_quantize_inputs_hold_the_same_weights(made, case):
    folder, reference = made(case)
    model = api.load(folder)
    scheme = next(iter(model.state.inventory.quantized.values()))

    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear):
            torch.testing.assert_close(model.model.get_submodule(name).weight, module.weight, rtol=2.5e-7, atol=0)
    assert str(scheme) == {
        "ct w8a8": "w8a8",
        "ct w8a8 static": "w8a8-static-minmax",
        "bitsandbytes int8": "w8a8-outliers",
        "bitsandbytes int8, no outliers": "w8a8",
    }.get(case, str(scheme))
    if "static" in case:
        assert float(model.model.get_submodule("model.layers.0.mlp.up_proj").input_scale) == pytest.approx(0.04)
    assert float((logits(model.model) - logits(reference)).abs().max() / logits(reference).abs().max()) < 0.2


@pytest.mark.parametrize("case", ["ct w8a8", "ct w8a8 static", "ct 4, group", "ct 8, channel"])
def test_stock_transformers_computes_the_same_from_the_folder(made, case):
    pytest.importorskip("compressed_tensors", reason="the interop extra is not installed")
    from transformers import AutoModelForCausalLM

    folder, _ = made(case)
    theirs, ours = logits(AutoModelForCausalLM.from_pretrained(folder).eval()), logits(api.load(folder).model)

    difference = (theirs - ours).abs() / theirs.abs().max()
    on_integers = "w8a8" in case  # the largest input of a token lies halfway between two steps: a few roundings flip
    assert float((difference <= 1e-5).float().mean()) >= (0.9 if on_integers else 1.0)
    assert float(difference.max()) <= (1e-2 if on_integers else 1e-5)


@pytest.mark.parametrize("case", [*IN_FLOAT, *ON_INTEGERS])
def test_simulated_and_packed_agree_and_saving_twice_gives_the_same_bytes(made, tmp_path, case):
    folder, _ = made(case)
    assert api.check(folder).equal
    first = api.save(api.load(folder), tmp_path / "first")
    assert torch.equal(logits(api.load(first).model), logits(api.load(folder).model))
    assert api.check(first).equal

    again = api.save(api.load(first), tmp_path / "again")
    assert bytes_of(again) == bytes_of(first)


@pytest.mark.parametrize("case", ["gptq 4, act-order", "awq", "nf4"])
def test_training_goes_on_from_their_integers(made, case):
    folder, _ = made(case)
    settings = api.Settings(steps=4, batch_size=4, evaluations=1, learning_rate=1e-3)
    trained = api.train(folder, texts(20, seed=1), teacher=None, settings=settings, context=32)

    assert not trained.is_packed and trained.state.method.startswith(case.split()[0].replace("nf4", "bitsandbytes"))
    moved = [p for n, p in trained.model.named_parameters() if n.endswith("self_attn.q_proj.weight")]
    start = unpack_model(api.load(folder).model)
    assert all(torch.isfinite(p).all() for p in moved)
    assert torch.equal(logits(start), logits(api.load(folder).model))


@pytest.mark.parametrize("case", ["gptq 4, act-order", "awq"])
def test_an_adapter_trains_on_their_integers_and_merges_to_what_was_trained(made, case):
    settings = api.Settings(steps=4, batch_size=4, evaluations=1, learning_rate=1e-2)
    trained = api.train(made(case)[0], texts(20, seed=1), teacher=None, lora=4, settings=settings, context=32)
    merged = api.merge(trained)

    assert merged.is_packed and merged.state.inventory.quantized.keys() == trained.state.inventory.quantized.keys()
    torch.testing.assert_close(logits(merged.model), logits(trained.model), rtol=1e-5, atol=1e-5)


def test_act_order_trains_as_the_layer_with_its_inputs_put_in_turn(made):
    """The slow obvious way: reorder the columns so that groups lie together, quantize plainly, put them back."""
    layer = unpack_model(api.load(made("gptq 4, act-order")[0]).model).get_submodule("model.layers.0.mlp.down_proj")
    indexed = layer.weight_quantizer
    order = torch.argsort(indexed.group_index, stable=True)
    plain = WeightQuantizer(QuantSpec(indexed.spec.grid, PerGroup(32)), *layer.weight.shape)
    plain.set_scale(indexed.base_scale, indexed.zero_point)
    noise = torch.randn_like(layer.weight) * 0.01
    left = (layer.weight.detach() + noise).requires_grad_()
    right = (layer.weight.detach() + noise)[:, order].requires_grad_()
    up = torch.randn_like(left)

    one, other = indexed(left), plain(right)
    assert torch.equal(one[:, order], other) and torch.equal(indexed.integers(left)[:, order], plain.integers(right))
    (one * up).sum().backward()
    (other * up[:, order]).sum().backward()
    assert torch.equal(left.grad[:, order], right.grad)
    torch.testing.assert_close(indexed.log_scale.grad, plain.log_scale.grad, rtol=1e-5, atol=1e-8)


def test_notes_say_what_is_not_as_in_the_file(made):
    assert any("stored as -1" in note for note in api.load(made("gptq 4, zero points of 0")[0]).notes)
    assert not any("stored as -1" in note for note in api.load(made("gptq 4, asymmetric")[0]).notes)
    assert any("doubly quantized scales" in note for note in api.load(made("nf4, doubled")[0]).notes)
    assert any("127.5" in note for note in api.load(made("bitsandbytes int8")[0]).notes)


def edited(folder, out, config=None, tensors=None):
    import shutil

    shutil.copytree(folder, out)
    if config is not None:
        held = json.loads((out / "config.json").read_text())
        config(held["quantization_config"])
        (out / "config.json").write_text(json.dumps(held))
    if tensors is not None:
        held = load_file(out / "model.safetensors")
        tensors(held)
        save_file(held, out / "model.safetensors", metadata={"format": "pt"})
    return out


def update(**changes):
    return lambda held: held.update(changes)


Q = "model.layers.0.self_attn.q_proj"
REFUSED = {
    "marlin": ("gptq 4, asymmetric", update(checkpoint_format="marlin"), None, UsageError, "'marlin'"),
    "other bits": ("gptq 4, asymmetric", update(bits=8), None, UntrustedInput, "holds 4 bits"),
    "other groups": ("gptq 4, asymmetric", update(group_size=64), None, UntrustedInput, "group_size 64"),
    "gemv": ("awq", update(version="gemv"), None, UsageError, "'gemv'"),
    "awq 3": ("awq", update(bits=3), None, UsageError, "bits=3"),
    "unknown": ("awq", update(quant_method="quip"), None, UsageError, "quip, which is not read"),
    "fp8": ("ct 4, group", update(format="float-quantized"), None, UsageError, "'float-quantized'"),
    "sparse": ("ct 4, group", update(sparsity_config={"format": "sparse-24-bitmask"}), None, UsageError, "sparsely"),
    "no target": ("ct by pattern", lambda c: c["config_groups"].clear(), None, UntrustedInput, "no config group"),
    "endless pattern": (
        "ct by pattern",
        lambda c: c["config_groups"]["group_0"].update(targets=["re:(a+)+b"]),
        None,
        UsageError,
        "take for ever",
    ),
    "both widths": ("nf4", update(load_in_8bit=True), None, UsageError, "load_in_4bit and load_in_8bit"),
    "8 bit with nf4": ("bitsandbytes int8", update(bnb_4bit_quant_type="nf4"), None, UsageError, "has no 8-bit form"),
    "missing part": ("gptq 4, asymmetric", None, lambda t: t.pop(f"{Q}.scales"), UntrustedInput, "has no scales"),
    "missing float": ("awq", None, lambda t: t.pop("model.norm.weight"), UntrustedInput, "lacks tensor model.norm"),
    "extra": ("awq", None, lambda t: t.update(odd=torch.zeros(1)), UntrustedInput, "has tensor odd"),
    "list of groups": (
        "gptq 4, act-order",
        None,
        lambda t: t[f"{Q}.g_idx"].fill_(2),
        UntrustedInput,
        "names 2 .. 2, and there are 2",
    ),
    "nan": ("awq", None, lambda t: t[f"{Q}.scales"].fill_(torch.nan), UntrustedInput, "nan"),
    "negative 8-bit scale": (
        "ct 8, channel",
        None,
        lambda t: t[f"{Q}.weight_scale"].neg_(),
        UntrustedInput,
        "positive",
    ),
    "other levels": ("nf4", None, lambda t: t[f"{Q}.weight.quant_map"].mul_(0.5), UsageError, "not those of NF4"),
    "straddling": (
        "nf4",
        None,
        lambda t: t.update(
            {
                f"{Q}.weight.quant_state.bitsandbytes__nf4": torch.tensor(
                    list(b'{"blocksize": 48, "shape": [64, 64]}'), dtype=torch.uint8
                )
            }
        ),
        UsageError,
        "blocks of 48",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_in_one_line(made, tmp_path, case):
    source, config, tensors, kind, told = REFUSED[case]
    folder = edited(made(source)[0], tmp_path / "changed", config, tensors)
    with pytest.raises(kind, match=told) as caught:
        api.load(folder)
    assert "\n" not in str(caught.value) and "changed" in str(caught.value)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_config_that_transformers_validates_and_refuses_is_one_line(made, tmp_path, quantized):
    folder = edited(made("awq")[0], tmp_path / "changed")
    held = json.loads((folder / "config.json").read_text()) | {"num_attention_heads": []}
    if not quantized:
        del held["quantization_config"]
    (folder / "config.json").write_text(json.dumps(held))
    with pytest.raises(UntrustedInput, match="num_attention_heads") as caught:
        api.load(folder)
    assert "\n" not in str(caught.value) and "changed" in str(caught.value)


def test_groups_of_scale_zero_are_zeros(made, tmp_path):
    def no_scale(tensors):
        tensors[f"{Q}.scales"][0, :5] = 0

    folder = edited(made("awq")[0], tmp_path / "changed", tensors=no_scale)
    model = api.load(folder)
    weight = model.model.get_submodule(Q).weight
    assert not weight[:5, :32].any() and weight[5:, :32].any(1).all()
    assert any("scale 0" in note for note in model.notes)


def test_zero_points_of_minus_1_that_straddle_words_are_refused(made, tmp_path):
    def all_ones(tensors):
        tensors[f"{Q}.qzeros"].fill_(-1)

    with pytest.raises(UsageError, match="save it again as gptq_v2"):
        api.load(edited(made("gptq 3")[0], tmp_path / "changed", tensors=all_ones))


def test_fp4_is_refused(made, tmp_path):
    def fp4(tensors):
        key = f"{Q}.weight.quant_state.bitsandbytes__nf4"
        tensors[key.replace("nf4", "fp4")] = tensors.pop(key)

    with pytest.raises(UsageError, match="fp4 of bitsandbytes"):
        api.load(edited(made("nf4")[0], tmp_path / "changed", tensors=fp4))
