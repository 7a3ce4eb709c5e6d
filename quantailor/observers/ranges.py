"""Observers: data goes by, a range comes out.

`observe(x, mask)` is called once a batch; `range()` then gives (low, high), and `scale_zero_point(grid)` what the
grid needs. Rows that the mask rules out (padding) never count. A batch with a NaN or an infinity is left out and
counted; more than 1 % of such batches is an error, because the ranges of a broken model mean nothing.

Sources: min-max and moving average: Nagel et al. 2021, arXiv:2106.08295, section 3.1; Jacob et al. 2018,
arXiv:1712.05877, section 3.1 (EMA). MSE: minimizes ||x - x_hat||^2 over the range, on a histogram.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantailor.errors import UntrustedInput, UsageError
from quantailor.numerics import affine
from quantailor.spec import Int, RangeMethod


def rows_that_count(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` [..., N] -> its rows [T, N], without those that `mask`, of `x`'s leading axes, rules out.

    Rows that the model has flattened are still its rows; a mask of other rows (of tokens, where `x` is pooled) counts
    for nothing.
    """
    if mask is not None and mask.dim() < x.dim() and mask.shape == x.shape[: mask.dim()]:
        x = x[mask.bool()]
    elif mask is not None and x.dim() == 2 and mask.numel() == len(x):
        x = x[mask.flatten().bool()]
    return x.reshape(-1, x.shape[-1])


class Observer:
    """Base: per-tensor statistics. Subclasses fold a batch's values [n] into their state."""

    def __init__(self) -> None:
        self.batches = 0
        self.rejected = 0

    def observe(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Fold one batch in. `x` [..., N]; `mask` [...] of its rows, true where one counts."""
        values = rows_that_count(x.detach(), mask).float().flatten()
        if not values.numel():
            return
        self.batches += 1
        if not bool(torch.isfinite(values).all()):
            self.rejected += 1
            return
        self._fold(values)

    def range(self) -> tuple[Tensor, Tensor]:
        """(low, high), 0-d float32. Raises: UntrustedInput if none was seen or over 1 % of batches not finite."""
        if self.rejected > 0.01 * self.batches:
            raise UntrustedInput(
                f"{self.rejected} of {self.batches} calibration batches held NaN or Inf activations (limit 1 %); "
                "check the model in float on this data"
            )
        if not self.batches:
            raise UntrustedInput("an observer saw no data; calibrate with at least one sample that reaches this layer")
        return self._range()

    def scale_zero_point(self, grid: Int) -> tuple[Tensor, Tensor]:
        """Scale and zero point (0-d) for this grid."""
        low, high = self.range()
        return affine.scale_zero_point(low, high, grid.qmin, grid.qmax, grid.symmetric)

    def _fold(self, values: Tensor) -> None:
        raise NotImplementedError

    def _range(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class MinMax(Observer):
    """The smallest and largest value ever seen."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def _fold(self, values: Tensor) -> None:
        self.low = torch.minimum(self.low, values.min().cpu())
        self.high = torch.maximum(self.high, values.max().cpu())

    def _range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high


class EMA(Observer):
    """An exponential moving average of each batch's smallest and largest value; the first batch starts it."""

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        self.decay = decay
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def _fold(self, values: Tensor) -> None:
        low, high = values.min().cpu(), values.max().cpu()
        self.low = low if self.low is None else torch.lerp(low, self.low, self.decay)
        self.high = high if self.high is None else torch.lerp(high, self.high, self.decay)

    def _range(self) -> tuple[Tensor, Tensor]:
        assert self.low is not None and self.high is not None  # a batch was seen, or `range` had raised
        return self.low, self.high


class Histogram(Observer):
    """Counts of values in equal bins over a range that widens as needed; the base of percentile and MSE.

    When a batch falls outside, the range is doubled (each pair of bins becomes one), so counts stay exact and only
    the resolution changes. Bins run from -width to +width.
    """

    def __init__(self, num_bins: int = 4096) -> None:
        super().__init__()
        if num_bins % 4:
            raise UsageError(f"num_bins={num_bins} must be a multiple of 4, so that bins merge in pairs around 0")
        self.num_bins = num_bins
        self.width = 0.0
        self.counts = torch.zeros(num_bins, dtype=torch.float64)
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def _fold(self, values: Tensor) -> None:
        largest = float(values.abs().max())
        if self.width == 0.0 and largest > 0:
            self.counts[self.num_bins // 2] += self.counts.sum() - self.counts[self.num_bins // 2]  # zeros so far
            self.width = largest
        while largest > self.width:
            half = self.counts.unflatten(0, (-1, 2)).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[self.num_bins // 4 : self.num_bins // 4 * 3] = half
            self.width *= 2
        if self.width == 0.0:
            self.counts[self.num_bins // 2] += values.numel()
        else:
            self.counts += torch.histc(values.cpu(), self.num_bins, -self.width, self.width).double()
        self.low = torch.minimum(self.low, values.min().cpu())
        self.high = torch.maximum(self.high, values.max().cpu())

    @property
    def centers(self) -> Tensor:
        """Middle of each bin, [num_bins]."""
        return (torch.arange(self.num_bins, dtype=torch.float64) + 0.5) * (2 * self.width / self.num_bins) - self.width

    def _range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high


class Percentile(Histogram):
    """The range that leaves `100 - percentile` % of the values outside, half of them on each side."""

    def __init__(self, percentile: float = 99.99, num_bins: int = 4096) -> None:
        super().__init__(num_bins)
        if not 50 < percentile <= 100:
            raise UsageError(f"percentile={percentile} must lie in (50, 100]; 99.99 is usual")
        self.percentile = percentile

    def _range(self) -> tuple[Tensor, Tensor]:
        cumulative = self.counts.cumsum(0) / self.counts.sum()
        tail = (1 - self.percentile / 100) / 2
        edges = torch.arange(self.num_bins + 1, dtype=torch.float64) * (2 * self.width / self.num_bins) - self.width
        first = int(torch.searchsorted(cumulative, tail, right=True))
        last = int(torch.searchsorted(cumulative, 1 - tail - 1e-12))
        low = torch.maximum(edges[first].float(), self.low)
        high = torch.minimum(edges[min(last + 1, self.num_bins)].float(), self.high)
        return low, high


class MSE(Histogram):
    """The range with the least squared error on `grid`, by a search over clip ratios of the min-max range."""

    def __init__(self, grid: Int | None = None, num_bins: int = 4096, num_ratios: int = 100) -> None:
        super().__init__(num_bins)
        self.grid = grid or Int(8)
        self.num_ratios = num_ratios

    def _range(self) -> tuple[Tensor, Tensor]:
        x, counts = self.centers.float(), self.counts.float()
        ratios = torch.linspace(1.0, 0.2, self.num_ratios)
        scale, zero_point = affine.scale_zero_point(
            self.low * ratios, self.high * ratios, self.grid.qmin, self.grid.qmax, self.grid.symmetric
        )
        q = affine.quantize(x, scale[:, None], zero_point[:, None], self.grid.qmin, self.grid.qmax)
        x_hat = affine.dequantize(q, scale[:, None], zero_point[:, None])
        best = int(((x - x_hat).square() * counts).sum(1).argmin())
        return self.low * ratios[best], self.high * ratios[best]


def make_observer(method: RangeMethod, grid: Int) -> Observer:
    """The observer that a spec's `range` names. `histogram` searches the squared error like `mse`, with finer bins."""
    match method:
        case "minmax":
            return MinMax()
        case "ema":
            return EMA()
        case "percentile":
            return Percentile()
        case "mse":
            return MSE(grid)
        case "histogram":
            return MSE(grid, num_bins=16384, num_ratios=400)
