"""A file that holds or computes something else is found out, and the layer is named."""

from collections import OrderedDict

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from quantailor.formats import onnx_check
from quantailor.formats.onnx_check import activation_flips, differing, layer_difference, read_layers
from quantailor.models.prepare import pack_model, prepare_layers
from quantailor.spec import Scheme
from tests.formats.onnx_making import graph, initializer, node

SCHEMES = {
    "a": "w8a8",
    "b": "w4a16-g32",
    "c": "w8a8-static",
    "d": "w4a16-g32-asym",
    "e": "nf4",
    "f": "w2a16-g32-balanced",
}
ALL_SCHEMES = {**SCHEMES, "g": "w4a8-g32", "h": "w4a8-asym", "i": "w8a16", "j": "w6a4-static"}


class Chain(nn.Sequential):
    """Layers one after the other, called as a model is called."""

    def forward(self, input_ids, attention_mask=None):  # floats here: nothing is looked up
        return super().forward(input_ids)


def chain(schemes: dict[str, str] = ALL_SCHEMES) -> nn.Module:
    torch.manual_seed(0)
    model = Chain(OrderedDict((name, nn.Linear(64, 64)) for name in schemes))
    prepare_layers(model, {name: Scheme.parse(text) for name, text in schemes.items()})
    for module in model:
        if module.input_quantizer is not None and not module.input_quantizer.spec.dynamic:
            module.input_quantizer.set_scale(torch.tensor([0.03]))
    return pack_model(model).eval()


def file_of(model: nn.Module) -> onnx.ModelProto:
    proto = graph(model, dict.fromkeys((name for name, _ in model.named_children()), TensorProto.FLOAT), chained=True)
    proto.graph.input[0].name = "input_ids"
    for n in proto.graph.node:
        n.input[:] = ["input_ids" if value == "a_in" else value for value in n.input]
    return proto


@pytest.fixture
def model() -> nn.Module:
    return chain()


@pytest.fixture
def proto(model) -> onnx.ModelProto:
    return file_of(model)


def change(tensor: TensorProto, edit) -> None:
    """Edit an initializer's numbers in place, whatever its type."""
    array = numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(numpy_helper.from_array(edit(array), tensor.name))


def test_every_integer_scale_and_zero_point_is_read_back(model, proto):
    found = read_layers(proto)
    assert list(found) == list(ALL_SCHEMES)
    for name, held in found.items():
        packed = model.get_submodule(name).packed
        q, scale = (held.q, held.scale) if name != "f" else ((held.q - 1) // 2, 2 * held.scale)
        assert torch.equal(q.int(), packed.integers().int()) and torch.equal(scale, packed.scales()), name
    assert differing(found, model) == {}


@pytest.mark.parametrize("name", ALL_SCHEMES)
def test_one_changed_integer_names_its_layer(name, model, proto):
    tensor = initializer(proto, f"{name}.weight")
    raw = bytearray(tensor.raw_data)
    raw[len(raw) // 2] ^= 0x02  # an odd number stays odd, so that 2q + 1 is still one
    tensor.raw_data = bytes(raw)
    assert differing(read_layers(proto), model) == {name: "integers"}


@pytest.mark.parametrize("name", ALL_SCHEMES)
def test_one_changed_scale_names_its_layer(name, model, proto):
    def bump(scale):
        scale.flat[-1] = np.nextafter(scale.flat[-1], np.float32(np.inf))
        return scale

    change(initializer(proto, f"{name}.weight_scale"), bump)
    assert differing(read_layers(proto), model) == {name: "scales"}


@pytest.mark.parametrize("name", ["d", "h"])
def test_a_changed_zero_point_names_its_layer(name, model, proto):
    tensor = initializer(proto, f"{name}.weight_zero_point")
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 0x01]) + tensor.raw_data[1:]
    assert differing(read_layers(proto), model) == {name: "zero points"}


def test_a_zero_point_where_none_belongs(model, proto):
    change(initializer(proto, "i.weight_zeros"), lambda zeros: zeros + np.int8(1))
    assert differing(read_layers(proto), model) == {"i": "zero points"}


@pytest.mark.parametrize("name", ["c", "j"])
def test_a_changed_activation_scale_names_its_layer(name, model, proto):
    change(initializer(proto, f"{name}.input_scale"), lambda scale: np.nextafter(scale, np.float32(1)))
    assert differing(read_layers(proto), model) == {name: "input scale"}


def test_layers_that_changed_places_are_found():
    """What the graph multiplies with counts, not what a tensor is called."""
    model = chain({"a": "w8a16", "b": "w8a16"})
    proto = file_of(model)
    one, other = node(proto, "a/product"), node(proto, "b/product")
    one.input[1], other.input[1] = other.input[1], one.input[1]
    assert differing(read_layers(proto), model) == {"a": "integers, scales", "b": "integers, scales"}


def test_other_groups_are_found(model, proto):
    (block,) = (a for a in node(proto, "b/weight").attribute if a.name == "block_size")
    block.i = 16
    assert differing(read_layers(proto), model) == {"b": "group size"}


def test_scales_along_the_wrong_axis_are_an_error(proto):
    (axis,) = (a for a in node(proto, "i/weight").attribute if a.name == "axis")
    axis.i = 0
    with pytest.raises(ValueError, match="i/weight has its scales along axis 0"):
        read_layers(proto)


def test_an_activation_in_another_zero_point_is_an_error(proto):
    change(initializer(proto, "byte_128"), lambda zero: np.array(127, dtype=np.uint8))
    with pytest.raises(ValueError, match="c/input/dequantized has zero point 127, and 128 is meant"):
        read_layers(proto)


def test_a_weight_written_in_float_is_no_stored_weight(model, proto):
    found = node(proto, "b/weight")
    found.op_type = "Identity"
    with pytest.raises(ValueError, match="b/product multiplies with the result of a Identity"):
        read_layers(proto)


def test_a_missing_layer_is_named(model, proto):
    found = read_layers(proto)
    del found["d"]
    assert differing(found, model) == {"d": "is not in the file"}


def test_each_layer_alone_computes_what_ours_does(model, proto):
    found = layer_difference(proto, model, {"input_ids": torch.randn(2, 5, 64)})
    assert list(found) == list(ALL_SCHEMES)
    assert found["a"] == found["h"] == 0.0, "products of integers"
    assert max(found.values()) < 1e-6


def test_a_graph_too_large_for_one_message_goes_through_a_file(model, proto, monkeypatch):
    monkeypatch.setattr(onnx_check, "IN_MEMORY", 100)
    before = proto.SerializeToString()
    assert max(layer_difference(proto, model, {"input_ids": torch.randn(2, 5, 64)}).values()) < 1e-6
    assert proto.SerializeToString() == before


@pytest.mark.parametrize("name", ALL_SCHEMES)
def test_a_layer_that_computes_something_else_is_named(name, model, proto):
    change(initializer(proto, f"{name}.bias"), lambda bias: bias + np.float32(0.5))
    found = layer_difference(proto, model, {"input_ids": torch.randn(2, 5, 64)})
    assert [other for other, value in found.items() if value > 1e-3] == [name], "and no layer after it"


def test_rounded_activations_are_counted(model, proto):
    probe = {"input_ids": torch.randn(2, 5, 64)}
    flips = activation_flips(proto, model, probe)
    assert (flips.count, flips.first, flips.total) == (0, None, 5 * 2 * 5 * 64)  # a, c, g, h and j
    change(initializer(proto, "b.bias"), lambda bias: bias + np.float32(0.5))
    flips = activation_flips(proto, model, probe)
    assert flips.first == "c" and 0 < flips.there <= flips.count < flips.total


def test_where_a_token_lies_between_two_integers_it_is_seen():
    """absmax / 127.5 puts the negative extreme at -127.5: the last bit of what comes before decides."""
    model = chain({"a": "w8a16", "b": "w8a8"})
    x = torch.randn(4, 200, 64)
    flips = activation_flips(file_of(model), model, {"input_ids": x})
    assert flips.count == flips.there and flips.largest == flips.count


class _Tagger(nn.Module):
    """Logits [B, T, 64] of tokens below 64."""

    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, input_ids, attention_mask):
        return type("Output", (), {"logits": self.chain(torch.eye(64)[input_ids])})


def test_logits_count_where_there_is_a_token(monkeypatch):
    model = _Tagger(chain({"a": "w8a16"}))
    ids = torch.arange(12).reshape(2, 6)
    probe = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    ours = model(**probe).logits
    asked = []

    def altered(_running, inputs, _names):
        asked.append(tuple(inputs["input_ids"].shape))
        logits = model(**inputs).logits.detach().clone()
        logits[-1, -1] += 1.0
        return [logits]

    monkeypatch.setattr(onnx_check, "outputs", altered)
    found = onnx_check.logit_difference(None, model, probe)
    assert asked == [(2, 6), (1, 4)], "another batch size and length as well"
    # the padding of row 2 is not looked at: what is found is the last token of the part
    assert found == pytest.approx(1.0 / float(ours[:1, :4].abs().max()), rel=1e-5)
    monkeypatch.setattr(onnx_check, "outputs", lambda *_: [torch.zeros(1)])
    assert onnx_check.logit_difference(None, model, probe) == float("inf")
