"""The grid of one activation: scaled by each token at each call, or static and learnable after calibration."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantailor.errors import UsageError
from quantailor.numerics import affine
from quantailor.numerics.affine import checked_scale
from quantailor.numerics.lsq import gradient_scale, lsq
from quantailor.numerics.sign import fake_quantize_sign, quantize_sign
from quantailor.observers.ranges import Observer, make_observer
from quantailor.spec import Binary, Int, PerTensor, PerToken, QuantSpec


class ActivationQuantizer(nn.Module):
    """Fake-quantizes x [..., N]. Integers are symmetric: the integer product needs no correction term.

    Static: scale = base_scale * exp(log_scale), shape [1]; `observer` is set while calibrating, and the module then
    passes floats through. Dynamic: no state.
    """

    def __init__(self, spec: QuantSpec, device: torch.device | None = None) -> None:
        super().__init__()
        dynamic_ok = spec.dynamic and isinstance(spec.granularity, PerToken) and isinstance(spec.grid, Int | Binary)
        static_ok = not spec.dynamic and isinstance(spec.granularity, PerTensor) and isinstance(spec.grid, Int)
        symmetric = not isinstance(spec.grid, Int) or spec.grid.symmetric
        if not (dynamic_ok or static_ok) or not symmetric:
            raise UsageError(
                f"activations cannot be {spec.grid} {spec.granularity}; use a symmetric integer grid, "
                "per token (dynamic) or per tensor (static)"
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
        return self.base_scale * self.log_scale.exp()

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Raises: ValueError unless it is finite and positive."""
        self.base_scale.copy_(checked_scale(scale.reshape(1)))
        self.log_scale.zero_()
        self.calibrated.fill_(True)

    def start_calibration(self) -> None:
        """From now on `forward` observes and passes floats through. Does nothing where scales are dynamic."""
        if not self.spec.dynamic and isinstance(self.spec.grid, Int):
            self.observer = make_observer(self.spec.range, self.spec.grid)

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
        if self.spec.dynamic:
            return affine.fake_quantize_dynamic(x, qmin, qmax)
        g = gradient_scale(x.shape[-1], qmax)  # n of a layer's activations is its features (LSQ, section 2.2)
        return lsq(x.float(), self.scale, 0, qmin, qmax, g=g).to(x.dtype)

    @torch.no_grad()
    def integers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """int8 [..., N] and the scale, [..., 1] or [1]: what the integer product takes."""
        return quantize_activation(x, self.spec, None if self.spec.dynamic else self.scale)


def quantize_activation(x: Tensor, spec: QuantSpec, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The one place that turns an activation into integers, for the simulated and for the packed module.

    Shapes: `x` [..., N]; `scale` [1] if static, None if found from `x`. Returns int8 [..., N], scale [..., 1] or [1].
    """
    if isinstance(spec.grid, Binary):
        return quantize_sign(x)
    assert isinstance(spec.grid, Int)
    if scale is None:
        return affine.quantize_dynamic(x, spec.grid.qmin, spec.grid.qmax)
    return affine.quantize(x.float(), scale, 0, spec.grid.qmin, spec.grid.qmax), scale
