"""Names and shapes on disk."""

import re

import pytest
import torch

from quantailor.formats.layout import (
    compressed_tensors_config,
    from_compressed_tensors,
    to_compressed_tensors,
    why_not_compressed_tensors,
)
from quantailor.nn.fake_quant import FakeQuantLinear
from quantailor.nn.packed import packed
from quantailor.observers.weights import weight_scale
from quantailor.recipe import Entry, Inventory
from quantailor.spec import Int, PerChannel, PerTensor, QuantSpec, Scheme


def entry(scheme: Scheme | str | None, kind="Linear", shape=(48, 64), tied_to=None, name="layer") -> Entry:
    parsed = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    return Entry(name, kind, shape, shape[0] * shape[1], parsed, "why", tied_to)


def why(*entries: Entry) -> str | None:
    return why_not_compressed_tensors(Inventory(entries))


@pytest.mark.parametrize(
    "scheme", ["w8a8", "w8a16", "w4a16", "w4a16-g32", "w4a16-g64", "w2a16-g32", "w8a16-g32", "w8a8-static"]
)
def test_what_compressed_tensors_can_say(scheme):
    assert why(entry(scheme), entry(None, kind="LlamaRMSNorm")) is None


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (entry("w8a16", kind="Embedding"), "layer is a Embedding"),
        (entry("w8a16", kind="Conv1D"), "layer is a Conv1D"),
        (entry("w8a16", tied_to="embed"), "shares its weight with embed"),
        (entry("w4a16-g48"), "groups of 48 leave a shorter last one of 64 inputs"),
        (entry("w4a16-g32-asym"), "not symmetric"),
        (entry("w3a16-g32"), "not symmetric with 2, 4 or 8 bits"),
        (entry("nf4"), "NF4"),
        (entry("w1.58a8"), "Ternary"),
        (entry("w1a1"), "Binary"),
        (entry("w2a16-g32-balanced"), "Balanced"),
        (entry("w4a8-g32"), "only 8-bit channel weights go with activations"),
        (entry("w8a4"), "those must be 8-bit, per token or static per tensor; the nearest that works is w8a8"),
        (entry("w4a8-static"), "only 8-bit channel weights go with activations"),
        (entry("w8a8-outliers"), "layer: LLM.int8 keeps outlier columns of its inputs in float"),
        (entry("w8a8-ag32"), "layer: its activations have a scale for each group of 32"),
        (entry("w4a8-g32-ag32"), "a scale for each group of 32"),
        (entry(Scheme(weight=QuantSpec(Int(8), PerTensor()))), "its scale is per tensor"),
        (entry(Scheme(weight=QuantSpec(Int(8, narrow=True), PerChannel()))), "not symmetric"),
        (entry(Scheme(input=Scheme.parse("w8a8").input)), "only weights, or weights and inputs"),
    ],
)
def test_what_it_cannot_say_is_named(bad, told):
    assert told in why(entry("w8a8", name="fine"), bad)


@pytest.mark.parametrize(
    ("schemes", "told"),
    [
        (
            {"q_proj": "w4a16-g32", "k_proj": "w8a16", "v_proj": "w4a16-g32"},
            "for {q_proj, k_proj, v_proj}; .* is w8a16 ",
        ),
        ({"q_proj": "w4a16-g32", "k_proj": "w4a16-g32", "v_proj": None}, "a.v_proj float.* is w4a16-g32 for each"),
        ({"gate_proj": "w4a16-g32", "up_proj": "w4a16-g64"}, "a.up_proj w4a16-g64.* is w4a16-g32 for each"),
        ({"query": None, "key": "w8a8", "value": "w8a8"}, "a.query is float and a.key w8a8"),
    ],
)
def test_one_scheme_for_what_engines_fuse(schemes, told):
    entries = [entry(scheme, name=f"a.{name}") for name, scheme in schemes.items()]
    assert re.search(told, why(*entries))
    same = next(scheme for scheme in schemes.values() if scheme)
    assert why(*(entry(same, name=f"a.{name}") for name in schemes)) is None
    assert why(entry("w8a8", name="a.q_proj"), entry("w8a16", name="b.k_proj")) is None, "other parents are apart"


def test_the_config_names_each_layer_exactly_and_what_is_kept():
    config = compressed_tensors_config(
        Inventory(
            (entry("w8a8", name="a"), entry("w4a16-g32", name="b"), entry("w8a8", name="c"), entry(None, name="head"))
        )
    )

    groups = list(config["config_groups"].values())
    assert [group["targets"] for group in groups] == [["a", "c"], ["b"]]
    assert [group["format"] for group in groups] == ["int-quantized", "pack-quantized"]
    assert config["format"] == "mixed-precision" and config["ignore"] == ["head"]
    assert groups[0]["input_activations"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
    }  # fmt: skip
    assert groups[1]["weights"]["group_size"] == 32 and groups[1]["input_activations"] is None


def test_static_inputs_are_per_tensor():
    config = compressed_tensors_config(Inventory((entry("w8a8-static"),)))
    assert config["config_groups"]["group_0"]["input_activations"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False,
    }  # fmt: skip


def layer(scheme: str) -> dict[str, torch.Tensor]:
    twin = FakeQuantLinear(torch.nn.Linear(64, 48), Scheme.parse(scheme))
    twin.weight_quantizer.set_scale(*weight_scale(twin.weight_ON, twin.weight_quantizer.spec))
    return dict(packed(twin).packed.named_buffers())


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16-g32", "w2a16-g32", "w4a16"])
def test_there_and_back_changes_nothing(scheme):
    buffers, parsed = layer(scheme), Scheme.parse(scheme)
    stored = to_compressed_tensors("x", buffers, parsed, 64)
    back = from_compressed_tensors("x", stored, parsed)

    assert back.keys() == buffers.keys()
    assert all(torch.equal(back[name], buffers[name]) and back[name].dtype == buffers[name].dtype for name in back)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32"])
def test_compressed_tensors_itself_unpacks_the_same_integers(scheme):
    """Its packing is offset binary, low bits first, in int32 words."""
    unpack = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers").unpack_from_int32
    twin = FakeQuantLinear(torch.nn.Linear(64, 48), Scheme.parse(scheme))
    twin.weight_quantizer.set_scale(*weight_scale(twin.weight_ON, twin.weight_quantizer.spec))
    store = packed(twin).packed
    stored = to_compressed_tensors("x", dict(store.named_buffers()), twin.scheme, 64)
    found = unpack(
        stored["x.weight_packed"], twin.scheme.weight.grid.bits, torch.Size(stored["x.weight_shape"].tolist())
    )

    assert torch.equal(found, store.integers())


def test_shapes_that_contradict_each_other_are_refused():
    parsed = Scheme.parse("w8a16")
    stored = to_compressed_tensors("x", layer("w8a16"), parsed, 64)
    with pytest.raises(ValueError, match="x: weight_shape says 9 rows, weight_packed has 48"):
        from_compressed_tensors("x", {**stored, "x.weight_shape": torch.tensor([9, 64])}, parsed)
    with pytest.raises(KeyError, match=r"x\.weight_packed"):
        from_compressed_tensors("x", {k: v for k, v in stored.items() if k != "x.weight_packed"}, parsed)
