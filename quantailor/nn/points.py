"""The quantizers of points inside a block: simulated, or packed to what is served. They hang on what they follow.

    ATTENTION.score_point, .key_point, .value_point   called by nn/attention.py
    NORM.output_point, ACTIVATION.output_point         called by a hook, which finds them on the module it runs for
    BLOCK.residual_points.<n>, .embedding_point        called by nn/residual.py

A hook is a plain function and the quantizer a child module, so that a deep copy of a block is whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantailor.kernels.ops import IntegerInput
from quantailor.nn.activation_quantizer import ActivationQuantizer, quantize_activation
from quantailor.numerics import affine
from quantailor.points import PointSpec
from quantailor.spec import Int


class PointQuantizer(ActivationQuantizer):
    """Fake-quantizes x [..., N] at a point. Floats pass until a static scale has been set.

    `transposed`: x is [B, H, T, D], and rows that the mask [B, T] rules out are those of T.
    """

    def __init__(self, spec: PointSpec, device: torch.device | str | None = None, transposed: bool = False) -> None:
        super().__init__(spec.quant, torch.device(device) if device is not None else None)
        self.point, self.transposed = spec, transposed
        if not spec.quant.dynamic:
            self.enabled = False
            self.log_scale.requires_grad_(spec.learned)

    def set_scale(self, scale: Tensor) -> None:
        """Raises: ValueError unless it is finite and positive."""
        super().set_scale(scale)
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.observe(x.transpose(1, 2) if self.transposed else x, self.mask)
            return x
        return super().forward(x)

    def extra_repr(self) -> str:
        return str(self.point)


class ScoreQuantizer(PointQuantizer):
    """Fake-quantizes scores [B, H, Q, K]. The range of a row is that of the keys it may see: what the mask rules out
    may be nothing yet (a cache is shorter), or padding, and must not move the scale of what counts."""

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """`visible`: boolean, broadcastable to `x`; None: every key is."""
        if self.observer is not None:
            if len(values := _counted(x, visible, self.mask)):
                self.observer.observe(values)
            return x
        if not self.enabled or visible is None or not self.spec.dynamic:
            return super().forward(x)
        return affine.straight_through(x, visible_integers(x, visible, self.spec.grid).dequantize().to(x.dtype))


def _counted(x: Tensor, visible: Tensor | None, rows: Tensor | None) -> Tensor:
    """The scores [n] that count: seen by a query that is no padding."""
    counts = torch.ones_like(x, dtype=torch.bool) if visible is None else visible.expand_as(x)
    if rows is not None and rows.shape == (x.shape[0], x.shape[2]):
        counts = counts & rows.bool()[:, None, :, None]
    return x.detach()[counts]


def visible_integers(x: Tensor, visible: Tensor, grid: Any) -> IntegerInput:
    """`affine.quantize_dynamic` of `x` [..., K] with a row's range taken over its visible elements alone."""
    assert isinstance(grid, Int)
    values = x.detach().float()
    largest = values.abs().masked_fill(~visible, 0.0).amax(-1, keepdim=True)
    scale, _ = affine.scale_zero_point(-largest, largest, grid.qmin, grid.qmax, symmetric=True)
    return IntegerInput(torch.round(values / scale).clamp(grid.qmin, grid.qmax).to(torch.int8), scale)


class PackedPoint(nn.Module):
    """What is served in a point's place: to integers and back. Buffer `scale` [1] if static.

    The gradient passes as if nothing were there: adapters train on a packed base.
    """

    def __init__(self, spec: PointSpec, device: torch.device | str | None = None, transposed: bool = False) -> None:
        super().__init__()
        self.point, self.spec, self.transposed = spec, spec.quant, transposed
        if not spec.quant.dynamic:
            self.register_buffer("scale", torch.ones(1, device=device))

    @torch.no_grad()
    def integers(self, x: Tensor) -> IntegerInput:
        """What a kernel or a cache would hold of `x` [..., N]."""
        return quantize_activation(x, self.spec, getattr(self, "scale", None))

    def forward(self, x: Tensor) -> Tensor:
        return affine.straight_through(x, self.integers(x).dequantize().to(x.dtype))

    def extra_repr(self) -> str:
        return str(self.point)


class PackedScore(PackedPoint):
    """Scores [B, H, Q, K] through integers."""

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """`visible`: boolean, broadcastable to `x`."""
        if visible is None or not self.spec.dynamic:
            return super().forward(x)
        return affine.straight_through(x, visible_integers(x, visible, self.spec.grid).dequantize().to(x.dtype))


POINTS = (PointQuantizer, PackedPoint)


def make_point(name: str, spec: PointSpec, device: torch.device | str | None, packed: bool) -> nn.Module:
    """The quantizer that hangs on the model as `name`."""
    slot = name.rpartition(".")[2]
    if slot == "score_point":
        return PackedScore(spec, device) if packed else ScoreQuantizer(spec, device)
    transposed = slot in ("key_point", "value_point")
    return (PackedPoint if packed else PointQuantizer)(spec, device, transposed)


@torch.no_grad()
def packed_point(source: PointQuantizer) -> PackedPoint:
    """The packed twin."""
    device = None if source.spec.dynamic else source.base_scale.device
    kind = PackedScore if isinstance(source, ScoreQuantizer) else PackedPoint
    twin: PackedPoint = kind(source.point, device, source.transposed)
    for scale in twin.buffers():
        scale.copy_(source.scale)
    return twin.train(source.training)


def unpacked_point(source: PackedPoint) -> PointQuantizer:
    """The simulated twin, which can be trained."""
    scale = getattr(source, "scale", None)
    device = None if scale is None else scale.device
    twin = (ScoreQuantizer if isinstance(source, PackedScore) else PointQuantizer)(
        source.point, device, source.transposed
    )
    if scale is not None:
        twin.set_scale(scale)
    return twin.train(source.training)


def quantize_output(module: nn.Module, _args: Any, output: Any) -> Any:
    """The hook of norms and activations: what hangs on the module as `output_point` sees its output."""
    point: Any = module.output_point
    return point(output)
