"""Other gradients than LSQ's, as quantizers that stand in for the model's own while it trains.

The stand-ins share parameters and buffers with what they replace, so that integers are decided in one place still;
`settle` puts the originals back. LSQ itself, and the balanced and sign grids, need no stand-in: they are
numerics/lsq.py through numerics/grids.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.errors import QuantailorError, UsageError
from quantailor.models.prepare import FAKE_QUANT
from quantailor.models.structure import modules_of
from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.nn.fake_quant import set_rounded
from quantailor.nn.points import PointQuantizer
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.numerics import affine, grids
from quantailor.numerics.grouping import from_groups
from quantailor.numerics.lsq import lsq_plus
from quantailor.numerics.pact import pact
from quantailor.qat.low_bits import FOLLOWS, FollowsWeight, has_grid
from quantailor.qat.settings import Settings
from quantailor.qat.twins import taking_over
from quantailor.spec import Binary, Int


class FrozenIntegers(WeightQuantizer):
    """w_hat = decode(q, scale) with q fixed: the gradient of the scale is the exact one, times LSQ's g.

    Source: Chen et al. 2024, arXiv:2407.11062, section 3.3 (end-to-end training of quantization parameters).
    """

    q: Tensor

    @staticmethod
    def of(original: WeightQuantizer, weight_ON: Tensor) -> FrozenIntegers:
        new: FrozenIntegers = taking_over(FrozenIntegers, original)
        new.register_buffer("q", original.integers(weight_ON), persistent=False)
        return new

    def _decoded(self, q_ON: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        scale = scale.detach() + (scale - scale.detach()) * self.g
        w_hat = grids.decode(self.groups(q_ON), *self.grid_of_groups(scale, zero_point), self.spec.grid)
        return from_groups(w_hat, self.in_features)

    def forward(self, weight_ON: Tensor) -> Tensor:
        if not self.enabled:
            return weight_ON
        return self._decoded(self.q, self.scale, self.zero_point).to(weight_ON.dtype)

    def rows(self, weight_ON: Tensor, index: Tensor) -> Tensor:
        if not self.enabled:
            return weight_ON[index]
        flat = index.flatten()
        scale, zero_point = (t if t.shape[0] == 1 else t[flat] for t in (self.scale, self.zero_point))
        return self._decoded(self.q[flat], scale, zero_point).to(weight_ON.dtype).unflatten(0, index.shape)

    @torch.no_grad()
    def integers(self, weight_ON: Tensor) -> Tensor:
        return self.q


class StraightThrough(WeightQuantizer):
    """Clipped STE: gradient 1 where the rounded weight lies on the grid, 0 where it was clipped; scales stay."""

    def _on_grid(self, w: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        if isinstance(self.spec.grid, Int):
            return affine.fake_quantize(w, scale, zero_point, self.spec.grid.qmin, self.spec.grid.qmax)
        return grids.fake_quantize(w, scale, zero_point, self.spec.grid, self.g)

    def forward(self, weight_ON: Tensor) -> Tensor:
        if not self.enabled:
            return weight_ON
        w = self.groups(weight_ON.float())
        w_hat = self._on_grid(w, *self.grid_of_groups(self.scale.detach(), self.zero_point))
        return from_groups(w_hat, self.in_features).to(weight_ON.dtype)

    def rows(self, weight_ON: Tensor, index: Tensor) -> Tensor:
        if not self.enabled:
            return weight_ON[index]
        flat = index.flatten()
        scale, zero_point = (t if t.shape[0] == 1 else t[flat] for t in (self.scale.detach(), self.zero_point))
        w_hat = self._on_grid(self.groups(weight_ON[flat].float()), *self.grid_of_groups(scale, zero_point))
        return from_groups(w_hat, self.in_features).to(weight_ON.dtype).unflatten(0, index.shape)


class LearnedZeroPoint(WeightQuantizer):
    """LSQ+: the zero point of an asymmetric grid is learned, as z = start + (qmax - qmin) * zero_shift, rounded.

    Parameter `zero_shift` [O, G, 1] in ranges of the grid, so that a step of it is of the size of a step of a
    log-scale; buffer `start`. The buffer `zero_point` follows at each forward.
    """

    zero_shift: nn.Parameter
    start: Tensor

    @staticmethod
    def of(original: WeightQuantizer) -> LearnedZeroPoint:
        new: LearnedZeroPoint = taking_over(LearnedZeroPoint, original)
        new.register_buffer("start", original.zero_point.float(), persistent=False)
        new.zero_shift = nn.Parameter(torch.zeros_like(original.log_scale))
        return new

    def learned(self) -> Tensor:
        """The real zero point [O, G, 1], within the grid. The buffer of integers is set from it."""
        qmin, qmax, _ = grids.limits(self.spec.grid)
        z = (self.start + (qmax - qmin) * self.zero_shift).clamp(qmin, qmax)
        with torch.no_grad():
            self.zero_point.copy_(torch.round(z))
        return z

    def forward(self, weight_ON: Tensor) -> Tensor:
        if not self.enabled:
            return weight_ON
        qmin, qmax, _ = grids.limits(self.spec.grid)
        w = self.groups(weight_ON.float())
        w_hat = lsq_plus(w, *self.grid_of_groups(self.scale, self.learned()), qmin, qmax, g=self.g)
        return from_groups(w_hat, self.in_features).to(weight_ON.dtype)

    def rows(self, weight_ON: Tensor, index: Tensor) -> Tensor:
        return self(weight_ON)[index]


class StraightThroughInput(ActivationQuantizer):
    """Static ranges that stay, clipped STE."""

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None or not self.enabled:
            return super().forward(x)
        assert isinstance(self.spec.grid, Int)
        qmin, qmax = self.spec.grid.qmin, self.spec.grid.qmax
        return affine.fake_quantize(x.float(), self.scale.detach(), 0, qmin, qmax).to(x.dtype)


class PACTInput(ActivationQuantizer):
    """Static ranges learned as clipping levels (numerics/pact.py)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None or not self.enabled:
            return super().forward(x)
        assert isinstance(self.spec.grid, Int)
        return pact(x.float(), self.scale, self.spec.grid.qmin, self.spec.grid.qmax).to(x.dtype)

    def level(self) -> Tensor:
        """alpha [1], in units of the input."""
        assert isinstance(self.spec.grid, Int)
        return self.scale * self.spec.grid.qmax


def _is_static(quantizer: Any) -> bool:
    return (
        isinstance(quantizer, ActivationQuantizer)
        and not quantizer.spec.dynamic
        and isinstance(quantizer.spec.grid, Int)
    )


def _weight_stand_in(settings: Settings) -> Callable[[WeightQuantizer, Any], WeightQuantizer | None]:
    """What stands in for the quantizer of a layer's weight; None where it stays itself."""

    def make(quantizer: WeightQuantizer, layer: Any) -> WeightQuantizer | None:
        if settings.trains == "scales":
            return FrozenIntegers.of(quantizer, layer.weight_ON) if quantizer.log_scale.requires_grad else None
        if settings.gradient in FOLLOWS:
            kind, grid, _ = FOLLOWS[settings.gradient]
            return kind.of(quantizer, layer.weight) if has_grid(layer, grid) else None
        if settings.gradient == "binaryconnect" and not has_grid(layer, Binary):
            return None
        if settings.gradient in ("ste", "pact", "binaryconnect"):
            new: StraightThrough = taking_over(StraightThrough, quantizer)
            return new
        if settings.gradient == "lsq+" and quantizer.is_asymmetric:
            return LearnedZeroPoint.of(quantizer)
        return None

    return make


class StandIns:
    """The quantizers that stand in during one run, and what they stand for."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.layers = [(name, m) for name, m in modules_of(model, FAKE_QUANT)]
        self.learned_points = any(m.point.learned for _, m in modules_of(model, PointQuantizer))
        self.replaced: list[tuple[nn.Module, str, nn.Module]] = []
        self.stopped: list[nn.Parameter] = []
        made: dict[int, nn.Module | None] = {}
        weights = _weight_stand_in(settings)
        inputs = {"ste": StraightThroughInput, "pact": PACTInput}.get(settings.gradient)
        for _, layer in self.layers:
            for slot in ("weight_quantizer", "input_quantizer", "output_quantizer"):
                old = getattr(layer, slot)
                if id(old) not in made:
                    new: nn.Module | None = None
                    if isinstance(old, WeightQuantizer):
                        new = weights(old, layer)
                    elif inputs is not None and _is_static(old):
                        new = taking_over(inputs, old)
                    made[id(old)] = new
                if (stand_in := made[id(old)]) is not None:
                    self.replaced.append((layer, slot, old))
                    setattr(layer, slot, stand_in)
        self.kinds = {type(new) for new in made.values() if new is not None}
        for new in made.values():
            if isinstance(new, StraightThrough | StraightThroughInput | FollowsWeight):
                self._stop(new)

    def check(self, gradient: str) -> None:
        """Raises: UsageError where the model has nothing that this gradient is about, or learns by another."""
        if gradient in ("ste", "pact") and self.learned_points:
            raise UsageError(
                f"points with learned scales learn by LSQ, and gradient={gradient!r} is another; use gradient='lsq', "
                "or points with -static"
            )
        if gradient == "pact" and PACTInput not in self.kinds:
            raise UsageError(
                "gradient='pact' learns where static inputs are clipped, and this scheme has none; use a scheme with "
                "-static, or gradient='lsq'"
            )
        if gradient == "lsq+" and LearnedZeroPoint not in self.kinds:
            raise UsageError(
                "gradient='lsq+' learns zero points, and this scheme has none; use a scheme with -asym, or "
                "gradient='lsq'"
            )
        grids_of = {name: (kind, scheme) for name, (kind, _, scheme) in FOLLOWS.items()}
        kind, scheme = {**grids_of, "binaryconnect": (StraightThrough, "w1a16")}.get(gradient, (None, ""))
        if kind is not None and kind not in self.kinds:
            raise UsageError(
                f"gradient={gradient!r} is for weights like those of {scheme}, and this scheme has none; use such a "
                "scheme, or gradient='lsq'"
            )

    def _stop(self, quantizer: Any) -> None:
        if quantizer.log_scale.requires_grad:
            quantizer.log_scale.requires_grad_(False)
            self.stopped.append(quantizer.log_scale)

    def settle(self) -> None:
        """What the stand-ins learned becomes the originals' own: zero points, and weights whose integers are those
        that were frozen. Raises: QuantailorError if a weight cannot have its integers."""
        for name, layer in self.layers:
            stand_in = layer.weight_quantizer
            if isinstance(stand_in, LearnedZeroPoint):
                stand_in.learned()
            if isinstance(stand_in, FollowsWeight):
                stand_in.settle(self._original(layer))
            if isinstance(stand_in, FrozenIntegers):
                q = stand_in.q
                layer.weight_quantizer = self._original(layer)
                set_rounded(layer, q)
                if not torch.equal(layer.weight_quantizer.integers(layer.weight_ON), q):
                    raise QuantailorError(f"{name}: its float weight cannot express its integers at the learned scales")

    def _original(self, layer: nn.Module) -> Any:
        return next(old for owner, slot, old in self.replaced if owner is layer and slot == "weight_quantizer")

    def leave(self) -> None:
        """Put the originals back."""
        for layer, slot, old in self.replaced:
            setattr(layer, slot, old)
        for parameter in self.stopped:
            parameter.requires_grad_(True)


@contextmanager
def stand_ins(model: nn.Module, settings: Settings) -> Iterator[StandIns]:
    """Stand-ins for the block; the originals are back after it. Call `settle` in it where the result is kept.

    Raises: UsageError where the model has nothing that the gradient is about.
    """
    standing = StandIns(model, settings)
    try:
        standing.check(settings.gradient)
        yield standing
    finally:
        standing.leave()


def clipping_penalty(model: nn.Module) -> Tensor | None:
    """Sum of the squares of PACT's clipping levels, 0-d; None without any."""
    levels = [m.level() for m in model.modules() if isinstance(m, PACTInput)]
    return torch.cat(levels).square().sum() if levels else None
