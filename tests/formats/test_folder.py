"""What was simulated is what is saved, and what is read again; anything else is refused."""

import functools
import json
import math
import shutil
import time

import pytest
import torch

from quantailor import api
from quantailor.errors import QuantailorError, UntrustedInput, UsageError
from quantailor.formats import folder as folder_module
from quantailor.formats.folder import read_folder
from quantailor.models.prepare import FAKE_QUANT, PACKED
from quantailor.models.structure import modules_of
from quantailor.store.manifest import verify
from quantailor.store.reading import Reading
from tests.formats.making import bytes_of, drop, edited, put, quantized, saved, weights_in

EMBEDDING_AND_HEAD = (("model.embed_tokens", "w8a16"), ("lm_head", "w8a16"))
GPT2_TIED = (("transformer.wte", "w4a16-g16"), ("lm_head", "w4a16-g16"))

# model, scheme, options, the layout that must be chosen
CASES = [
    ("llama", "w8a8", {}, "compressed-tensors"),
    ("llama", "w8a16", {}, "compressed-tensors"),
    ("llama", "w4a16-g4", {"ragged": False}, "compressed-tensors"),
    ("llama", "w4a16-g32", {"rules": (("*.down_proj", "w8a16"),), "ragged": False}, "compressed-tensors"),
    ("llama", "w2a16-g32", {"rules": (("*.down_proj", "keep"),)}, "compressed-tensors"),
    ("llama", "w4a16-g32", {}, "quantailor"),  # 172 inputs: the last group is shorter
    ("llama", "w2a16-g32", {}, "quantailor"),
    ("llama", "w4a8-g32", {}, "quantailor"),
    ("llama", "nf4", {}, "quantailor"),
    ("llama", "nf4-dq", {}, "quantailor"),
    ("llama", "w3a16-asym", {}, "quantailor"),
    ("llama", "w8a8-static", {}, "compressed-tensors"),
    ("llama", "w1.58a8", {}, "quantailor"),
    ("llama", "w1a1", {}, "quantailor"),
    ("llama", "w2a16-g32-balanced", {}, "quantailor"),
    ("llama", "w4a16-g32", {"rules": (("model.embed_tokens", "w8a16"),)}, "quantailor"),
    ("tied", "w4a16-g4", {"ragged": False}, "compressed-tensors"),
    ("tied", "w4a16-g32", {"rules": EMBEDDING_AND_HEAD}, "quantailor"),
    ("half", "w8a8", {}, "compressed-tensors"),
    ("half", "w8a16", {}, "compressed-tensors"),
    ("half", "w4a16-g32", {"rules": EMBEDDING_AND_HEAD}, "quantailor"),
    ("gpt2", "w8a8", {}, "quantailor"),  # Conv1D has no place in compressed-tensors
    ("gpt2", "w4a16-g32", {"rules": GPT2_TIED}, "quantailor"),
    ("bert", "w8a8", {}, "compressed-tensors"),
    ("bert", "w4a8-g16", {}, "quantailor"),
    ("bert", "w8a8-static", {}, "compressed-tensors"),
    ("bert", "w8a8-static-kl", {}, "compressed-tensors"),
]


def logits(model: api.Model, probe) -> torch.Tensor:
    with torch.inference_mode():
        return model.model(**probe).logits


@pytest.mark.parametrize(("model", "scheme", "options", "layout"), CASES)
def test_a_saved_folder_gives_the_simulated_model_bit_for_bit(saved_as, tmp_path, model, scheme, options, layout):
    simulated, folder = saved_as(model, scheme, **options)
    loaded = api.load(folder)

    assert torch.equal(logits(loaded, simulated.probe), logits(simulated, simulated.probe))
    assert loaded.is_packed and not simulated.is_packed
    assert str(loaded.state.scheme) in (scheme, f"{scheme} (no ragged group)")
    assert loaded.state.inventory == simulated.state.inventory
    assert json.loads((folder / "quantailor.json").read_text())["format"] == layout
    floats = {
        n
        for n, m in loaded.model.named_modules()
        if n in loaded.state.inventory.quantized and "weight" in dict(m.named_parameters())
    }
    assert not floats, "no float copy of a quantized weight"
    assert api.check(folder).equal

    again = saved(loaded, tmp_path / "again")
    assert bytes_of(again) == bytes_of(folder)


@pytest.mark.parametrize("scheme", ["w8a8", "nf4-dq"])
def test_packing_first_saves_the_same_bytes(saved_as, tmp_path, scheme):
    simulated, folder = saved_as("llama", scheme)

    assert bytes_of(saved(api.pack(simulated), tmp_path / "packed")) == bytes_of(folder)


def test_saving_leaves_the_model_as_it_is(saved_as, tmp_path):
    simulated, _ = saved_as("llama", "w8a8")
    before = {name: tensor.clone() for name, tensor in simulated.model.state_dict().items()}
    saved(simulated, tmp_path / "out")

    after = simulated.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any(True for _ in modules_of(simulated.model, FAKE_QUANT))
    assert not any(True for _ in modules_of(simulated.model, PACKED))


def test_the_same_quantization_twice_gives_the_same_bytes(saved_as, lm, tmp_path):
    _, folder = saved_as("llama", "w4a16-g32")

    assert bytes_of(saved(quantized(lm, "w4a16-g32"), tmp_path / "twice")) == bytes_of(folder)


def test_a_tied_weight_is_stored_once(saved_as):
    _, folder = saved_as("tied", "w4a16-g32", rules=EMBEDDING_AND_HEAD)
    names = verify(folder)["files"][weights_in(folder).name]["tensors"]

    assert "model.embed_tokens.packed.q" in names and not any(name.startswith("lm_head.") for name in names)
    model = api.load(folder).model
    assert model.lm_head.packed is model.model.embed_tokens.packed


def test_a_float_model_is_saved_with_a_manifest_and_loads(lm, tmp_path):
    folder = saved(lm, tmp_path / "float")

    verify(folder)
    loaded = api.load(folder)
    assert loaded.state is None and loaded.parent["folder"] == "float"
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), lm.model.parameters()))


def test_shards_are_found_again_in_both_layouts(saved_as, tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    real = PreTrainedModel.save_pretrained
    for scheme, name in (("w8a8", "model"), ("w4a16-g32", "quantailor")):
        simulated, _ = saved_as("llama", scheme)
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedModel, "save_pretrained", functools.partialmethod(real, max_shard_size="60KB"))
            folder = saved(simulated, tmp_path / scheme)
        shards = [p.name for p in folder.glob("*.safetensors") if p.name != "parity.safetensors"]
        assert len(shards) > 1 and all(shard.startswith(f"{name}-0000") for shard in shards)
        assert (folder / f"{name}.safetensors.index.json").exists()
        assert torch.equal(logits(api.load(folder), simulated.probe), logits(simulated, simulated.probe))
        assert api.check(folder).equal


def test_a_format_that_cannot_hold_the_scheme_is_refused_and_leaves_nothing(saved_as, tmp_path):
    simulated, _ = saved_as("llama", "nf4")
    with pytest.raises(UsageError, match=r"compressed-tensors cannot hold this model: model\.layers\.0.*NF4"):
        saved(simulated, tmp_path / "out", format="compressed-tensors")
    with pytest.raises(UsageError, match="format 'gguf' is none of compressed-tensors, quantailor"):
        saved(simulated, tmp_path / "out", format="gguf")
    assert list(tmp_path.iterdir()) == []


def test_our_own_layout_can_be_asked_for(saved_as, tmp_path):
    simulated, _ = saved_as("llama", "w8a8")
    folder = saved(simulated, tmp_path / "own", format="quantailor")

    assert weights_in(folder).name == "quantailor.safetensors"
    assert torch.equal(logits(api.load(folder), simulated.probe), logits(simulated, simulated.probe))


def test_weights_that_are_no_longer_finite_are_not_saved(lm, tmp_path):
    broken = quantized(lm, "w8a8")
    broken.model.model.norm.weight.data[0] = math.nan
    with pytest.raises(QuantailorError, match=r"model\.norm\.weight holds NaN or Inf") as error:
        saved(broken, tmp_path / "out")
    assert error.value.exit_code == 1 and list(tmp_path.iterdir()) == []


def test_a_static_scale_without_calibration_is_not_saved(lm, tmp_path):
    from quantailor.models.prepare import prepare
    from quantailor.recipe import Recipe
    from quantailor.spec import Scheme

    raw = api.Model(api.load(lm.model.name_or_path).model, lm.tokenizer, lm.task)
    prepare(raw.model, Recipe(Scheme.parse("w8a8-static")))
    with pytest.raises(QuantailorError, match=r"layers\.0.*static activation scale was never calibrated"):
        saved(raw, tmp_path / "out")


Q_PROJ = "model.layers.0.self_attn.q_proj"
PACKED_Q = f"{Q_PROJ}.packed"


def scaled(name, factor):
    def change(tensors):
        tensors[name] = tensors[name] * factor

    return change


def first(name, value):
    def change(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] = value

    return change


def narrower(name):
    def change(tensors):
        tensors[name] = tensors[name][:, :-1].clone()

    return change


def as_type(name, dtype):
    def change(tensors):
        tensors[name] = tensors[name].to(dtype)

    return change


DAMAGED_TENSORS = [
    ("w4a16-g32", drop(f"{PACKED_Q}.words"), rf"lacks tensor {PACKED_Q}\.words"),
    ("w4a16-g32", drop("model.norm.weight"), r"lacks tensor model\.norm\.weight"),
    ("w8a8", drop(f"{Q_PROJ}.weight_scale"), rf"{Q_PROJ}\.weight_scale"),
    ("w8a8", drop(f"{Q_PROJ}.weight"), rf"{Q_PROJ}\.weight"),
    ("w4a16-g32", put(torch.ones(3), "more.weight"), r"has tensor more\.weight"),
    ("w8a8", put(torch.ones(3), f"{Q_PROJ}.weight_zero_point"), rf"has tensor {Q_PROJ}\.weight_zero_point"),
    ("w4a16-g32", narrower(f"{PACKED_Q}.words"), r"q_proj\.packed\.words is \[64, 7\]"),
    ("w4a16-g32", put(torch.ones(3), "model.norm.weight"), r"model\.norm\.weight is \[3\].*makes it \[64\]"),
    ("w8a16", lambda t: t.update({f"{Q_PROJ}.weight_shape": torch.tensor([64, 2**40])}), "do not hold"),
    ("w8a16", lambda t: t.update({f"{Q_PROJ}.weight_shape": torch.tensor([9, 64])}), "weight_shape says 9 rows"),
    ("w4a16-g32", first(f"{PACKED_Q}.scale", 0.0), rf"scale {PACKED_Q}\.scale holds 0"),
    ("w8a8", scaled(f"{Q_PROJ}.weight_scale", -1.0), rf"{Q_PROJ}.*scale.* holds -"),
    ("w4a16-g32", first(f"{PACKED_Q}.scale", math.nan), rf"nan in tensor {PACKED_Q}\.scale"),
    ("w8a8", first(f"{Q_PROJ}.weight_scale", math.inf), rf"inf in tensor {Q_PROJ}\.weight_scale"),
    ("w8a8-static", scaled(f"{Q_PROJ}.input_scale", 0.0), r"q_proj\.input_scale holds 0"),
    ("nf4-dq", scaled(f"{PACKED_Q}.scale_second", -1.0), r"q_proj\.packed\.scale_second holds -"),
    ("nf4-dq", first(f"{PACKED_Q}.scale_codes", 127), r"q_proj\.packed\.scale_codes holds a code that is no number"),
    ("w3a16-asym", first(f"{PACKED_Q}.zero_point", 8), r"zero_point holds 8, outside its grid of 3 bits"),
    ("w4a16-g32", as_type(f"{PACKED_Q}.words", torch.float32), r"words is of type torch\.float32"),
    ("w4a16-g32", as_type(f"{PACKED_Q}.scale", torch.int32), r"scale is of type torch\.int32"),
    ("w8a8", as_type(f"{Q_PROJ}.weight", torch.float32), r"q_proj.*is of type torch\.float32"),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "change", "told"), DAMAGED_TENSORS)
def test_a_damaged_tensor_is_refused_even_with_matching_hashes(saved_as, tmp_path, scheme, change, told):
    _, folder = saved_as("llama", scheme)
    broken = edited(folder, tmp_path / "broken", tensors=change)

    with pytest.raises(UntrustedInput, match=told) as error:
        api.load(broken)
    assert "\n" not in str(error.value) and "broken" in str(error.value)


CONFIG = "quantization_config"
LAYER = (CONFIG, "layers", Q_PROJ)
DAMAGED_CONFIGS = [
    (put(3, CONFIG, "version"), "format version 3; this quantailor reads up to 2"),
    (put(0, CONFIG, "version"), "format version 0"),
    (put("1", CONFIG, "version"), "format version '1'"),
    (put(None, CONFIG), "no quantization_config"),
    (drop(CONFIG), "no quantization_config"),
    (put([], CONFIG, "schemes"), "list index out of range"),
    (put([5], CONFIG, "schemes"), "5 is no spec"),
    (put({}, CONFIG, "layers"), Q_PROJ),
    (put([], CONFIG, "layers"), Q_PROJ),
    (drop(*LAYER), Q_PROJ),
    (put(5, *LAYER), "does not hold what its config says"),
    (put(9, *LAYER, "scheme"), "list index out of range"),
    (put([64], *LAYER, "shape"), "quantization_config is damaged"),
    (put(["a", 64], *LAYER, "shape"), "quantization_config is damaged"),
    (put([10**9, 10**9], *LAYER, "shape"), r"packed\.words is \[64, 8\]"),
    (put([64, 96], *LAYER, "shape"), r"packed\.words is \[64, 8\]"),
    (drop(*LAYER, "bias"), "quantization_config is damaged"),
    (put(True, *LAYER, "bias"), rf"lacks tensor {Q_PROJ}\.bias"),
    (put("Embedding", *LAYER, "kind"), Q_PROJ),
    (put("nothing", *LAYER, "tied_to"), Q_PROJ),
    (drop("quantailor_config"), "no known quantailor_config"),
    (put("bert", "quantailor_config", "model_type"), "which this model does not have"),
    (put(["Nothing"], "quantailor_config", "architectures"), "names no architecture"),
    (put(7, "quantailor_config", "architectures"), "names no architecture"),
    (put(128, "quantailor_config", "hidden_size"), r"embed_tokens\.weight is \[303, 64\]"),
    (put("../secret/model.safetensors", "weights_file"), "names weights '../secret/model.safetensors'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "told"), DAMAGED_CONFIGS)
def test_a_damaged_config_is_refused(saved_as, tmp_path, change, told):
    _, folder = saved_as("llama", "w4a16-g32")
    broken = edited(folder, tmp_path / "broken", config=change)

    with pytest.raises(UntrustedInput, match=told):
        api.load(broken)


ENTRY = ("inventory", 1)  # the first layer that is quantized
DAMAGED_RECEIPTS = [
    (drop("inventory"), "no inventory"),
    (drop("digests"), "no inventory, digests"),
    (put(5, "digests", Q_PROJ), "no inventory, digests"),
    (put(5, "scheme"), "no inventory, digests, scheme"),
    (put(5, "notes"), "notes of the right form"),
    (put([], "inventory"), "quantizes other layers|tell different things"),
    (put(5, *ENTRY), "is damaged"),
    (drop(*ENTRY, "spec"), "is damaged"),
    (put({}, *ENTRY, "spec"), "unknown kind None"),
    (put({"is": "Scheme", "weight": None, "input": None, "output": None}, *ENTRY, "spec"), "wrong type"),
    (put("another", *ENTRY, "name"), "another|tell different things"),
    (put(3, *ENTRY, "name"), "wrong type"),
    (put(["a"], *ENTRY, "shape"), "wrong type"),
    (put(-1, *ENTRY, "num_weights"), "wrong type"),
    (put("nothing", *ENTRY, "tied_to"), "nothing|tell different things"),
    (put("Conv2d", *ENTRY, "type"), "Conv2d|tell different things"),
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32"])
@pytest.mark.parametrize(("change", "told"), DAMAGED_RECEIPTS)
def test_a_damaged_receipt_is_refused(saved_as, tmp_path, scheme, change, told):
    _, folder = saved_as("llama", scheme)
    broken = edited(folder, tmp_path / "broken", receipt=change)

    with pytest.raises(UntrustedInput, match=told):
        api.load(broken)


def test_a_receipt_that_is_no_object_or_no_json_is_refused(saved_as, tmp_path):
    _, folder = saved_as("llama", "w8a8")
    for text, told in (("[1]", "damaged"), ("{", "not JSON"), ("", "not JSON")):
        broken = edited(folder, tmp_path / "broken")
        (broken / "quantailor.json").write_text(text)
        with pytest.raises(UntrustedInput, match=told):
            read_folder(broken, verify_hashes=False)
        shutil.rmtree(broken)


def test_a_compressed_tensors_config_that_says_other_bits_than_the_receipt_is_refused(saved_as, tmp_path):
    """Stock transformers would go by the config and `check` by the receipt: they must not differ."""
    _, folder = saved_as("llama", "w8a16")
    broken = edited(
        folder, tmp_path / "broken", config=put("group", CONFIG, "config_groups", "group_0", "weights", "strategy")
    )

    with pytest.raises(UntrustedInput, match=r"config\.json quantizes other layers or grids"):
        api.load(broken)


PROBES = [
    (drop("logits"), "no probe"),
    (drop("input.input_ids"), "no probe"),
    (put(torch.full((2, 64), 10**6), "input.input_ids"), "no probe"),
    (put(torch.full((2, 64), -1), "input.input_ids"), "no probe"),
    (put(torch.zeros(2, 64), "input.input_ids"), "no probe"),
    (put(torch.zeros(2, 0, dtype=torch.int64), "input.input_ids"), "no probe"),
    (put(torch.ones(1), "input.more"), "no probe"),
    (lambda t: t["logits"].fill_(math.nan), "no probe"),
]


@pytest.mark.parametrize(("change", "told"), PROBES)
def test_a_damaged_probe_is_refused(saved_as, tmp_path, change, told):
    _, folder = saved_as("llama", "w4a16-g32")
    broken = edited(folder, tmp_path / "broken", probe=change)

    with pytest.raises(UntrustedInput, match=told):
        api.check(broken)


def test_a_folder_without_receipt_is_no_quantized_folder_of_ours(saved_as, tmp_path):
    _, folder = saved_as("llama", "w8a8")
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "quantailor.json").unlink()

    for read in (api.check, api.load):
        with pytest.raises(UntrustedInput, match=r"quantailor\.json is missing"):
            read(tmp_path / "bare")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "quantailor.safetensors",
        "quantailor.json",
        "tokenizer.json",
        "parity.safetensors",
        "MANIFEST.json",
    ],
)
def test_one_flipped_bit_anywhere_is_found(saved_as, tmp_path, name):
    _, folder = saved_as("llama", "w4a16-g32")
    shutil.copytree(folder, tmp_path / "flipped")
    path = tmp_path / "flipped" / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 2 // 3] ^= 1
    path.write_bytes(raw)

    with pytest.raises(UntrustedInput):
        api.load(tmp_path / "flipped")


def test_a_file_more_or_less_is_found(saved_as, tmp_path):
    _, folder = saved_as("llama", "w4a16-g32")
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "more.txt").write_text("x")
    with pytest.raises(UntrustedInput, match=r"more\.txt is not in MANIFEST\.json"):
        api.load(tmp_path / "copy")
    (tmp_path / "copy" / "more.txt").unlink()
    (tmp_path / "copy" / "tokenizer_config.json").unlink()
    with pytest.raises(UntrustedInput, match=r"tokenizer_config\.json is missing"):
        api.load(tmp_path / "copy")


def test_hashes_can_be_skipped_but_shapes_cannot(saved_as, tmp_path):
    _, folder = saved_as("llama", "w4a16-g32")
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "MANIFEST.json").unlink()
    with pytest.raises(UntrustedInput, match=r"has no MANIFEST\.json"):
        api.load(tmp_path / "copy")
    assert api.load(tmp_path / "copy", verify=False).is_packed

    shutil.rmtree(tmp_path / "copy")
    edited(folder, tmp_path / "copy", tensors=drop("model.norm.weight"), manifest=False)
    with pytest.raises(UntrustedInput, match=r"lacks tensor model\.norm\.weight"):
        api.load(tmp_path / "copy", verify=False)


def test_a_loaded_model_can_be_trained_further(saved_as, lm, tmp_path):
    """transformers marks what it loads as quantized, and its Trainer refuses such a model."""
    from tests.formats.making import texts

    _, folder = saved_as("llama", "w4a16-g32")
    settings = api.Settings(steps=2, batch_size=2, evaluations=1)
    trained = api.train(folder, texts(8, 7), teacher=lm, eval_data=texts(4, 8), settings=settings, context=32)
    out = saved(trained, tmp_path / "trained")

    assert trained.training.steps == 2 and api.check(out).equal
    details = json.loads((out / "quantailor.json").read_text())["details"]
    assert details["parent"] == {"folder": "model"} and details["training"]["steps"] == 2


def test_the_receipt_tells_of_every_module_and_where_it_came_from(saved_as, lm):
    simulated, folder = saved_as("llama", "w4a16-g32", rules=(("*.o_proj", "keep"),))
    receipt = json.loads((folder / "quantailor.json").read_text())

    assert receipt["details"]["parent"] == lm.parent and len(lm.parent["hash"]) == 64
    assert {e["name"] for e in receipt["inventory"]} == {e.name for e in simulated.state.inventory}
    assert all(e["reason"] for e in receipt["inventory"])
    kept = [e for e in receipt["inventory"] if e["name"].endswith("o_proj")]
    assert [e["reason"] for e in kept] == ["asked for"] * 2 and all(e["scheme"] is None for e in kept)
    assert set(receipt["digests"]) == set(simulated.state.inventory.quantized)
    assert receipt["format_reason"].endswith("leave a shorter last one of 172 inputs")
    assert receipt["scheme"] == "w4a16-g32" and receipt["method"] == "gptq"


def test_an_interrupted_swap_is_put_back_by_the_reader(saved_as, tmp_path):
    """Between its two renames a killed writer leaves the old folder as trash: whoever reads next finds it again."""
    _, folder = saved_as("llama", "w8a8")
    shutil.copytree(folder, tmp_path / ".model.trash-999999999")

    assert api.load(tmp_path / "model").is_packed
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("ragged", [True, False])
def test_weights_of_8_bits_wait_for_their_digest_before_they_are_turned(saved_as, monkeypatch, ragged):
    """They are turned where they lie, in the memory that the digest is taken of."""
    simulated, folder = saved_as("llama", "w8a16", **({} if ragged else {"ragged": False}))
    hashing, turning, order = Reading.hash, folder_module.layout.turn_highest_bits, []

    def late(self):
        time.sleep(0.3)
        hashing(self)
        order.append("digests")

    def turned(values):
        order.append("turned")
        turning(values)

    monkeypatch.setattr(Reading, "hash", late)
    monkeypatch.setattr(folder_module.layout, "turn_highest_bits", turned)
    loaded = api.load(folder)
    assert order[0] == "digests" and "turned" in order
    assert torch.equal(logits(loaded, simulated.probe), logits(simulated, simulated.probe))


@pytest.mark.parametrize(
    ("scheme", "scale"), [("w4a16-g32", f"{PACKED_Q}.scale"), ("w8a8", f"{Q_PROJ}.weight_scale")], ids=str
)
def test_check_notices_one_scale_that_is_a_little_wrong(saved_as, tmp_path, scheme, scale):
    """It loads, since a scale may be any positive number; the digests of the simulated model tell."""
    _, folder = saved_as("llama", scheme)

    def grown(tensors):
        first(scale, float(tensors[scale].view(-1)[0]) * 1.001)(tensors)

    parity = api.check(edited(folder, tmp_path / "wrong", tensors=grown))
    assert not parity.equal and list(parity.differing) == [Q_PROJ]
