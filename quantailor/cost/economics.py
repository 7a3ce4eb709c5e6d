"""Is it worth it: pay-back, budget, marginal gain, and what else the same money buys. Pure arithmetic on given figures.

Nothing here knows an accuracy: gains are read from measured curves, savings from what the user says inference costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantailor.errors import UsageError

# Shares of a typical project (the "budget allocation" of a common guide to QAT; a starting point, not a finding).
SHARES = {
    "data": 0.10,
    "environment": 0.05,
    "pretrained model": 0.0,
    "fine-tune": 0.30,
    "qat": 0.40,
    "evaluation": 0.15,
}
DAYS = 30.4  # in a month


@dataclass(frozen=True)
class Return:
    """Of a cost paid once against a saving each month. `payback_days` infinite: never."""

    cost: float
    monthly_saving: float
    payback_days: float
    first_year: float  # saving of twelve months less the cost, over the cost

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def saving(monthly_inference_cost: float, speedup: float) -> float:
    """What a month of inference costs less when each device does `speedup` times the work.

    >>> saving(1000, 4)
    750.0
    """
    if speedup <= 0 or monthly_inference_cost < 0:
        raise UsageError(f"speedup={speedup} must be above 0, and monthly cost={monthly_inference_cost} not negative")
    return monthly_inference_cost * (1 - 1 / speedup)


def return_on(cost: float, monthly_saving: float) -> Return:
    """Pay-back and the first year's return.

    >>> round(return_on(263, 1000).payback_days, 1)
    8.0
    """
    payback = DAYS * cost / monthly_saving if monthly_saving > 0 else (0.0 if cost == 0 else math.inf)
    first_year = (12 * monthly_saving - cost) / cost if cost > 0 else (math.inf if monthly_saving > 0 else 0.0)
    return Return(cost, monthly_saving, payback, first_year)


def split(budget: float, shares: Mapping[str, float] = SHARES, without: Sequence[str] = ()) -> dict[str, float]:
    """A budget by item; what `without` names (such as QAT where PTQ is enough) goes to the others in proportion.

    >>> split(500)["qat"], split(500, without=["qat"])["evaluation"]
    (200.0, 125.0)
    """
    if budget < 0:
        raise UsageError(f"budget={budget} must be 0 or more")
    if unknown := sorted(set(without) - set(shares)):
        raise UsageError(f"{unknown[0]!r} is no item of the budget; items are {', '.join(shares)}")
    kept = {name: share for name, share in shares.items() if name not in without}
    whole = sum(kept.values())
    return {name: round(budget * share / whole, 2) for name, share in kept.items()} if whole else {}


# ------------------------------------------------------------------------------------------------ measured curves


@dataclass(frozen=True)
class Point:
    """`cost` in any unit (money, epochs, steps), rising; `value` of a metric."""

    cost: float
    value: float


@dataclass(frozen=True)
class Marginal:
    """From one point of a curve to the next: what a unit of cost bought."""

    start: float
    end: float
    gain: float  # positive is better
    per_unit: float


def marginal(curve: Sequence[Point], higher_is_better: bool) -> list[Marginal]:
    """Gain a unit of cost between neighbours. Raises: UsageError unless costs rise.

    >>> [round(m.per_unit, 4) for m in marginal([Point(0, 79.5), Point(200, 81.4), Point(400, 81.7)], True)]
    [0.0095, 0.0015]
    """
    if any(b.cost <= a.cost for a, b in itertools.pairwise(curve)):
        raise UsageError("the costs of a curve must rise from point to point")
    sign = 1 if higher_is_better else -1
    return [
        Marginal(a.cost, b.cost, sign * (b.value - a.value), sign * (b.value - a.value) / (b.cost - a.cost))
        for a, b in itertools.pairwise(curve)
    ]


def sweet_spot(curve: Sequence[Point], higher_is_better: bool, noise: float = 0.0, share: float = 0.1) -> Point:
    """The cheapest point from which all that is still to be gained is no more than `noise`, or than `share` of the
    curve's whole gain."""
    if not curve:
        raise UsageError("a curve needs at least one point")
    marginal(curve, higher_is_better)
    sign = 1 if higher_is_better else -1
    best = max(sign * point.value for point in curve)
    whole = best - sign * curve[0].value
    return next(p for p in curve if best - sign * p.value <= max(noise, share * whole))


def best_within(curve: Sequence[Point], budget: float, higher_is_better: bool) -> Point | None:
    """The best point that the budget pays for, the cheapest of equals; None if it pays for none."""
    sign = 1 if higher_is_better else -1
    affordable = [point for point in curve if point.cost <= budget]
    return max(affordable, key=lambda p: (sign * p.value, -p.cost), default=None)


# ------------------------------------------------------------------------------------------------ other methods


@dataclass(frozen=True)
class Alternative:
    """Another way to a smaller model: its step in units of a plain training step (3 forward passes), how many such
    steps the cost of the QAT run pays for, and what is left of weights and of products. Accuracy is not planned."""

    name: str
    step: float
    steps: float
    weight_share: float
    product_share: float
    note: str


def alternatives(qat_steps: int, bits: float, float_bits: int = 16, with_teacher: bool = True) -> list[Alternative]:
    """What the products of `qat_steps` steps pay for otherwise. A forward pass is 1, backward 2: counted."""
    qat = 4.0 if with_teacher else 3.0
    total = qat_steps * qat
    rows = [
        ("QAT", qat, bits / float_bits, 1.0, "the same products, narrower: faster only where a kernel multiplies them"),
        (
            "distillation to half the layers",
            3 * 0.5 + 1.0,
            0.5,
            0.5,
            "a student half as deep, the teacher's forward pass",
        ),
        ("pruning, 50 % unstructured", 3.0, 0.5, 1.0, "zeros are multiplied all the same without a sparse kernel"),
        (
            "pruning, half of the ffn",
            3.0 * 2 / 3,
            2 / 3,
            2 / 3,
            "ffn counted as two thirds of a block, as it is in BERT",
        ),
        ("low rank, r = d/4", 3.0 * 0.5, 0.5, 0.5, "a square W as two factors: 2 r d of d^2 weights"),
    ]
    return [Alternative(n, 1.0 * s / 3, total / s, w, p, note) for n, s, w, p, note in rows]
