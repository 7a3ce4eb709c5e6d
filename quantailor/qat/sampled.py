"""What is looked at of a layer while it trains: some whole rows of its weight, the same ones all the time.

    error      ||w - w_hat|| / ||w||
    clip       share of weights beyond the outermost levels by more than half a step
    flips      share of weights whose integer this step changed
    reversals  share of weights whose integer has changed since the last look, the other way than the last time
    drift      mean of log(scale / scale at the start);   drift_peak: the largest of its magnitudes
    update     ||w - w before the step|| / ||w||
    rms, peak  of the weights: root mean square, and the largest magnitude over it

Whole rows, spread evenly: any layout of groups can be read from them, and at most a few thousand weights are touched
where a layer has millions. Reversals are Nagel et al. 2022, arXiv:2203.11086, Eq. 4, over looks instead of steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.numerics import grids
from quantailor.numerics.affine import learned_scale
from quantailor.numerics.grouping import from_groups, to_groups
from quantailor.numerics.oscillation import jumps
from quantailor.qat.quantizers import FrozenIntegers
from quantailor.spec import NF4

MEASURES = ("error", "clip", "flips", "reversals", "drift", "drift_peak", "update", "rms", "peak")
_WEIGHTS, _LEAST_ROWS = 8192, 8  # how many weights of a layer are looked at, and in at least how many rows
LEVELS = 16  # bins of the distribution over the grid at most


class Sampled:
    """The rows of one layer. `begin` before a step and `end` after it give what the step did.

    What is kept between looks, and by checkpoints: the integers of the last look and the direction each last went,
    int16 and int8 [K, N].
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        weight = layer.weight_ON if hasattr(layer, "weight_ON") else layer.weight.flatten(1)
        out, columns = weight.shape
        rows = min(out, max(_LEAST_ROWS, _WEIGHTS // columns))
        self.index = torch.linspace(0, out - 1, rows, device=weight.device).long()
        self.start = self._log_scale()
        self.before: tuple[Tensor, Tensor | None] | None = None
        self.last: Tensor | None = None
        self.direction: Tensor | None = None
        if (q := self._read()[1]) is not None:
            self.last, self.direction = q.short(), torch.zeros_like(q, dtype=torch.int8)

    @torch.no_grad()
    def begin(self) -> None:
        """Before the optimizer's step."""
        self.before = self._read()

    @torch.no_grad()
    def end(self) -> dict[str, Tensor]:
        """After it: name -> 0-d tensor, of those of `MEASURES` that this layer has."""
        assert self.before is not None
        w, q = self._read()
        w_before, q_before = self.before
        self.before = None
        size = torch.linalg.vector_norm(w)
        rms = size / w.numel() ** 0.5
        found = {"update": torch.linalg.vector_norm(w - w_before) / size, "rms": rms, "peak": w.abs().amax() / rms}
        if q is None:
            return found
        assert q_before is not None and self.last is not None and self.direction is not None
        quantizer: WeightQuantizer = self.layer.weight_quantizer
        scale, zero_point = self._grid(quantizer)
        size_g, grid = quantizer.spec.group_size, quantizer.spec.grid
        w_hat = from_groups(grids.decode(to_groups(q, size_g), scale, zero_point, grid), w.shape[1])
        sign, reversed_ = jumps(q, self.last, self.direction)
        self.last, self.direction = q.short(), torch.where(sign != 0, sign, self.direction)
        found |= {
            "error": torch.linalg.vector_norm(w - w_hat) / size,
            "flips": (q != q_before).float().mean(),
            "reversals": reversed_.float().mean(),
        }
        if not isinstance(grid, NF4):  # whose outer levels are the largest element itself
            qmin, qmax, offset = grids.limits(grid)
            steps = to_groups(w, size_g) / scale - offset + zero_point
            outside = from_groups((steps < qmin - 0.5) | (steps > qmax + 0.5), w.shape[1])
            found["clip"] = outside.float().mean()
        now = self._log_scale()
        if now is not None and self.start is not None:
            found |= {"drift": (now - self.start).mean(), "drift_peak": (now - self.start).abs().amax()}
        return found

    @torch.no_grad()
    def levels(self) -> Tensor | None:
        """The share of weights on each level of the grid, or in each of `LEVELS` equal bins of a finer one."""
        q = self._read()[1]
        if q is None:
            return None
        qmin, qmax, _ = grids.limits(self.layer.weight_quantizer.spec.grid)
        count = min(LEVELS, qmax - qmin + 1)
        bins = (q.long() - qmin) * count // (qmax - qmin + 1)
        return torch.bincount(bins.flatten(), minlength=count).float() / q.numel()

    def _read(self) -> tuple[Tensor, Tensor | None]:
        """(weights float32 [K, N], their integers int8 or uint8 [K, N]; None where no grid is on)."""
        weight = self.layer.weight_ON if hasattr(self.layer, "weight_ON") else self.layer.weight.flatten(1)
        w = weight.detach()[self.index].float()
        quantizer = self._quantizer()
        if quantizer is None:
            return w, None
        if isinstance(quantizer, FrozenIntegers):
            return w, quantizer.q[self.index]
        scale, zero_point = self._grid(quantizer)
        q = grids.encode(to_groups(w, quantizer.spec.group_size), scale, zero_point, quantizer.spec.grid)
        return w, from_groups(q, w.shape[1])

    def _quantizer(self) -> WeightQuantizer | None:
        quantizer: WeightQuantizer | None = getattr(self.layer, "weight_quantizer", None)
        return quantizer if quantizer is not None and quantizer.enabled else None

    def _log_scale(self) -> Tensor | None:
        quantizer = self._quantizer()
        return None if quantizer is None else self._of_rows(quantizer.log_scale.detach()).clone()

    def _grid(self, quantizer: WeightQuantizer) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the rows: picked first, since a grid of small groups has many."""
        scale = learned_scale(self._of_rows(quantizer.base_scale), self._of_rows(quantizer.log_scale.detach()))
        return scale, self._of_rows(quantizer.zero_point)

    def _of_rows(self, tensor: Tensor) -> Tensor:
        """Rows of a [O, G, 1] grid's tensor; a grid of one scale has no rows to choose from."""
        return tensor if tensor.shape[0] == 1 else tensor[self.index]
