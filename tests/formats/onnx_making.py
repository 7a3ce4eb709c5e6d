"""Layers as ONNX graphs without a model around them, and the operators' definitions written the slow way."""

from collections import OrderedDict
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import nn

from quantailor.formats.onnx_graph import with_layers
from quantailor.formats.onnx_trace import DOMAIN, LAYER, OPSET
from quantailor.models.prepare import pack_model, prepare_layers
from quantailor.spec import Scheme

INT4, UINT4 = TensorProto.INT4, TensorProto.UINT4


def layer(
    scheme: str, n: int = 96, o: int = 24, *, bias: bool = True, seed: int = 0, static: float = 0.03
) -> nn.Module:
    """A model of one packed Linear called `layer`, with weights of which some are large."""
    torch.manual_seed(seed)
    model = nn.Sequential(OrderedDict(layer=nn.Linear(n, o, bias=bias)))
    with torch.no_grad():
        model.layer.weight *= 1 + 3 * (torch.rand(o, n) > 0.95)
    prepare_layers(model, {"layer": Scheme.parse(scheme)})
    quantizer = model.layer.input_quantizer
    if quantizer is not None and not quantizer.spec.dynamic:
        quantizer.set_scale(torch.tensor([static]))
    return pack_model(model).eval()


def graph(model: nn.Module, kinds: dict[str, int], chained: bool = False, edit: Any = None) -> onnx.ModelProto:
    """A graph in which each of these layers takes an input of its own, or `chained` the one before it.

    `kinds`: layer -> type of its input. `edit` may change the graph of placeholders.
    """
    nodes, inputs, outputs = [], [], []
    for name, kind in kinds.items():
        x = outputs[-1].name if chained and outputs else f"{name}_in"
        if not (chained and outputs):
            inputs.append(helper.make_tensor_value_info(x, kind, None))
        nodes.append(helper.make_node(LAYER, [x], [f"{name}_out"], domain=DOMAIN, layer=name))
        outputs.append(helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None))
    proto = helper.make_model(
        helper.make_graph(nodes, "layers", inputs, outputs),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    if edit is not None:
        edit(proto)
    return with_layers(proto, model)


def one(model: nn.Module) -> onnx.ModelProto:
    """The graph of `layer(...)`."""
    return graph(model, {"layer": TensorProto.FLOAT})


def node(proto: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (found,) = (n for n in proto.graph.node if n.name == name)
    return found


def initializer(proto: onnx.ModelProto, name: str) -> TensorProto:
    (found,) = (t for t in proto.graph.initializer if t.name == name)
    return found


def values(tensor: TensorProto) -> np.ndarray:
    """The numbers in `raw_data`, by the definition of TensorProto: 4-bit ones two a byte, the first in the low half,
    int4 in two's complement."""
    if tensor.data_type not in (INT4, UINT4):
        return onnx.numpy_helper.to_array(tensor)
    count = int(np.prod(tensor.dims))
    numbers = []
    for byte in tensor.raw_data:
        for nibble in (byte & 15, byte >> 4):
            numbers.append(nibble - 16 if tensor.data_type == INT4 and nibble >= 8 else nibble)
    assert len(tensor.raw_data) == (count + 1) // 2, "no byte more than there are pairs"
    return np.array(numbers[:count], dtype=np.int32).reshape(tuple(tensor.dims))


def dequantized(proto: onnx.ModelProto, name: str) -> np.ndarray:
    """What the DequantizeLinear called `name` gives, an element at a time: y = (x - zero_point) * scale, the scale of
    an element being that of its place along `axis`, or of its run of `block_size` along it."""
    found = node(proto, name)
    assert found.op_type == "DequantizeLinear"
    attributes = {a.name: a.i for a in found.attribute}
    x, scale, *rest = (values(initializer(proto, value)) for value in found.input)
    zero_point = rest[0] if rest else np.zeros(scale.shape, dtype=np.int32)
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)
    y = np.zeros(x.shape, dtype=np.float32)
    for index in np.ndindex(*x.shape):
        if scale.ndim == 0:
            place = ()
        elif block == 0:
            place = (index[axis],)
        else:
            place = tuple(i // block if dim == axis else i for dim, i in enumerate(index))
        y[index] = np.float32(int(x[index]) - int(zero_point[place])) * np.float32(scale[place])
    return y
