"""RTN: round to nearest, on scales with the least (importance-weighted) squared error.

The search of the range is observers/weights.py; without data every input channel counts alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quantailor.numerics import grids
from quantailor.numerics.grouping import from_groups, to_groups
from quantailor.observers.weights import weight_scale
from quantailor.ptq.method import Solution
from quantailor.ptq.statistics import Statistics
from quantailor.spec import QuantSpec


@dataclass(frozen=True)
class RTN:
    needs_hessian: bool = False
    needs_float_path: bool = False

    def solve(self, weight_ON: Tensor, statistics: Statistics | None, spec: QuantSpec) -> Solution:
        importance = statistics.importance if statistics else None
        scale, zero_point = weight_scale(weight_ON, spec, importance)
        q = grids.encode(to_groups(weight_ON.float(), spec.group_size), scale, zero_point, spec.grid)
        weighted = "importance-weighted" if importance is not None else "unweighted"
        report = {"method": "rtn", "range": f"{spec.range}, {weighted}"}
        return Solution(from_groups(q, weight_ON.shape[1]), scale, zero_point, report)
