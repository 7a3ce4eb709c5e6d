"""AdaRound: learn for each weight whether it is rounded up or down, by descent on the layer's output error.

    W_hat = low + h(V) (high - low),   h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)            Eq. 22, 23
    L(V)  = ||W X - W_hat X||^2 + lambda sum (1 - |2 h(V) - 1|^beta)                                   Eq. 21, 24

`low` and `high` are the two levels of the grid around a weight; one beyond the last level stays on it. Scales are
searched beforehand, as in gptq.py. V starts where W_hat = W; the regularizer is off for a warm-up, then beta falls from
20 to 2 and drives every h to 0 or 1.

The first term is a quadratic of H = X X^T alone, so each step sees *all* calibration rows at once and no activations
are kept: with D = W_hat - W its value is tr(D H D^T) and its gradient 2 D H. Where the input in the float model is
known, X_float, the target is W X_float (their Eq. 25, without the activation function): the quadratic is the same with
the term 2 tr(D (H - X X_float^T) W^T) more, a constant added to the gradient.

Rows of W do not meet in L. Each is divided by the mean over its weights of step^2 H_jj, what one rounding weighs, so
that lambda means the same in every layer, and one whose hard rounding ends above rounding to nearest goes back to that.

Source: Nagel et al. 2020, arXiv:2004.10568. Different here: Adam on the whole quadratic, 300 steps at a rate to match,
for 10,000 of batches; a thousand bring the output's error down by 1 % more. lambda is 100 in those units (theirs is
0.01 in the output's); 10 and 1000 end within 3 % of it.
Axes: O = out_features, N = in_features.   Time: O(steps O N^2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantailor.numerics import grids
from quantailor.numerics.grouping import per_element
from quantailor.observers.weights import weight_scale
from quantailor.ptq.method import Solution
from quantailor.ptq.rtn import RTN
from quantailor.ptq.statistics import Statistics
from quantailor.spec import Grid, QuantSpec

ZETA, GAMMA = 1.1, -0.1
_CHUNK = 1 << 18  # weights learned at once: a step's work stays near the cache, and H is read often enough
_SETTLED = 0.01  # how near to 0 or 1 an h has converged


@dataclass(frozen=True)
class AdaRound:
    steps: int = 300
    rate: float = 0.05  # Adam's
    strength: float = 100.0  # lambda
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2  # share of the steps without the regularizer
    needs_hessian: bool = True
    needs_float_path: bool = True

    def solve(self, weight_ON: Tensor, statistics: Statistics | None, spec: QuantSpec) -> Solution:
        """Integers for one layer. Falls back to RTN without usable data, and says so in the report.

        Raises: ValueError where the weight holds NaN or Inf.
        """
        if statistics is None or statistics.hessian is None or statistics.importance is None:
            return _instead(weight_ON, statistics, spec, "no calibration data reached it")
        for matrix in (statistics.hessian, statistics.cross):
            if matrix is not None and not bool(torch.isfinite(matrix).all()):
                return _instead(weight_ON, statistics, spec, "H holds NaN or Inf")
        scale, zero_point = weight_scale(weight_ON, spec, statistics.importance)
        w = weight_ON.detach().float()
        scale_ON, zero_point_ON = (
            per_element(t.squeeze(-1).expand(len(w), -1), w.shape[1], spec.group_size) for t in (scale, zero_point)
        )
        q = grids.encode(w, scale_ON, zero_point_ON, spec.grid)
        counts = torch.zeros(3, dtype=torch.int64)
        rows = max(1, _CHUNK // w.shape[1])
        for first in range(0, len(w), rows):
            part = slice(first, first + rows)
            problem = Problem(
                w[part], q[part], scale_ON[part], zero_point_ON[part], spec.grid, statistics.hessian, statistics.cross
            )
            v = self.descend(problem)
            learned = problem.integers(v)
            worse = ~(problem.error(learned) < problem.error(q[part]))
            h = rectified(v)
            unsettled = ((h > _SETTLED) & (h < 1 - _SETTLED) & problem.free).sum()
            counts += torch.stack([(learned != q[part])[~worse].sum(), worse.sum(), unsettled]).cpu()
            q[part] = torch.where(worse[:, None], q[part], learned)
        moved, kept, unsettled = counts.tolist()
        report = {
            "method": "adaround",
            "moved": moved,  # integers other than the nearest
            "rows_left_nearest": kept,
            "unsettled": unsettled,
            "target": "quantized input" if statistics.cross is None else "float input",
        }
        return Solution(q, scale, zero_point, report)

    def descend(self, problem: Problem) -> Tensor:
        """V [O, N] after all steps of Adam."""
        v = problem.start()
        mean, square = torch.zeros_like(v), torch.zeros_like(v)
        warm = int(self.warmup * self.steps)
        for step in range(self.steps):
            sigmoid = torch.sigmoid(v)
            h = sigmoid * (ZETA - GAMMA) + GAMMA
            slope = sigmoid.mul_(1 - sigmoid).mul_(ZETA - GAMMA).mul_((h > 0) & (h < 1))  # dh/dV
            h.clamp_(0, 1)
            gradient = problem.gradient(h)
            if step >= warm:
                beta = self.beta[1] + (self.beta[0] - self.beta[1]) * (1 - (step - warm) / (self.steps - warm))
                gradient.add_(regularizer_gradient(h, beta), alpha=self.strength)
            gradient.mul_(slope)
            mean.lerp_(gradient, 0.1)  # Adam, with its usual settings
            square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            bias = 1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)
            v.addcdiv_(mean, (square / bias[1]).sqrt_().add_(1e-8), value=-self.rate / bias[0])
        return v


class Problem:
    """The quadratic of some rows of a weight, in h; each row in units of its largest step and its output's mean square.

    `q` [O, N]: the nearest integers. `free` [O, N]: 1 where there is a level on either side.
    """

    def __init__(
        self, w: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, hessian: Tensor, cross: Tensor | None
    ) -> None:
        qmin, qmax, _ = grids.limits(grid)
        nearest = grids.decode(q, scale, zero_point, grid)
        above = torch.where((w - nearest) * scale.sign() >= 0, 1, -1)  # on which side of its level, in integers
        other = (q.int() + above).clamp(qmin, qmax)
        self.free = other != q
        self.low = torch.minimum(other, q.int())
        self.kind = q.dtype
        unit = scale.abs().amax(1, keepdim=True)  # w / unit stays in range whatever the size of w
        low, high = (
            grids.decode(t.to(q.dtype), scale, zero_point, grid) / unit for t in (self.low, self.low + self.free)
        )
        self.step = high - low  # 0 where there is nothing to choose
        w = w / unit
        self.rest = low - w  # D where h = 0
        size = hessian.diagonal().mean()
        self.hessian = hessian / size
        curvature = (self.step.square() * self.hessian.diagonal()).mean(1, keepdim=True)
        self.weight = torch.where(curvature > 1e-12, curvature, 1).reciprocal()
        self.shift = None if cross is None else w @ (self.hessian - cross / size).t()

    def start(self) -> Tensor:
        """V where W_hat = W."""
        h = torch.where(self.free, -self.rest / self.step, 0).clamp_(0, 1)
        return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1)

    def gradient(self, h: Tensor) -> Tensor:
        """d/dh of the first term."""
        product = self._difference(h) @ self.hessian
        if self.shift is not None:
            product += self.shift
        return product.mul_(self.step).mul_(2 * self.weight)

    def error(self, q: Tensor) -> Tensor:
        """The first term of each row [O], up to what does not depend on q."""
        d = self._difference((q.int() - self.low).float())
        product = d @ self.hessian
        if self.shift is not None:
            product += 2 * self.shift
        return product.mul_(d).sum(1) * self.weight.squeeze(1)

    def integers(self, v: Tensor) -> Tensor:
        return (self.low + ((rectified(v) > 0.5) & self.free)).to(self.kind)

    def _difference(self, h: Tensor) -> Tensor:
        return torch.addcmul(self.rest, h, self.step)


def rectified(v: Tensor) -> Tensor:
    """h(V), Eq. 23."""
    return torch.sigmoid(v).mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


def regularizer_gradient(h: Tensor, beta: float) -> Tensor:
    """d/dh (1 - |2h - 1|^beta), Eq. 24."""
    x = 2 * h - 1
    return x.abs().log_().mul_(beta - 1).exp_().mul_(2 * beta).copysign_(-x)  # a power by way of its logarithm: faster


def _instead(weight_ON: Tensor, statistics: Statistics | None, spec: QuantSpec, reason: str) -> Solution:
    found = RTN().solve(weight_ON, statistics, spec)
    return Solution(found.q, found.scale, found.zero_point, {**found.report, "fallback": reason})
