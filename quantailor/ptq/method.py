"""What a PTQ method is: statistics and a weight in, a grid and integers out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from quantailor.ptq.statistics import Statistics
from quantailor.spec import QuantSpec


@dataclass(frozen=True)
class Solution:
    """`q` [O, N] integers on the grid of `scale`, `zero_point` [O, G, 1]; `report` goes into the receipt."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor
    report: dict[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """One file a method, one line in `ptq.METHODS`."""

    @property
    def needs_hessian(self) -> bool:
        """Whether `solve` wants all of X^T X, or only its diagonal."""
        ...

    @property
    def needs_float_path(self) -> bool:
        """Whether `solve` wants X^T X_float as well: it costs a second pass, through the float model."""
        ...

    def solve(self, weight_ON: Tensor, statistics: Statistics | None, spec: QuantSpec) -> Solution:
        """Integers for one weight. `statistics` None: no data reached the layer; the method must cope, and say so."""
        ...
