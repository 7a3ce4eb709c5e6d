"""The grid of one activation: scaled by each token at each call, or static and learnable after calibration.

LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339, section 3.2): input columns in which any row of a call holds a
magnitude at or above the threshold are not quantized; the others get a scale a token that these columns no longer
stretch. As in the paper and in bitsandbytes the choice is the whole call's: a row's result depends on the rows that it
is computed with, padding included; a batch of one may take fewer columns out, and generation chooses anew each token.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor, nn

from quantailor.errors import UsageError
from quantailor.kernels import passes
from quantailor.kernels.ops import IntegerInput
from quantailor.numerics import affine
from quantailor.numerics.affine import checked_scale, learned_scale
from quantailor.numerics.lsq import gradient_scale, lsq
from quantailor.numerics.sign import fake_quantize_sign, quantize_sign
from quantailor.observers.ranges import Observer, make_observer
from quantailor.spec import Binary, Int, PerGroup, PerTensor, PerToken, QuantSpec


class ActivationQuantizer(nn.Module):
    """Fake-quantizes x [..., N]. Integers are symmetric: the integer product needs no correction term.

    Static: scale = base_scale * exp(log_scale), shape [1]; `observer` is set while calibrating, and the module then
    passes floats through. Dynamic: no state.
    """

    def __init__(self, spec: QuantSpec, device: torch.device | None = None) -> None:
        super().__init__()
        per_token = isinstance(spec.granularity, PerToken) and isinstance(spec.grid, Int | Binary)
        per_group = isinstance(spec.granularity, PerGroup) and isinstance(spec.grid, Int)
        dynamic_ok = spec.dynamic and (per_token or per_group)
        static_ok = not spec.dynamic and isinstance(spec.granularity, PerTensor) and isinstance(spec.grid, Int)
        symmetric = not isinstance(spec.grid, Int) or spec.grid.symmetric
        if not (dynamic_ok or static_ok) or not symmetric:
            raise UsageError(
                f"activations cannot be {spec.grid} {spec.granularity}; use a symmetric integer grid, "
                "per token or group (dynamic) or per tensor (static)"
            )
        self.spec = spec
        self.enabled = True
        self.observer: Observer | None = None
        self.mask: Tensor | None = None
        if not spec.dynamic:
            self.log_scale = nn.Parameter(torch.zeros(1, device=device))
            self.base_scale: Tensor
            self.calibrated: Tensor
            self.register_buffer("base_scale", torch.ones(1, device=device))
            self.register_buffer("calibrated", torch.zeros(1, dtype=torch.bool, device=device))

    @property
    def scale(self) -> Tensor:
        """[1], static only."""
        return learned_scale(self.base_scale, self.log_scale)

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Raises: ValueError unless it is finite and positive."""
        self.base_scale.copy_(checked_scale(scale.reshape(1)))
        self.log_scale.zero_()
        self.calibrated.fill_(True)

    def start_calibration(self) -> None:
        """From now on `forward` observes and passes floats through. Does nothing where scales are dynamic."""
        if not self.spec.dynamic and isinstance(self.spec.grid, Int):
            self.observer = make_observer(self.spec.range, self.spec.grid, self.spec.percentile)

    def finish_calibration(self) -> None:
        """Set the scale from what was seen. Raises: UntrustedInput if that was nothing, or not finite."""
        if self.observer is not None and isinstance(self.spec.grid, Int):
            scale, _ = self.observer.scale_zero_point(self.spec.grid)
            self.set_scale(scale.to(self.base_scale.device))
            self.observer = None

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.observe(x, self.mask)
            return x
        if not self.enabled:
            return x
        if isinstance(self.spec.grid, Binary):
            return fake_quantize_sign(x)
        assert isinstance(self.spec.grid, Int)
        qmin, qmax = self.spec.grid.qmin, self.spec.grid.qmax
        if self.spec.dynamic and self.spec.outliers is None and self.spec.group_size is None:
            return affine.fake_quantize_dynamic(x, qmin, qmax)
        if self.spec.dynamic:
            return affine.straight_through(x, self.integers(x).dequantize().to(x.dtype))
        g = gradient_scale(x.shape[-1], qmax)  # n of a layer's activations is its features (LSQ, section 2.2)
        return lsq(x.float(), self.scale, 0, qmin, qmax, g=g).to(x.dtype)

    def carrier(self, x: Tensor) -> Tensor:
        """What carries the gradient past an integer product: `x` itself where the range follows it, so that its
        gradient is the identity and nothing has to be kept; else `forward`."""
        return x if self.spec.dynamic and isinstance(self.spec.grid, Int) else self.forward(x)

    @torch.no_grad()
    def integers(self, x: Tensor) -> IntegerInput:
        """What the integer product takes, of `x` [..., N]; layers given one tensor in turn share its integers."""
        return shared(x, self.spec) if self.spec.dynamic else quantize_activation(x, self.spec, self.scale)


class _Last(threading.local):
    """The integers of the tensor that was quantized last: q, k and v, or gate and up, are given the same one."""

    x: weakref.ref[Tensor] | None = None
    version = -1
    spec: QuantSpec | None = None
    integers: IntegerInput | None = None


_last = _Last()


def shared(x: Tensor, spec: QuantSpec) -> IntegerInput:
    """`quantize_activation` without a static scale, once for layers in a row that are given the very same tensor.

    The integers are let go of together with the tensor.
    """
    if torch.compiler.is_compiling() or x.is_inference():  # a compiler finds the repetition itself; no version to see
        return quantize_activation(x, spec, None)
    known = _last.x() if _last.x is not None else None
    if known is x and _last.version == x._version and _last.spec == spec and _last.integers is not None:
        return _last.integers
    integers = quantize_activation(x, spec, None)
    last = _last
    here = weakref.ref(x, lambda gone: _forget(last, gone))
    _last.x, _last.version, _last.spec, _last.integers = here, x._version, spec, integers
    return integers


def _forget(last: _Last, gone: weakref.ref[Tensor]) -> None:
    if last.x is gone:
        last.x = last.integers = None


def quantize_activation(x: Tensor, spec: QuantSpec, scale: Tensor | None) -> IntegerInput:
    """The one place that turns an activation into integers, for the simulated and for the packed module.

    Shapes: `x` [..., N]; `scale` [1] if static, None if found from `x`.
    """
    if isinstance(spec.grid, Binary):
        return IntegerInput(*quantize_sign(x))
    assert isinstance(spec.grid, Int)
    qmin, qmax = spec.grid.qmin, spec.grid.qmax
    if scale is not None:
        return IntegerInput(affine.quantize(x.float(), scale, 0, qmin, qmax), scale)
    if spec.outliers is None and spec.group_size is None:
        return IntegerInput(*passes.quantize_tokens(x, qmin, qmax))
    if spec.outliers is None:
        return IntegerInput(*affine.quantize_dynamic(x, qmin, qmax, spec.group_size), spec.group_size)
    values = x.detach().float()
    columns = affine.outlier_columns(values, spec.outliers)
    q, scale = affine.quantize_dynamic(values.index_fill(-1, columns, 0.0), qmin, qmax)
    return IntegerInput(q, scale, None, columns, values.index_select(-1, columns))


def gradient_carrier(x: Tensor, spec: QuantSpec, scale: Tensor | None) -> Tensor:
    """What carries the gradient of `x` past its quantizer: `x` itself where the range follows it, else a tensor whose
    gradient stops where the range clips. Scales do not train here. Shapes as in `quantize_activation`."""
    if isinstance(spec.grid, Binary):
        return fake_quantize_sign(x)
    if scale is None:
        return x
    assert isinstance(spec.grid, Int)
    return affine.fake_quantize(x.float(), scale, 0, spec.grid.qmin, spec.grid.qmax).to(x.dtype)


def fake_quantized_activation(x: Tensor, spec: QuantSpec, scale: Tensor | None) -> Tensor:
    """The value of `quantize_activation`, with the gradient of `gradient_carrier`."""
    if isinstance(spec.grid, Binary) or scale is not None:
        return gradient_carrier(x, spec, scale)
    return affine.straight_through(x, quantize_activation(x, spec, None).dequantize().to(x.dtype))
