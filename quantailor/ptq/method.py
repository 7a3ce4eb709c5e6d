"""What a PTQ method is: statistics and a weight in, a grid and integers out; and the parts one is made of.

A method's name is a chain, `smoothquant+gptq` or `magr+qronos+bias`. Each part offers one or more of these hooks, and
the driver calls them in this order:

    on_model(model, layers)             once, before any data: rewrite the whole float model into an equal one
    on_block(block, layers, runs, masks)   before a block is solved: rewrite the float block into an equal one
    before(weight, statistics, spec)    before a layer is solved: another float weight to solve for
    solve(weight, statistics, spec)     the integers; exactly one part of a chain decides them
    refine(block, layers, runs, targets, masks)   after a block is solved: move integers and scales of all its layers
    finish(block, twin, layers, runs, float_runs, masks)   last: touch what is not on a grid, such as biases

`layers` maps full names to the fake-quantized modules that the part is asked for; `runs[i]()` is the block's output on
batch i of the quantized prefix, `float_runs[i]()` that of its float twin; `masks[i]` [B, T] says which rows count.
While `on_model` and `on_block` run, everything not solved yet computes in float. Each returns {layer: its lines of the
receipt}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from quantailor.ptq.statistics import Statistics
from quantailor.spec import QuantSpec

Report = dict[str, Any]
Runs = Sequence[Callable[[], Tensor]]
Masks = Sequence[Tensor | None]


@dataclass(frozen=True)
class Solution:
    """`q` [O, N] integers on the grid of `scale`, `zero_point` [O, G, 1]; `report` goes into the receipt."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor
    report: Report = field(default_factory=dict)


class Method(Protocol):
    """Whatever finds the integers of a layer: one file a method, one line in `ptq.METHODS`."""

    @property
    def needs_hessian(self) -> bool:
        """Whether `solve` wants all of X^T X, or only its diagonal."""
        ...

    @property
    def needs_float_path(self) -> bool:
        """Whether it wants X^T X_float, or the float twin: either costs a second pass, through the float model."""
        ...

    def solve(self, weight_ON: Tensor, statistics: Statistics | None, spec: QuantSpec) -> Solution:
        """Integers for one weight. `statistics` None: no data reached the layer; the method must cope, and say so."""
        ...


@runtime_checkable
class OnModel(Protocol):
    """Rewrites the whole model before the walk."""

    def on_model(self, model: nn.Module, layers: Mapping[str, Any]) -> dict[str, Report]: ...


@runtime_checkable
class OnBlock(Protocol):
    """Rewrites a float block, so that it computes the same and quantizes better."""

    def on_block(self, block: nn.Module, layers: Mapping[str, Any], runs: Runs, masks: Masks) -> dict[str, Report]: ...


@runtime_checkable
class Before(Protocol):
    """Changes the float weight of a layer before it is solved."""

    needs_hessian: bool

    def before(self, weight_ON: Tensor, statistics: Statistics | None, spec: QuantSpec) -> tuple[Tensor, Report]: ...


@runtime_checkable
class Refine(Protocol):
    """Moves what `solve` found, for a whole block together."""

    def refine(
        self, block: nn.Module, layers: dict[str, Any], runs: Runs, targets: Sequence[Tensor], masks: Masks
    ) -> dict[str, Report]: ...


@runtime_checkable
class Finish(Protocol):
    """Has the last word on a block."""

    def finish(
        self, block: nn.Module, twin: nn.Module, layers: Mapping[str, Any], runs: Runs, float_runs: Runs, masks: Masks
    ) -> dict[str, Report]: ...
