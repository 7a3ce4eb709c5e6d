"""Modules that compute in float on the grid: what QAT trains, and what the packed modules must reproduce.

Each subclasses the layer it replaces (so that peft and `isinstance` walks know it), keeps its parameters under their
names, and adds a quantizer a tensor. Axes: O out, N in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantailor.errors import UsageError
from quantailor.kernels.ops import has_integer_product
from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.nn.int_forward import integer_forward, integer_linear, simulated_linear
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.spec import QuantSpec, Scheme, why_not_convolution


def _activation(spec: QuantSpec | None, like: Tensor) -> ActivationQuantizer | None:
    return None if spec is None else ActivationQuantizer(spec, like.device)


class _FakeQuant(nn.Module):
    """What the fake-quantized layers share: three optional quantizers and a weight seen as [O, N]."""

    weight: Any  # an nn.Parameter; the layers mixed in declare it in their own ways
    bias: Any
    weight_quantizer: WeightQuantizer | None
    input_quantizer: ActivationQuantizer | None
    output_quantizer: ActivationQuantizer | None
    scheme: Scheme
    backward_in_bf16 = False  # of layers that multiply integers (nn/int_forward.set_backward)
    share = 1.0  # in training: how far weight and input are moved from float to the grid (qat/low_bits.Blend)

    def _attach(self, source: nn.Module, scheme: Scheme, weight: Any, bias: Any) -> None:
        self.training = source.training
        self.weight, self.bias, self.scheme = weight, bias, scheme
        rows = self.weight_ON
        spec = scheme.weight
        self.weight_quantizer = WeightQuantizer(spec, rows.shape[0], rows.shape[1], rows.device) if spec else None
        self.input_quantizer = _activation(scheme.input, rows)
        self.output_quantizer = _activation(scheme.output, rows)

    @property
    def weight_ON(self) -> Tensor:
        """The weight as rows of outputs: a view."""
        return self.weight.flatten(1)

    def fake_weight(self) -> Tensor:
        """The weight on its grid, in its own shape."""
        if self.weight_quantizer is None:
            return self.weight
        return self._blend(self.weight, self.weight_quantizer(self.weight_ON).view_as(self.weight))

    def _in(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self._blend(x, self.input_quantizer(x))

    def _blend(self, x: Tensor, x_hat: Tensor) -> Tensor:
        return torch.lerp(x, x_hat, self.share) if self.training and self.share < 1 else x_hat

    def _out(self, y: Tensor) -> Tensor:
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, {self.scheme}"


class FakeQuantLinear(_FakeQuant, nn.Linear):
    """y = x_hat @ w_hat^T + bias.   x [..., N] -> y [..., O]"""

    def __init__(self, source: nn.Linear, scheme: Scheme) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, source.out_features
        self._attach(source, scheme, source.weight, source.bias)

    @staticmethod
    def from_conv1d(source: Any, scheme: Scheme) -> FakeQuantLinear:
        """From transformers' Conv1D (GPT-2), which stores its weight as [N, O]."""
        n, o = source.weight.shape
        linear = nn.Linear(n, o, bias=source.bias is not None, device="meta")
        linear.weight = nn.Parameter(source.weight.detach().t().contiguous())
        linear.bias = source.bias
        return FakeQuantLinear(linear.train(source.training), scheme)

    def forward(self, x: Tensor) -> Tensor:
        return self._out(self._integer_product(x) if self._on_integers else self._simulated(self._in(x)))

    def _simulated(self, x_hat: Tensor) -> Tensor:
        w = self.weight_quantizer
        if self._in_one_step and w is not None and w.grid is not None:
            return simulated_linear(x_hat, self.weight, w.scale_OG, w.zero_point_OG, self.bias, w.grid)
        bias = None if self.bias is None else self.bias.to(x_hat.dtype)
        return F.linear(x_hat, self.fake_weight().to(x_hat.dtype), bias)

    def _integer_product(self, x: Tensor) -> Tensor:
        a, w = self.input_quantizer, self.weight_quantizer
        assert a is not None and w is not None and w.grid is not None
        integers = a.integers(x)
        if integers.columns is None and integers.group_size is None:
            parts = (self.weight, w.scale_OG, self.bias, integers, w.zero_point_OG, w.grid, self.backward_in_bf16)
            return integer_linear(a.carrier(x), *parts)
        return integer_forward(a(x), self.fake_weight(), self.bias, integers, w.integer_weight(self.weight))

    @property
    def _in_one_step(self) -> bool:
        """Whether the weight is on its grid by LSQ's own quantizer (no stand-in of qat/quantizers.py), undiluted."""
        w = self.weight_quantizer
        return type(w) is WeightQuantizer and w.enabled and not (self.training and self.share < 1)

    @property
    def _on_integers(self) -> bool:
        """Whether both sides are on an integer grid right now (not while calibrating, nor switched off)."""
        w, a = self.weight_quantizer, self.input_quantizer
        if w is None or a is None or not w.enabled or not a.enabled or a.observer is not None:
            return False
        if self.training and (self.share < 1 or w.own_gradient):
            return False
        return has_integer_product(w.spec.grid)


class FakeQuantConv2d(_FakeQuant, nn.Conv2d):
    """A convolution on the grid; a "token" of its input is one image, so dynamic scales are per image.

    Raises: UsageError for inputs in groups or with outlier columns: a run of a flattened image is no group of inputs.
    """

    def __init__(self, source: nn.Conv2d, scheme: Scheme) -> None:
        nn.Module.__init__(self)
        if reason := why_not_convolution(scheme):
            raise UsageError(reason)
        for name in (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        ):
            setattr(self, name, getattr(source, name))
        self.transposed, self.output_padding = False, (0, 0)
        self._reversed_padding_repeated_twice = source._reversed_padding_repeated_twice
        self._attach(source, scheme, source.weight, source.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self._in(x.flatten(-3)).view_as(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._out(self._conv_forward(x, self.fake_weight().to(x.dtype), bias))


class FakeQuantEmbedding(_FakeQuant, nn.Embedding):
    """Rows of a table on the grid; only the weight has one."""

    def __init__(self, source: nn.Embedding, scheme: Scheme) -> None:
        nn.Module.__init__(self)
        for name in (
            "num_embeddings",
            "embedding_dim",
            "padding_idx",
            "max_norm",
            "norm_type",
            "scale_grad_by_freq",
            "sparse",
        ):
            setattr(self, name, getattr(source, name))
        self._attach(source, Scheme(weight=scheme.weight), source.weight, None)

    def forward(self, index: Tensor) -> Tensor:
        assert self.weight_quantizer is not None
        rows = self.weight_quantizer.rows(self.weight, index)
        return self._blend(self.weight[index], rows) if self.share < 1 else rows


FakeQuant = FakeQuantLinear | FakeQuantConv2d | FakeQuantEmbedding


def fake_quantized(source: nn.Module, scheme: Scheme) -> FakeQuant:
    """The fake-quantized twin of a layer, sharing its parameters. Scales still have to be set."""
    if isinstance(source, nn.Linear):
        return FakeQuantLinear(source, scheme)
    if isinstance(source, nn.Embedding):
        return FakeQuantEmbedding(source, scheme)
    if isinstance(source, nn.Conv2d):
        return FakeQuantConv2d(source, scheme)
    if type(source).__name__ == "Conv1D":
        return FakeQuantLinear.from_conv1d(source, scheme)
    raise TypeError(f"{type(source).__name__} has no fake-quantized twin")


@torch.no_grad()
def set_rounded(module: FakeQuant, q_ON: Tensor) -> None:
    """Make `q_ON` the module's integers, keeping each float weight as near to its old value as its cell allows."""
    assert module.weight_quantizer is not None
    shadow = module.weight_quantizer.shadow(module.weight_ON, q_ON)
    module.weight.copy_(shadow.view_as(module.weight))
    if not torch.equal(module.weight_quantizer.integers(module.weight_ON), q_ON):
        # A half-precision weight cannot express every point of a cell: its centre it can.
        module.weight.copy_(module.weight_quantizer.dequantize(q_ON).view_as(module.weight))
