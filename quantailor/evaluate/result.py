"""What every measurement of quality has in common, so that a verb can print and compare one without knowing which."""

import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantailor.errors import UsageError
from quantailor.evaluate import bootstrap


class Result(Protocol):
    """`value` of `metric`, with the interval that a bootstrap over its units gave; (nan, nan) with too few units.

    `sums`, `counts` float64 [num_units] are what `value` and `interval` were made from, by `statistic`.
    """

    @property
    def metric(self) -> str: ...
    @property
    def value(self) -> float: ...
    @property
    def interval(self) -> tuple[float, float]: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def sums(self) -> NDArray[np.float64]: ...
    @property
    def counts(self) -> NDArray[np.float64]: ...
    @property
    def statistic(self) -> bootstrap.Statistic: ...
    def to_json(self) -> dict[str, Any]: ...


def difference(before: Result, after: Result, *, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """(after - before, its 95 % interval), paired: an interval without 0 is a change that this data can show.

    Raises: UsageError unless both were measured with the same metric on the same tokens.
    """
    if before.metric != after.metric or before.fingerprint != after.fingerprint:
        raise UsageError(
            f"{before.metric} on data {before.fingerprint[:8]} and {after.metric} on {after.fingerprint[:8]} "
            "are no pair; measure both on the same data"
        )
    pairs = (before.sums, before.counts), (after.sums, after.counts)
    return bootstrap.paired_difference(*pairs, before.statistic, seed=seed)


def jsonable(value: Any) -> Any:
    """`value` for a JSON document, which knows no nan or infinity: null for those, lists for tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: jsonable(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [jsonable(item) for item in value]
    return value
