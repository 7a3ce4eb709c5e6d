"""Quantized layers as ONNX operators: what takes the place of the placeholders of a traced graph.

    weights        integers and scales as they are, through DequantizeLinear: int8, or two 4-bit values a byte; an axis
                   of scales, or blocks of `block_size` inputs. Grids of 2 and 3 bits lie in 4-bit containers. A grid
                   whose levels lie between the integers is stored as 2q + 1 with half the scale: the same reals.
                   NF4 is a Gather from its table.
    activations    static, 8 bits: QuantizeLinear, DequantizeLinear, in uint8 with zero point 128, as ONNX Runtime
                   wants. Found at each call: absmax, divide, round, clip, and then MatMulInteger, whose int32 sums
                   DequantizeLinear turns into reals by the weight's scales: the arithmetic of `kernels/ops.py`.

A weight lies as [N, O], ready for MatMul, or as [O, N] where rows of it are looked up. Axes: O out, N in, G groups.
Source: ONNX operator definitions, opset 21.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from quantailor.errors import UsageError
from quantailor.formats.onnx_trace import DOMAIN, LAYER, shared_layers
from quantailor.kernels.ops import has_integer_product
from quantailor.models.prepare import PACKED
from quantailor.nn.packed import PackedWeight, QuantEmbedding, QuantLinear
from quantailor.numerics import grids, nf4
from quantailor.numerics.grouping import num_groups
from quantailor.spec import NF4, Binary, Int, QuantSpec, Scheme

ZERO = 128  # of activations in uint8
_BITS: dict[int, int] = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT8: 8, TensorProto.UINT8: 8}


@dataclass(frozen=True)
class Stored:
    """A weight as the file has it: `q` int16 [O, N] in a container of type `kind`, `scale` float32 [O, G] or [1, 1],
    `zero_point` [O, G] or None; `block_size` inputs share a scale (None: all of a row)."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None
    kind: int
    block_size: int | None


def stored(packed: PackedWeight) -> Stored:
    """What is written of a weight. Nothing is rounded."""
    grid, q, scale = packed.spec.grid, packed.integers().to(torch.int16), packed.scales()
    group = packed.spec.group_size
    block = None if num_groups(packed.in_features, group) == 1 else group
    if is_doubled(packed.spec):
        return Stored(2 * q + 1, scale / 2, None, TensorProto.INT4, block)
    if isinstance(grid, NF4):
        return Stored(q, scale, None, TensorProto.UINT4, block)
    zero_point = packed.zero_points()
    if isinstance(zero_point, Tensor):
        return Stored(q, scale, zero_point, TensorProto.UINT4 if grid.bits <= 4 else TensorProto.UINT8, block)
    return Stored(q, scale, None, TensorProto.INT4 if grid.bits <= 4 else TensorProto.INT8, block)


def is_doubled(spec: QuantSpec) -> bool:
    """Whether the grid's levels lie half a step from the integers: the file then has 2q + 1 and half the scale."""
    return not isinstance(spec.grid, NF4) and grids.limits(spec.grid)[2] == 0.5


def tensor_of(name: str, values: Tensor, kind: int) -> TensorProto:
    """Integers as an initializer; 4-bit ones two a byte in row-major order, the first in the low half."""
    if _BITS[kind] == 8:
        plain = values.numpy().astype(np.uint8 if kind == TensorProto.UINT8 else np.int8)
        return helper.make_tensor(name, kind, list(values.shape), plain.tobytes(), raw=True)
    nibbles = (values.reshape(-1).numpy() & 0xF).astype(np.uint8)
    nibbles = np.append(nibbles, np.zeros(len(nibbles) % 2, dtype=np.uint8))
    data = (nibbles[::2] | nibbles[1::2] << 4).tobytes()
    return helper.make_tensor(name, kind, list(values.shape), data, raw=True)


def float_of(name: str, values: Tensor) -> TensorProto:
    return numpy_helper.from_array(values.detach().float().contiguous().numpy(), name)


class Builder:
    """Grows nodes and initializers. A node's output has the node's name, unless `out` says otherwise."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}

    def op(self, kind: str, inputs: Sequence[str], name: str, out: str | None = None, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [out or name], name, **attributes))
        return out or name

    def hold(self, tensor: TensorProto) -> str:
        self.initializers[tensor.name] = tensor
        return str(tensor.name)

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self.hold(numpy_helper.from_array(np.array(value, dtype=np.float32), f"number_{float(value)!r}"))

    def whole(self, values: Sequence[int]) -> str:
        """An int64 vector."""
        name = "whole_" + "_".join(map(str, values))
        return self.hold(numpy_helper.from_array(np.array(values, dtype=np.int64), name))

    def byte(self, value: int) -> str:
        """A uint8 scalar."""
        return self.hold(numpy_helper.from_array(np.array(value, dtype=np.uint8), f"byte_{value}"))


class Layers(Builder):
    """Writes the layers of one model; weights that layers share are written once, under the first one's name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.packed: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, PACKED)}
        self.shared = shared_layers(model)
        self.looked_up = {id(m.packed) for m in self.packed.values() if isinstance(m, QuantEmbedding)}
        self._names: dict[int, str] = {}
        self._made: set[str] = set()

    def add(self, layer: str, x: str, y: str) -> None:
        """The operators of `layer` between the values `x` and `y`."""
        if layer in self.shared:
            self._float(layer, x, y)
        elif isinstance(module := self.packed[layer], QuantEmbedding):
            self.op("Gather", [self._dequantized(layer, module.packed), x], f"{layer}/product", y, axis=0)
        else:
            self._linear(layer, module, x, y)

    def _float(self, layer: str, x: str, y: str) -> None:
        module = self.shared[layer]
        name = self._names.setdefault(id(module.weight), f"{layer}.weight")
        if name not in self.initializers:
            self.hold(float_of(name, module.weight))
        if isinstance(module, nn.Embedding):
            self.op("Gather", [name, x], f"{layer}/product", y, axis=0)
            return
        turned = self.op("Transpose", [name], f"{layer}/weight", perm=[1, 0])
        bias = None if module.bias is None else self.hold(float_of(f"{layer}.bias", module.bias))
        self._end(layer, self._product("MatMul", layer, x, turned, y if bias is None else None), bias, y)

    def _linear(self, layer: str, module: QuantLinear, x: str, y: str) -> None:
        scheme = module.scheme
        plain = module.bias is None and scheme.output is None
        last = y if plain else None
        bias = None if module.bias is None else self.hold(float_of(f"{layer}.bias", module.bias))
        if scheme.input is None:
            product = self._product("MatMul", layer, x, self._dequantized(layer, module.packed), last)
        elif on_integers(scheme, module.packed):
            product = self._integer_product(layer, module, x, last)
        else:
            x_hat = self._activation(f"{layer}/input", x, scheme.input, getattr(module, "input_scale", None))
            product = self._product("MatMul", layer, x_hat, self._dequantized(layer, module.packed), last)
        if scheme.output is None:
            self._end(layer, product, bias, y)
            return
        product = self._end(layer, product, bias, f"{layer}/unquantized")
        self._activation(f"{layer}/output", product, scheme.output, getattr(module, "output_scale", None), y)

    def _product(self, kind: str, layer: str, x: str, weight: str, out: str | None = None) -> str:
        return self.op(kind, [x, weight], f"{layer}/product", out)

    def _end(self, layer: str, product: str, bias: str | None, y: str) -> str:
        return product if bias is None else self.op("Add", [product, bias], f"{layer}/bias", y)

    # Weights

    def _weight(self, layer: str, packed: PackedWeight) -> tuple[str, Stored]:
        """The initializer of the integers; scales and zero points lie beside it."""
        name = self._names.setdefault(id(packed), layer)
        held = stored(packed)
        if f"{name}.weight" not in self.initializers:
            turn = id(packed) not in self.looked_up
            self.hold(tensor_of(f"{name}.weight", _turned(held.q, turn), held.kind))
            for part, values in (("scale", held.scale), ("zero_point", held.zero_point)):
                if values is not None:
                    values = values.reshape(-1) if held.block_size is None else _turned(values, turn)
                    values = values[0] if packed.scales().shape == (1, 1) and packed.out_features > 1 else values
                    full = f"{name}.weight_{part}"
                    self.hold(float_of(full, values) if part == "scale" else tensor_of(full, values, held.kind))
        return name, held

    def _dequantized(self, layer: str, packed: PackedWeight) -> str:
        """The weight in reals, [N, O], or [O, N] where rows of it are looked up."""
        name, held = self._weight(layer, packed)
        rows = id(packed) in self.looked_up
        result = f"{name}/weight"
        if result not in self._made:
            self._made.add(result)
            if isinstance(packed.spec.grid, NF4):
                self._from_table(name, packed, rows, result)
            elif held.kind == TensorProto.INT8 and held.zero_point is None and self._is_read_twice(packed):
                # With session.x64quantprecision ONNX Runtime makes int8 unsigned once a reader, under one name
                level = self.op("Cast", [f"{name}.weight"], f"{name}/level", to=TensorProto.FLOAT)
                self._times_scale(name, packed, rows, level, result)
            else:
                inputs = [f"{name}.weight", f"{name}.weight_scale"]
                inputs += [f"{name}.weight_zero_point"] if held.zero_point is not None else []
                if held.kind == TensorProto.INT8 and held.block_size is None and held.scale.numel() > 1:
                    # ONNX Runtime's session.x64quantprecision makes a wrong one where there is none
                    inputs.append(self.hold(tensor_of(f"{name}.weight_zeros", torch.zeros(len(held.scale)), held.kind)))
                across = 0 if held.block_size is None else 1  # blocks run along N, single scales along O
                axis = across if rows else 1 - across
                more: dict[str, Any] = {} if held.block_size is None else {"block_size": held.block_size}
                self.op("DequantizeLinear", inputs, result, axis=axis, **more)
        if not rows or layer not in self.packed or isinstance(self.packed[layer], QuantEmbedding):
            return result
        return self.op("Transpose", [result], f"{layer}/weight_columns", perm=[1, 0])

    def _from_table(self, name: str, packed: PackedWeight, rows: bool, result: str) -> None:
        """NF4: level of each index times the scale of its block."""
        table = self.hold(float_of("nf4_levels", torch.tensor(nf4.LEVELS)))
        index = self.op("Cast", [f"{name}.weight"], f"{name}/index", to=TensorProto.INT32)
        level = self.op("Gather", [table, index], f"{name}/level", axis=0)
        self._times_scale(name, packed, rows, level, result)

    def _is_read_twice(self, packed: PackedWeight) -> bool:
        """Whether two nodes read these integers: those of two layers, or of a product and of its outlier columns."""
        readers = [module for module in self.packed.values() if module.packed is packed]
        inputs = [module.scheme.input for module in readers]
        return len(readers) > 1 or any(spec is not None and spec.outliers is not None for spec in inputs)

    def _times_scale(self, name: str, packed: PackedWeight, rows: bool, level: str, result: str) -> None:
        scale = f"{name}.weight_scale"
        held = stored(packed)
        if held.block_size is None and held.scale.numel() == 1 and packed.out_features > 1:
            pass  # one for all
        elif held.block_size is None:
            scale = self.op("Unsqueeze", [scale, self.whole([1 if rows else 0])], f"{name}/scale")
        else:
            block = np.arange(packed.in_features, dtype=np.int32) // held.block_size
            block_of = self.hold(numpy_helper.from_array(block, f"{name}.weight_block"))
            scale = self.op("Gather", [scale, block_of], f"{name}/scale", axis=1 if rows else 0)
        self.op("Mul", [level, scale], result)

    # Activations

    def _activation(self, name: str, x: str, spec: QuantSpec, scale: Tensor | None, out: str | None = None) -> str:
        """`x` on its grid and back in reals."""
        if scale is None:
            q, step = self._found(name, x, spec)
            if spec.group_size is None:
                return self.op("Mul", [q, step], f"{name}/dequantized", out)
            grouped = self.op("Mul", [q, step], f"{name}/dequantized_groups")
            return self._ungrouped(name, x, grouped, spec, out)
        assert isinstance(spec.grid, Int)
        held = self.hold(float_of(f"{name.replace('/', '.')}_scale", scale.reshape(())))
        if (spec.grid.qmin, spec.grid.qmax) == (-128, 127):
            parts = [held, self.byte(ZERO)]
            q = self.op("QuantizeLinear", [x, *parts], f"{name}/quantized")
            return self.op("DequantizeLinear", [q, *parts], f"{name}/dequantized", out)
        inverse = self.op("Reciprocal", [held], f"{name}/inverse")
        q = self._rounded(name, self.op("Mul", [x, inverse], f"{name}/steps"), spec.grid)
        return self.op("Mul", [q, held], f"{name}/dequantized", out)

    def _found(self, name: str, x: str, spec: QuantSpec) -> tuple[str, str]:
        """(integers in float32, their scale) of the rows of `x`, or of groups of them as [..., G, g]."""
        last = self.whole([-1])
        if isinstance(spec.grid, Binary):
            mean = self.op("ReduceMean", [self.op("Abs", [x], f"{name}/abs"), last], f"{name}/mean", keepdims=1)
            above = self.op("Greater", [mean, self.number(0.0)], f"{name}/above")
            scale = self.op("Where", [above, mean, self.number(1.0)], f"{name}/scale")
            sign = self.op("GreaterOrEqual", [x, self.number(0.0)], f"{name}/sign")
            return self.op("Where", [sign, self.number(1.0), self.number(-1.0)], f"{name}/rounded"), scale
        assert isinstance(spec.grid, Int)
        low, high = spec.grid.qmin, spec.grid.qmax
        x = self._grouped(name, x, spec)
        largest = self.op("ReduceMax", [self.op("Abs", [x], f"{name}/abs"), last], f"{name}/largest", keepdims=1)
        scale = self.op("Div", [largest, self.number((high - low) / 2)], f"{name}/found")
        # as `scale_zero_point` has it: no level is infinite, and a denormal range counts as zero
        top = torch.tensor(torch.finfo(torch.float32).max) / ((high - low + 2) // 2)
        scale = self.op("Min", [scale, self.number(float(top))], f"{name}/capped")
        inverse = self.op("Reciprocal", [scale], f"{name}/inverse")
        none = self.op("IsInf", [inverse], f"{name}/none")
        scale = self.op("Where", [none, self.number(1.0), scale], f"{name}/scale")
        return self._rounded(name, self.op("Div", [x, scale], f"{name}/steps"), spec.grid), scale

    def _rounded(self, name: str, steps: str, grid: Int) -> str:
        rounded = self.op("Round", [steps], f"{name}/round")  # half to even, as ours
        return self.op("Clip", [rounded, self.number(grid.qmin), self.number(grid.qmax)], f"{name}/rounded")

    def _grouped(self, name: str, x: str, spec: QuantSpec) -> str:
        """[..., N] -> [..., G, g], filled up with zeros."""
        if spec.group_size is None:
            return x
        width = self.widths[name]
        if missing := -width % spec.group_size:
            x = self.op("Pad", [x, self.whole([0, missing]), "", self.whole([-1])], f"{name}/padded")
        lead = self.op("Shape", [x], f"{name}/lead", end=-1)
        shape = self.op("Concat", [lead, self.whole([-1, spec.group_size])], f"{name}/groups_shape", axis=0)
        return self.op("Reshape", [x, shape], f"{name}/groups")

    def _ungrouped(self, name: str, x: str, grouped: str, spec: QuantSpec, out: str | None) -> str:
        lead = self.op("Shape", [x], f"{name}/row_lead", end=-1)
        shape = self.op("Concat", [lead, self.whole([-1])], f"{name}/row_shape", axis=0)
        width = self.widths[name]
        assert spec.group_size is not None
        if width % spec.group_size == 0:
            return self.op("Reshape", [grouped, shape], f"{name}/row", out)
        row = self.op("Reshape", [grouped, shape], f"{name}/row")
        bounds = [self.whole([0]), self.whole([width]), self.whole([-1])]
        return self.op("Slice", [row, *bounds], f"{name}/cut", out)

    # The product of integers

    def _integer_product(self, layer: str, module: QuantLinear, x: str, out: str | None) -> str:
        """x_scale * w_scale * (x_q @ w_q), the inner product exact in int32."""
        spec, name = module.scheme.input, f"{layer}/input"
        assert spec is not None
        kept = None
        if spec.outliers is not None:
            x, kept = self._without_outliers(name, x, module.packed, spec.outliers)
        q, x_scale = self._found(name, x, spec)
        moved = self.op("Add", [q, self.number(ZERO)], f"{name}/moved")
        unsigned = self.op("Cast", [moved], f"{name}/quantized", to=TensorProto.UINT8)
        weight, zero_point, w_scale = self._operand(layer, module.packed)
        inputs = [unsigned, weight, self.byte(ZERO), *([zero_point] if zero_point else [])]
        total = self.op("MatMulInteger", inputs, f"{layer}/product")
        scaled = self.op("DequantizeLinear", [total, w_scale], f"{layer}/scaled", axis=-1)
        if kept is None:
            return self.op("Mul", [scaled, x_scale], f"{layer}/scaled_rows", out)
        scaled = self.op("Mul", [scaled, x_scale], f"{layer}/scaled_rows")
        floats = self.op("MatMul", [kept, self._dequantized(layer, module.packed)], f"{layer}/outliers")
        return self.op("Add", [scaled, floats], f"{layer}/with_outliers", out)

    def _operand(self, layer: str, packed: PackedWeight) -> tuple[str, str | None, str]:
        """(integers of 8 bits as [N, O], zero point, scale): what MatMulInteger takes."""
        name, held = self._weight(layer, packed)
        weight, zero_point = f"{name}.weight", f"{name}.weight_zero_point" if held.zero_point is not None else None
        if _BITS[held.kind] == 4:
            wide = TensorProto.UINT8 if held.kind == TensorProto.UINT4 else TensorProto.INT8
            weight = self.op("Cast", [weight], f"{layer}/wide", to=wide)
            zero_point = zero_point and self.op("Cast", [zero_point], f"{layer}/wide_zero_point", to=wide)
        if id(packed) in self.looked_up:
            weight = self.op("Transpose", [weight], f"{layer}/weight_columns", perm=[1, 0])
        return weight, zero_point, f"{name}.weight_scale"

    def _without_outliers(self, name: str, x: str, packed: PackedWeight, threshold: float) -> tuple[str, str]:
        """`x` less its outlier columns, and those columns with zeros elsewhere (LLM.int8)."""
        rows = self.op(
            "Reshape", [self.op("Abs", [x], f"{name}/sizes"), self.whole([-1, packed.in_features])], f"{name}/rows"
        )
        largest = self.op("ReduceMax", [rows, self.whole([0])], f"{name}/column", keepdims=0)
        is_outlier = self.op("GreaterOrEqual", [largest, self.number(threshold)], f"{name}/is_outlier")
        rest = self.op("Where", [is_outlier, self.number(0.0), x], f"{name}/rest")
        return rest, self.op("Where", [is_outlier, x, self.number(0.0)], f"{name}/outlier_columns")

    @property
    def widths(self) -> dict[str, int]:
        """How long the rows are that each activation quantizer sees."""
        inputs = {f"{n}/input": m.packed.in_features for n, m in self.packed.items()}
        return inputs | {f"{n}/output": m.packed.out_features for n, m in self.packed.items()}


def on_integers(scheme: Scheme, packed: PackedWeight) -> bool:
    """Whether a layer's product is one of integers: scales found for each token, and one for each output row.

    Static ones go through QuantizeLinear and DequantizeLinear around a MatMul, the form that runtimes fuse.
    """
    spec = scheme.input
    if spec is None or not spec.dynamic or spec.group_size is not None:
        return False
    return packed.scales().shape[1] == 1 and has_integer_product(packed.spec.grid)


def _turned(values: Tensor, turn: bool) -> Tensor:
    return (values.t() if turn else values).contiguous()


def with_layers(proto: onnx.ModelProto, model: nn.Module) -> onnx.ModelProto:
    """Put the operators of `model`'s layers in place of `proto`'s placeholders. Returns `proto`.

    Raises: UsageError where a layer runs more than once.
    """
    layers = Layers(model)
    done: set[str] = set()
    for node in list(proto.graph.node):
        if node.domain == DOMAIN and node.op_type == LAYER:
            (name,) = (a.s.decode() for a in node.attribute if a.name == "layer")
            if name in done:
                raise UsageError(f"{name} runs more than once in a forward pass: not written to ONNX; export hf")
            done.add(name)
            layers.add(name, node.input[0], node.output[0])
        else:
            layers.nodes.append(node)
    _replace(proto.graph.node, layers.nodes)
    proto.graph.initializer.extend(layers.initializers.values())
    _replace(proto.opset_import, [entry for entry in proto.opset_import if entry.domain != DOMAIN])
    return proto


def _replace(field: Any, items: Iterable[Any]) -> None:
    kept = list(items)
    copies = [type(item)() for item in kept]
    for copy, item in zip(copies, kept):
        copy.CopyFrom(item)
    del field[:]
    field.extend(copies)
