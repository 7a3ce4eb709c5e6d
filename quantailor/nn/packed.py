"""Modules that hold integers only: what is saved and served. No float copy of a weight exists between calls.

`PackedWeight` holds one weight's integers, scales and zero points in their stored layout; the layers around it run
the integer product where their input is quantized too, and otherwise dequantize for the call. Axes: O out, N in,
G groups a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantailor.kernels import decode
from quantailor.kernels.decode import StoredWeight, rows_as_floats
from quantailor.kernels.native import library as native
from quantailor.kernels.operators import opaque
from quantailor.kernels.ops import IntegerInput, IntegerWeight, has_integer_product, int_linear
from quantailor.nn.activation_quantizer import fake_quantized_activation, gradient_carrier, quantize_activation
from quantailor.nn.fake_quant import FakeQuant, FakeQuantConv2d, FakeQuantEmbedding, FakeQuantLinear
from quantailor.nn.int_forward import output_dtype
from quantailor.nn.recompute import frozen_linear
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.numerics import grids, nf4
from quantailor.numerics.grouping import from_groups, num_groups, per_element, to_groups
from quantailor.numerics.packing import pack, unpack, words_per_row
from quantailor.spec import NF4, Int, PerTensor, QuantSpec, Scheme


class PackedWeight(nn.Module):
    """One weight as integers.

    Buffers: `q` int8 [O, N] at 8 symmetric bits, else `words` int32 [O, ceil(N * bits / 32)] (numerics/packing.py);
    `scale` float32 [O, G] ([1, 1] per tensor), or with double quantization `scale_codes` uint8 [O, G],
    `scale_second` [ceil(O * G / 256)] and `scale_mean` [1]; `zero_point` uint8 [O, G] on asymmetric grids;
    `group_index` int32 [N], the group of each input, where the spec is indexed.
    """

    def __init__(
        self, spec: QuantSpec, out_features: int, in_features: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.spec, self.out_features, self.in_features = spec, out_features, in_features
        groups = num_groups(in_features, spec.group_size)
        rows = 1 if isinstance(spec.granularity, PerTensor) else out_features
        if self.is_int8:
            self._empty("q", (out_features, in_features), torch.int8, device)
        else:
            self._empty("words", (out_features, words_per_row(in_features, spec.grid.bits)), torch.int32, device)
        if self.is_double:
            self._empty("scale_codes", (rows, groups), torch.uint8, device)
            self._empty("scale_second", (-(-rows * groups // nf4.SECOND_BLOCK),), torch.float32, device)
            self._empty("scale_mean", (1,), torch.float32, device)
        else:
            self._empty("scale", (rows, groups), torch.float32, device)
        if self.is_asymmetric:
            self._empty("zero_point", (rows, groups), torch.uint8, device)
        if spec.is_indexed:
            self._empty("group_index", (in_features,), torch.int32, device)

    def _empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

    @property
    def is_int8(self) -> bool:
        return isinstance(self.spec.grid, Int) and self.spec.grid.bits == 8 and self.spec.grid.symmetric

    @property
    def is_double(self) -> bool:
        return isinstance(self.spec.grid, NF4) and self.spec.grid.double_quant

    @property
    def is_asymmetric(self) -> bool:
        return isinstance(self.spec.grid, Int) and not self.spec.grid.symmetric

    @torch.no_grad()
    def store(self, q_ON: Tensor, quantizer: WeightQuantizer) -> None:
        """Take over integers and their grid. The float weight is not needed."""
        scale_OG1, zero_point_OG1 = quantizer.scale, quantizer.zero_point
        buffers = dict(self.named_buffers())
        self._put(q_ON)
        if quantizer.doubled is not None:
            for name, value in zip(("scale_codes", "scale_second", "scale_mean"), quantizer.doubled):
                buffers[name].copy_(value)
        else:
            buffers["scale"].copy_(scale_OG1.squeeze(-1))
        if self.is_asymmetric:
            buffers["zero_point"].copy_(zero_point_OG1.squeeze(-1))
        if self.spec.is_indexed:
            buffers["group_index"].copy_(quantizer.group_index)  # type: ignore[arg-type]

    @torch.no_grad()
    def fill(self, q_ON: Tensor, like: PackedWeight, scale: Tensor) -> None:
        """Take over integers, on the grid of another packed weight with this `scale` [O, G] or [1, 1]."""
        buffers, theirs = dict(self.named_buffers()), dict(like.named_buffers())
        for name in buffers:
            if name in ("q", "words"):
                continue
            buffers[name].copy_(scale if name == "scale" else theirs[name])
        self._put(q_ON)

    def _put(self, q_ON: Tensor) -> None:
        buffers = dict(self.named_buffers())
        if self.is_int8:
            buffers["q"].copy_(q_ON)
        else:
            buffers["words"].copy_(pack(q_ON.to(torch.int16) - grids.lowest(self.spec.grid), self.spec.grid.bits))

    @torch.no_grad()
    def encode(self, weight_nN: Tensor, rows: slice) -> Tensor:
        """The integers that some rows of a float weight have on this grid, [n, N]."""
        scale, zero_point = self.scales(), self.zero_points()
        if scale.shape[0] != 1:
            scale = scale[rows]
            zero_point = zero_point[rows] if isinstance(zero_point, Tensor) else zero_point
        if isinstance(zero_point, Tensor):
            zero_point = self.of_groups(zero_point).unsqueeze(-1)
        w = self.grouped(weight_nN.float())
        encoded = grids.encode(w, self.of_groups(scale).unsqueeze(-1), zero_point, self.spec.grid)
        return from_groups(encoded, self.in_features)

    def integers(self, rows: Tensor | slice | None = None) -> Tensor:
        """int8 [O, N] (uint8 for 8 asymmetric bits), or those of some rows only."""
        if self.is_int8:
            q: Tensor = self.q  # type: ignore[assignment]
            return q if rows is None else q[rows]
        words: Tensor = self.words  # type: ignore[assignment]
        u = unpack(words if rows is None else words[rows], self.spec.grid.bits, self.in_features)
        lowest = grids.lowest(self.spec.grid)
        return u if lowest == 0 and self.spec.grid.bits == 8 else (u.to(torch.int16) + lowest).to(torch.int8)

    def scales(self) -> Tensor:
        """float32 [O, G] or [1, 1]."""
        if self.is_double:
            return nf4.double_dequantize(self.scale_codes, self.scale_second, self.scale_mean)  # type: ignore[arg-type]
        return self.scale  # type: ignore[return-value]

    def zero_points(self) -> Tensor | int:
        stored = dict(self.named_buffers()).get("zero_point")
        return 0 if stored is None else stored.to(torch.int32)

    def dequantize(self, rows: Tensor | slice | None = None) -> Tensor:
        """float32 [O, N], or [n, N] for some rows: made for this call, not kept."""
        scale, zero_point = self.scales(), self.zero_points()
        if rows is not None and scale.shape[0] != 1:
            scale = scale[rows]
            zero_point = zero_point[rows] if isinstance(zero_point, Tensor) else zero_point
        if isinstance(zero_point, Tensor):
            zero_point = self.of_groups(zero_point).unsqueeze(-1)
        decoded = grids.decode(
            self.grouped(self.integers(rows)), self.of_groups(scale).unsqueeze(-1), zero_point, self.spec.grid
        )
        return from_groups(decoded, self.in_features)

    def grouped(self, x_nN: Tensor) -> Tensor:
        """[n, N] -> [n, G, g], or one by one, [n, N, 1], where a list says which group each is in."""
        return x_nN.unsqueeze(-1) if self.spec.is_indexed else to_groups(x_nN, self.spec.group_size)

    def of_groups(self, value_nG: Tensor) -> Tensor:
        """Scales or zero points as `grouped` meets them."""
        return value_nG[:, self.group_index] if self.spec.is_indexed else value_nG  # type: ignore[index]

    def summed(self, x_nN: Tensor) -> Tensor:
        """[n, N] -> [n, G], the sum of each group."""
        if not self.spec.is_indexed:
            return to_groups(x_nN, self.spec.group_size).sum(-1)
        sums = x_nN.new_zeros(x_nN.shape[0], self.scales().shape[1])
        return sums.index_add_(1, self.group_index, x_nN)  # type: ignore[arg-type]

    def of_elements(self, value_OG: Tensor) -> Tensor:
        """[O, G] -> [O, N]: each group's value at each of its elements."""
        if self.spec.is_indexed:
            return self.of_groups(value_OG)
        return per_element(value_OG, self.in_features, self.spec.group_size)

    def shift(self) -> Tensor | None:
        """offset - zero_point, [O, G]; None where both are zero. Not for NF4, whose levels are no integers."""
        if self.is_asymmetric:
            return -self.zero_point.float()  # type: ignore[operator]
        offset = grids.limits(self.spec.grid)[2]
        return torch.full_like(self.scales(), offset) if offset else None

    def stored(self) -> StoredWeight | None:
        """As kernels for packed weights read it; None for what they do not know: listed groups.

        Scales are float32 there, also where the model was turned into another type as a whole.
        """
        grid = self.spec.grid
        if self.spec.is_indexed:
            return None
        buffers = {name: b for name, b in self._buffers.items() if b is not None}
        if isinstance(grid, NF4):
            levels = torch.tensor(nf4.LEVELS)
            return StoredWeight(
                buffers["words"], self.scales().float(), 4, self.in_features, self.spec.group_size, 0.0, None, levels
            )
        if self.is_int8:
            return StoredWeight(buffers["q"], buffers["scale"].float(), 8, self.in_features, self.spec.group_size)
        move = 0.0 if self.is_asymmetric else grids.lowest(grid) + grids.limits(grid)[2]
        zero = buffers.get("zero_point")
        scale = buffers["scale"].float()
        return StoredWeight(buffers["words"], scale, grid.bits, self.in_features, self.spec.group_size, move, zero)

    def block_maker(self) -> Callable[[slice], Tensor]:
        """Rows -> float32 [n, N]: `dequantize` by native code where there is any, into memory that is used again."""
        stored = self.stored()
        one_for_all = stored is not None and stored.zero_point is not None and stored.scale.shape[0] == 1
        if stored is None or one_for_all or stored.data.device.type != "cpu" or native.library() is None:
            return self.dequantize
        return partial(rows_as_floats, stored)

    def grid_rows(self, rows: slice) -> IntegerWeight:
        """Some rows as the integer product takes them."""
        scale, shift = self.scales(), self.shift()
        if scale.shape[0] != 1:
            scale, shift = scale[rows], None if shift is None else shift[rows]
        return IntegerWeight(self.integers(rows), scale, shift, self.spec.group_size)

    def extra_repr(self) -> str:
        return f"{self.out_features} x {self.in_features}, {self.spec.grid}"


class _Quant(nn.Module):
    """What the packed layers share."""

    def __init__(self, scheme: Scheme, packed: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.scheme, self.packed = scheme, packed
        self.bias: Tensor | None
        self.register_buffer("bias", bias)
        for name, spec in (("input_scale", scheme.input), ("output_scale", scheme.output)):
            if spec is not None and not spec.dynamic:
                self.register_buffer(name, torch.ones(1, device=packed.scales().device))

    def _quantize_input(self, x: Tensor) -> IntegerInput:
        assert self.scheme.input is not None
        return quantize_activation(x, self.scheme.input, getattr(self, "input_scale", None))

    def _out(self, y: Tensor) -> Tensor:
        if self.scheme.output is None:
            return y
        if y.requires_grad:
            return fake_quantized_activation(y, self.scheme.output, getattr(self, "output_scale", None))
        return quantize_activation(y, self.scheme.output, getattr(self, "output_scale", None)).dequantize().to(y.dtype)

    def _carrier(self, x: Tensor) -> Tensor:
        """`x` as far as its gradient goes."""
        if self.scheme.input is None:
            return x
        return gradient_carrier(x, self.scheme.input, getattr(self, "input_scale", None))

    def extra_repr(self) -> str:
        return str(self.scheme)


class QuantLinear(_Quant):
    """y = x @ dequantize(q)^T + bias, as an integer product where x is quantized.   x [..., N] -> y [..., O]

    Frozen, but open to gradients: those of `x` pass straight through its quantizer, and no float weight is kept for
    them (nn/recompute.py).
    """

    serves = False  # whether products are chosen by shape (models/serving.py)
    held: StoredWeight | None = None  # meanwhile: the packed weight as kernels read it, found once and not at each call
    rows_compiled = 0  # meanwhile: up to how many rows a compiled graph multiplies by that kernel

    @property
    def in_features(self) -> int:
        return self.packed.in_features

    @property
    def out_features(self) -> int:
        return self.packed.out_features

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made anew: for code that looks at `.weight.dtype` or `.weight.device`."""
        return self.packed.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        if needs_gradient and not torch.compiler.is_compiling():
            return self._out(self._with_gradient(x))
        if self.serves and self.scheme.input is None and not needs_gradient:
            if not opaque(x):
                return self._out(self._served(x))
            if x.numel() <= self.rows_compiled * self.in_features:
                return self._out(self._decoded(x))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.scheme.input is None:
            return self._out(F.linear(x, self.packed.dequantize().to(x.dtype), bias))
        x_int = self._quantize_input(x)
        if not has_integer_product(self.packed.spec.grid):
            return self._out(F.linear(x_int.dequantize().to(x.dtype), self.packed.dequantize().to(x.dtype), bias))
        grid = IntegerWeight(
            self.packed.integers(), self.packed.scales(), self.packed.shift(), self.packed.spec.group_size
        )
        return self._out(int_linear(x_int, grid, self.bias, dtype=output_dtype(x)))

    def _served(self, x: Tensor) -> Tensor:
        rows_TN = x.reshape(-1, self.in_features)
        if not decode.why_not(self.held, rows_TN.shape[0], x.device.type):
            return self._decoded(x)
        y = decode.by_blocks(rows_TN, self.packed.block_maker(), self.out_features, self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _decoded(self, x: Tensor) -> Tensor:
        assert self.held is not None
        y = decode.decode_linear(x.reshape(-1, self.in_features), self.held, self.bias, x.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _with_gradient(self, x: Tensor) -> Tensor:
        x_int = None if self.scheme.input is None else self._quantize_input(x)
        on_integers = x_int is not None and has_integer_product(self.packed.spec.grid)
        rows = self.packed.grid_rows if on_integers else self.packed.dequantize
        return frozen_linear(self._carrier(x), x_int, rows, self.bias, self.out_features, self.in_features)


class QuantEmbedding(_Quant):
    """Rows dequantized as they are looked up.   index [*] -> [*, N] in `dtype`, the model's"""

    def __init__(
        self, scheme: Scheme, packed: PackedWeight, bias: Tensor | None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(scheme, packed, bias)
        self.dtype = dtype

    @property
    def weight(self) -> Tensor:
        return self.packed.dequantize()

    def forward(self, index: Tensor) -> Tensor:
        return self.packed.dequantize(index.flatten()).to(self.dtype).unflatten(0, index.shape)


class QuantConv2d(_Quant):
    """A convolution whose weight is stored as integers; it runs on the dequantized grid values."""

    def __init__(self, scheme: Scheme, packed: PackedWeight, bias: Tensor | None, settings: dict[str, Any]) -> None:
        super().__init__(scheme, packed, bias)
        self.settings = settings  # stride, padding, dilation, groups, and the weight's shape

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """For models that pad by hand, as do `stride` and `dilation`."""
        return tuple(self.settings["shape"][2:])

    @property
    def stride(self) -> Any:
        return self.settings["stride"]

    @property
    def dilation(self) -> Any:
        return self.settings["dilation"]

    def forward(self, x: Tensor) -> Tensor:
        if self.scheme.input is not None:
            x = self._quantize_input(x.flatten(-3)).dequantize().to(x.dtype).view_as(x)
        s = self.settings
        weight = self.packed.dequantize().to(x.dtype).reshape(s["shape"])
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.conv2d(x, weight, bias, s["stride"], s["padding"], s["dilation"], s["groups"])
        return self._out(y)


@torch.no_grad()
def packed(source: FakeQuant, weight: PackedWeight | None = None) -> QuantLinear | QuantEmbedding | QuantConv2d:
    """The packed twin of a fake-quantized layer. `weight`: one already packed, where the weight is tied."""
    quantizer = source.weight_quantizer
    assert quantizer is not None
    if weight is None:
        weight = PackedWeight(
            quantizer.spec, source.weight_ON.shape[0], source.weight_ON.shape[1], source.weight.device
        )
        weight.store(quantizer.integers(source.weight_ON), quantizer)
    bias = None if source.bias is None else source.bias.detach().clone()
    result: QuantLinear | QuantEmbedding | QuantConv2d
    if isinstance(source, FakeQuantLinear):
        result = QuantLinear(source.scheme, weight, bias)
    elif isinstance(source, FakeQuantEmbedding):
        result = QuantEmbedding(source.scheme, weight, None, source.weight.dtype)
    else:
        result = QuantConv2d(source.scheme, weight, bias, conv_settings(source))
    for name, activations in (("input_scale", source.input_quantizer), ("output_scale", source.output_quantizer)):
        if activations is not None and not activations.spec.dynamic:
            getattr(result, name).copy_(activations.scale)
    return result.train(source.training)


def conv_settings(source: nn.Conv2d | FakeQuantConv2d) -> dict[str, Any]:
    """What `F.conv2d` needs besides the tensors. Raises: ValueError for padding that is not zeros."""
    if source.padding_mode != "zeros":
        raise ValueError(f"padding_mode={source.padding_mode!r}: only zeros can be packed; keep this layer by a rule")
    return {
        "stride": source.stride,
        "padding": source.padding,
        "dilation": source.dilation,
        "groups": source.groups,
        "shape": tuple(source.weight.shape),
    }
