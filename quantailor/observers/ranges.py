"""Observers: data goes by, a range comes out.

`observe(x, mask)` is called once a batch; `range()` then gives (low, high), and `scale_zero_point(grid)` what the
grid needs. Rows that the mask rules out (padding) never count. A batch with a NaN or an infinity is left out and
counted; more than 1 % of such batches is an error, because the ranges of a broken model mean nothing.

Sources: min-max and moving average: Nagel et al. 2021, arXiv:2106.08295, section 3.1; Jacob et al. 2018,
arXiv:1712.05877, section 3.1 (EMA). Percentile: Wu et al. 2020, arXiv:2004.09602, section 4 (of absolute values). KL:
Migacz, "8-bit Inference with TensorRT", GTC 2017. MSE: minimizes ||x - x_hat||^2 over the range, on a histogram.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    """Counts of values in equal bins over a range that widens as needed; the base of percentile, MSE and KL.

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

    def magnitudes(self) -> tuple[Tensor, float]:
        """(counts of |x| in bins from 0 outwards, [num_bins / 2]; a bin's width)."""
        half = self.num_bins // 2
        return self.counts[half:] + self.counts[:half].flip(0), self.width / half

    def _clipped(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """The part of [-threshold, threshold] that data reached."""
        return torch.maximum(-threshold.float(), self.low), torch.minimum(threshold.float(), self.high)

    def _range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high


class Percentile(Histogram):
    """The range that leaves `100 - percentile` % of the values outside: of absolute values on a symmetric grid, which
    reaches as far on either side; else half of them on each side."""

    def __init__(self, percentile: float = 99.99, num_bins: int = 4096, symmetric: bool = False) -> None:
        super().__init__(num_bins)
        if not 50 < percentile <= 100:
            raise UsageError(f"percentile={percentile} must lie in (50, 100]; 99.99 is usual")
        self.percentile, self.symmetric = percentile, symmetric

    def _range(self) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            counts, width = self.magnitudes()
            covered = counts.cumsum(0) / counts.sum()
            bins = int(torch.searchsorted(covered, self.percentile / 100 - 1e-12)) + 1
            return self._clipped(torch.tensor(bins * width))
        cumulative = self.counts.cumsum(0) / self.counts.sum()
        tail = (1 - self.percentile / 100) / 2
        edges = torch.arange(self.num_bins + 1, dtype=torch.float64) * (2 * self.width / self.num_bins) - self.width
        first = int(torch.searchsorted(cumulative, tail, right=True))
        last = int(torch.searchsorted(cumulative, 1 - tail - 1e-12))
        low = torch.maximum(edges[first].float(), self.low)
        high = torch.minimum(edges[min(last + 1, self.num_bins)].float(), self.high)
        return low, high


class MSE(Histogram):
    """The range with the least squared error on `grid`, searched over ratios 1 to 0.2 of the min-max range."""

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


class KL(Histogram):
    """The threshold at which the clipped distribution and its `levels`-step quantization differ least.

    P is the histogram of |x| up to a candidate bin, what lies beyond counted into its last bin; Q the same bins without
    what lies beyond, merged into `levels` runs, each run's count spread evenly over its bins that are not empty. The
    candidate of least sum P log(P / Q) wins; where Q is empty and P is not it is infinite, so a threshold lies where
    there is data. Exact zeros are left out: they lie on every grid, and behind a ReLU they would decide alone.
    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017, "Entropy Calibration - pseudocode" (levels = 128).
    """

    def __init__(self, grid: Int | None = None, num_bins: int = 4096) -> None:
        super().__init__(num_bins)
        grid = grid or Int(8)
        self.levels = (grid.qmax - grid.qmin + 1) // 2
        if self.levels > num_bins // 4:
            raise UsageError(f"num_bins={num_bins} are too few for {self.levels} levels; use 4096")

    def _fold(self, values: Tensor) -> None:
        if len(values := values[values != 0]):
            super()._fold(values)

    def _range(self) -> tuple[Tensor, Tensor]:
        counts, width = self.magnitudes()
        if not bool(counts.any()):
            return torch.zeros(()), torch.zeros(())
        used = int(counts.nonzero().max()) + 1
        if used <= self.levels:
            return self.low, self.high
        bins = torch.arange(self.levels, used + 1)
        best = int(bins[divergences(counts, bins, self.levels).argmin()])
        # The middle of the bin after the last, as the source has it; the whole range where that is all of the data.
        return self._clipped(torch.tensor((best + 0.5) * width)) if best < used else (self.low, self.high)


def divergences(counts: Tensor, bins: Tensor, levels: int) -> Tensor:
    """KL(P || Q) of keeping the first `bins` [C] of a histogram `counts` [B], for each candidate: [C] float64.

    Within a run Q is constant, so that sums over runs are all that is needed:
    sum P log(P / Q) = sum P log P - sum_runs P(run) log(count(run) / (filled(run) * count(all runs))).
    """
    counts = counts.double()
    below = F.pad(counts.cumsum(0), (1, 0))  # sums of the bins before each, [B + 1]
    filled = F.pad((counts > 0).double().cumsum(0), (1, 0))
    entropy = F.pad(torch.special.xlogy(counts, counts).cumsum(0), (1, 0))
    total, last, kept = below[-1], counts[bins - 1], below[bins]
    beyond = total - kept
    runs = torch.arange(levels + 1)
    edges = -(-runs * bins[:, None] // levels)  # run k holds the bins j with floor(j * levels / bins) = k
    in_run = below[edges].diff(dim=1)
    p_run = in_run.clone()
    p_run[:, -1] += beyond
    q = in_run / (filled[edges].diff(dim=1).clamp(min=1) * kept[:, None])
    of_p = entropy[bins] - torch.special.xlogy(last, last) + torch.special.xlogy(last + beyond, last + beyond)
    result = (of_p - torch.special.xlogy(p_run, q).sum(1)) / total - total.log()
    return torch.where((last == 0) & (beyond > 0), torch.inf, result)


def make_observer(method: RangeMethod, grid: Int, percentile: float = 99.99) -> Observer:
    """The observer that a spec's `range` names; `histogram` is another name of `kl`."""
    match method:
        case "minmax":
            return MinMax()
        case "ema":
            return EMA()
        case "percentile":
            return Percentile(percentile, symmetric=grid.symmetric)
        case "mse":
            return MSE(grid)
        case "kl" | "histogram":
            return KL(grid)
