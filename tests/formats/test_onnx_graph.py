"""One layer at a time: what is stored, by the operators' definitions, and what ONNX Runtime computes from it."""

import math
from collections import OrderedDict

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from quantailor.errors import UsageError
from quantailor.formats.onnx_check import SESSION, session
from quantailor.formats.onnx_graph import stored, tensor_of
from quantailor.kernels.ops import IntegerWeight, int_linear_reference
from quantailor.models.prepare import pack_model, prepare_layers
from quantailor.spec import Int, PerTensor, PerToken, QuantSpec, Scheme
from tests.formats.onnx_making import INT4, UINT4, dequantized, graph, initializer, layer, node, one, values

WEIGHTS = {
    "w8a16": TensorProto.INT8,
    "w4a16": INT4,
    "w4a16-g32": INT4,
    "w3a16-g32": INT4,
    "w2a16-g32": INT4,
    "w2a16-g32-balanced": INT4,
    "w1.58a16": INT4,
    "w1a16": INT4,
    "w8a16-g32": TensorProto.INT8,
    "w6a16-g32": TensorProto.INT8,
    "w4a16-g32-asym": UINT4,
    "w4a16-asym": UINT4,
    "w8a16-g32-asym": TensorProto.UINT8,
    "w8a16-asym": TensorProto.UINT8,
    "w5a16-asym": TensorProto.UINT8,
}
ON_INTEGERS = [
    "w8a8",
    "w4a8",
    "w2a8",
    "w4a4",
    "w8a3",
    "w1.58a8",
    "w1a8",
    "w4a8-asym",
    "w7a8-asym",
    "w1a1",
    "w2a8-balanced",
]
ON_REALS = ["w4a8-g32", "w8a8-ag32", "w4a8-g32-ag32", "w8a8-asym", "w8a8-static", "w4a8-g32-static", "w8a6-static"]


def rows(n: int) -> torch.Tensor:
    """[2, 6, N]: ordinary rows; one whose largest element is negative, so between two integers; zeros, denormal, huge
    ones."""
    torch.manual_seed(7)
    x = torch.randn(2, 6, n)
    x[0, 1, 3] = -9.0
    x[0, 2] = 0.0
    x[1, 0] = 1e-41
    x[1, 1] *= 1e30
    return x


def run(proto: onnx.ModelProto, *inputs: torch.Tensor) -> list[torch.Tensor]:
    running = session(proto, SESSION)
    given = {value.name: x.numpy() for value, x in zip(running.get_inputs(), inputs)}
    return [torch.from_numpy(y) for y in running.run(None, given)]


@pytest.mark.parametrize("kind, low, high", [(INT4, -8, 7), (UINT4, 0, 15)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 6), (7,)])
def test_four_bit_tensors_are_packed_as_onnx_defines_it(kind, low, high, shape):
    q = torch.randint(low, high + 1, shape, dtype=torch.int16)
    tensor = tensor_of("q", q, kind)
    assert np.array_equal(values(tensor), q.numpy())
    assert np.array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int16), q.numpy()), "and as its package reads it"


@pytest.mark.parametrize("n", [96, 44, 20, 33])  # whole groups of 32; a shorter last one; less than one; one and a bit
@pytest.mark.parametrize("scheme", WEIGHTS)
def test_the_stored_weight_is_ours_to_the_bit(scheme, n):
    model = layer(scheme, n=n, o=5)
    proto = one(model)
    assert initializer(proto, "layer.weight").data_type == WEIGHTS[scheme]
    assert torch.equal(torch.from_numpy(dequantized(proto, "layer/weight")).t(), model.layer.packed.dequantize())


@pytest.mark.parametrize("scheme, bits", [("w8a16", 8), ("w4a16-g32", 4), ("w2a16-g32", 4), ("nf4", 4), ("w8a8", 8)])
def test_no_more_bytes_than_integers_and_scales(scheme, bits):
    model = layer(scheme, n=256, o=64)
    held = model.layer.packed
    beside = 4 * held.scales().numel() + 4 * 64 + 64 + 4 * 256  # scales, bias, zero points, blocks of NF4
    assert len(one(model).SerializeToString()) < 256 * 64 * bits // 8 + beside + 4000


def test_a_group_size_that_rows_do_not_reach_is_one_scale_a_row():
    proto = one(layer("w4a16-g32", n=20, o=5))
    assert list(initializer(proto, "layer.weight_scale").dims) == [5]
    assert not [a for a in node(proto, "layer/weight").attribute if a.name == "block_size"]


def test_one_scale_for_a_whole_weight():
    model = nn.Sequential(OrderedDict(layer=nn.Linear(12, 5)))
    spec = QuantSpec(Int(8), PerTensor())
    for scheme in (Scheme(spec), Scheme(spec, QuantSpec(Int(8), PerToken(), dynamic=True))):
        copy = nn.Sequential(OrderedDict(layer=nn.Linear(12, 5)))
        copy.load_state_dict(model.state_dict())
        prepare_layers(copy, {"layer": scheme})
        pack_model(copy).eval()
        proto = one(copy)
        assert list(initializer(proto, "layer.weight_scale").dims) == []
        x = torch.randn(3, 12)
        torch.testing.assert_close(run(proto, x)[0], copy(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [128, 100, 64, 20])
@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
def test_nf4_is_its_table_and_the_same_reals(scheme, n):
    model = layer(scheme, n=n, o=6, bias=False)
    proto = one(model)
    assert initializer(proto, "layer.weight").data_type == UINT4
    (weight_hat,) = run(proto, torch.eye(n))  # row n of the identity picks column n, added to zeros
    assert torch.equal(weight_hat.t(), model.layer.packed.dequantize())


@pytest.mark.parametrize("shape", ["tokens", "one row each", "rows"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", ON_INTEGERS)
def test_integer_products_are_ours_to_the_bit(scheme, bias, shape):
    model = layer(scheme, bias=bias)
    x = {"tokens": rows(96), "one row each": rows(96)[:, :1], "rows": rows(96).flatten(0, 1)}[shape]
    proto = one(model)
    assert node(proto, "layer/product").op_type == "MatMulInteger"
    with torch.no_grad():
        ours = model(x)
    (theirs,) = run(proto, x)
    if scheme == "w1a1":  # its scale is a mean, summed in another order
        torch.testing.assert_close(theirs, ours, rtol=3e-6, atol=1e-30)
    else:
        assert torch.equal(theirs, ours)


def test_an_integer_product_is_the_formula():
    """And not only what our own kernel says: the reference in float64."""
    model = layer("w8a8")
    module, x = model.layer, rows(96)
    weight = IntegerWeight(module.packed.integers(), module.packed.scales(), None, None)
    expected = int_linear_reference(module._quantize_input(x), weight, module.bias)
    torch.testing.assert_close(run(one(model), x)[0].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [96, 44])
@pytest.mark.parametrize("scheme", ON_REALS)
def test_other_products_are_ours_up_to_the_order_of_sums(scheme, n):
    model = layer(scheme, n=n)
    x = rows(n).clamp(-1e3, 1e3)
    with torch.no_grad():
        ours = model(x)
    (theirs,) = run(one(model), x)
    assert (theirs - ours).abs().max() <= 2e-6 * ours.abs().max()


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w2a16-g32", "w4a16"])
def test_negative_scales_survive_the_runtime(scheme):
    model = layer(scheme, n=64, o=32)
    model.layer.packed.scale[::2] *= -1
    x = torch.randn(4, 64)
    with torch.no_grad():
        ours = model(x)
    assert (run(one(model), x)[0] - ours).abs().max() <= 2e-6 * ours.abs().max()


@pytest.mark.parametrize("threshold", [0.5, 6.0, 1e4])  # nearly all columns, some, none
def test_outlier_columns_stay_in_float(threshold):
    model = layer(f"w8a8-outliers{threshold}")
    x = rows(96).clamp(-50, 50)
    with torch.no_grad():
        ours = model(x)
    (theirs,) = run(one(model), x)
    assert (theirs - ours).abs().max() <= 2e-6 * ours.abs().max()


def test_static_activations_are_uint8_around_128():
    model = layer("w8a8-static", static=0.05)
    proto = one(model)
    quantize = node(proto, "layer/input/quantized")
    assert quantize.op_type == "QuantizeLinear"
    scale, zero_point = (initializer(proto, name) for name in quantize.input[1:])
    assert zero_point.data_type == TensorProto.UINT8 and int(values(zero_point)) == 128
    assert float(values(scale)) == float(model.layer.input_scale)
    assert list(node(proto, "layer/input/dequantized").input[1:]) == list(quantize.input[1:])


@pytest.mark.parametrize("dynamic", [True, False])
def test_outputs_are_quantized_too(dynamic):
    model = nn.Sequential(OrderedDict(layer=nn.Linear(24, 10)))
    spec = QuantSpec(Int(8), PerToken() if dynamic else PerTensor(), dynamic=dynamic)
    prepare_layers(model, {"layer": Scheme(QuantSpec(Int(8), PerTensor()), None, spec)})
    if not dynamic:
        model.layer.output_quantizer.set_scale(torch.tensor([0.07]))
    pack_model(model).eval()
    x = torch.randn(5, 24)
    with torch.no_grad():
        ours = model(x)
    (theirs,) = run(one(model), x)
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(ours, nn.functional.linear(x, model.layer.weight, model.layer.bias), atol=1e-4)


def shared_model(scheme: str | None, vocab: int = 40, n: int = 64) -> nn.Module:
    """An embedding and a head with one weight, quantized or float."""
    model = nn.Sequential(OrderedDict(table=nn.Embedding(vocab, n), head=nn.Linear(n, vocab, bias=False)))
    model.head.weight = model.table.weight
    if scheme is not None:
        weight = Scheme.parse(scheme)
        prepare_layers(model, {"table": Scheme(weight.weight), "head": weight})
        pack_model(model)
    return model.eval()


@pytest.mark.parametrize("scheme", [None, "w8a16", "w4a16-g32", "w8a8", "w4a16-g32-asym", "nf4"])
def test_a_weight_that_layers_share_is_written_once(scheme):
    model = shared_model(scheme)
    proto = graph(model, {"table": TensorProto.INT64, "head": TensorProto.FLOAT})
    large = [t.name for t in proto.graph.initializer if math.prod(t.dims) == 40 * 64]
    assert large == ["table.weight"]
    index, x = torch.tensor([[0, 39, 5], [7, 7, 1]]), torch.randn(2, 3, 64)
    found, logits = run(proto, index, x)
    with torch.no_grad():
        assert torch.equal(found, model.table(index))
        ours = model.head(x)
    assert (logits - ours).abs().max() <= 2e-6 * ours.abs().max()


def test_layers_that_follow_one_another_keep_their_own_weights():
    torch.manual_seed(1)
    model = nn.Sequential(OrderedDict(a=nn.Linear(32, 24), b=nn.Linear(24, 16), c=nn.Linear(16, 8)))
    schemes = {"a": "w8a8", "b": "w4a16-g32", "c": "w8a8-ag32"}
    prepare_layers(model, {name: Scheme.parse(text) for name, text in schemes.items()})
    pack_model(model).eval()
    proto = graph(model, dict.fromkeys("abc", TensorProto.FLOAT), chained=True)
    x = torch.randn(4, 32)
    with torch.no_grad():
        ours = model(x)
    assert (run(proto, x)[-1] - ours).abs().max() <= 2e-6 * ours.abs().max()


def test_the_doubled_grid_is_the_same_real_numbers():
    packed = layer("w2a16-g32-balanced").layer.packed
    held = stored(packed)
    assert set(held.q.unique().tolist()) <= {-3, -1, 1, 3}
    assert torch.equal(held.q, 2 * packed.integers() + 1) and torch.equal(2 * held.scale, packed.scales())


def test_a_layer_that_runs_twice_is_refused():
    with pytest.raises(UsageError, match="layer runs more than once in a forward pass: not written to ONNX; export hf"):
        graph(layer("w8a16", n=24, o=24), {"layer": TensorProto.FLOAT}, edit=twice)


def twice(proto: onnx.ModelProto) -> None:
    """The layer once more, on its own output."""
    again = proto.graph.node.add()
    again.CopyFrom(proto.graph.node[0])
    again.input[0], again.output[0] = "layer_out", "layer_out_again"
