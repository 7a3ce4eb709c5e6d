"""Layers put on a grid for the moment: solved once for every choice, swapped in and out of the float model.

Each layer is solved by itself, on statistics of its input in the float model, by any solver of ptq.METHODS. A choice
with quantized activations also quantizes the layer's input while it is in place. Integers are kept, not floats: a byte
a weight and choice. Attention probabilities have no weights: their choice is a number of bits (searching/scores.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.errors import UsageError
from quantailor.models.roles import Unit, is_norm
from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.ptq.chain import Chain
from quantailor.ptq.statistics import Statistics, rows_of
from quantailor.searching.costs import packed_bytes
from quantailor.searching.scores import quantized_scores
from quantailor.searching.suffix import Suffix
from quantailor.spec import Scheme


@dataclass(frozen=True)
class Solved:
    """One layer under one scheme: integers and their grid."""

    q: Tensor
    quantizer: WeightQuantizer

    def weight(self, module: nn.Module) -> Tensor:
        """The weight on its grid, in the module's own shape and dtype."""
        return from_rows(self.quantizer.dequantize(self.q), module)


def rows(module: nn.Module) -> Tensor:
    """A layer's weight as rows of outputs [O, N]; a norm's gains are one row."""
    weight = module._parameters["weight"]
    assert weight is not None
    if type(module).__name__ == "Conv1D":
        return weight.t()
    return weight[None] if weight.dim() == 1 else weight.flatten(1)


def from_rows(rows_ON: Tensor, module: nn.Module) -> Tensor:
    """`rows`' inverse."""
    weight = module._parameters["weight"]
    assert weight is not None
    turned = rows_ON.t() if type(module).__name__ == "Conv1D" else rows_ON
    return turned.reshape(weight.shape).to(weight.dtype)


def check_choices(schemes: Sequence[Scheme]) -> None:
    """Raises: UsageError for a choice that cannot be tried on single layers."""
    if not schemes:
        raise UsageError("there are no choices; give two or more, such as w4a16-g32 and w2a16-g32")
    for scheme in schemes:
        if scheme.is_float:
            raise UsageError("float is no choice of a search: it needs no bits; keep layers in float by a rule")
        if (
            scheme.weight is None
            or (scheme.input is not None and not scheme.input.dynamic)
            or scheme.output is not None
        ):
            raise UsageError(
                f"{scheme} has ranges that calibration fixes beforehand; search with dynamic activations, such as w8a8"
            )
    if len(set(schemes)) != len(schemes):
        raise UsageError("a choice is named twice; name each once")


def unit_bytes(model: nn.Module, unit: Unit, scheme: Scheme | None) -> int:
    """Packed bytes of a unit's weights; a shared one counts once. `scheme` None: as they are in float."""
    seen: set[int] = set()
    total = 0
    for layer in unit.layers:
        weight = model.get_submodule(layer)._parameters.get("weight")
        if weight is None or id(weight) in seen or unit.role == "scores":
            continue
        seen.add(id(weight))
        o, n = rows(model.get_submodule(layer)).shape
        total += packed_bytes(scheme.weight if scheme else None, o, n, weight.element_size())
    return total


class Variants:
    """Every unit under every scheme. `solve` fills it unit by unit, from the first block on."""

    def __init__(self, model: nn.Module, method: Chain) -> None:
        self.model, self.method = model, method
        self.solved: dict[tuple[str, Scheme], Solved] = {}
        self.notes: list[str] = []

    @torch.no_grad()
    def solve(
        self,
        units: Sequence[Unit],
        schemes: Sequence[Scheme],
        suffix: Suffix,
        masks: Sequence[Tensor | None],
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Solve the layers of `units`; `suffix` runs the calibration batches. Layers without an input of rows
        (tables, norms) are rounded to nearest."""
        for unit in units:
            if unit.role == "scores":
                continue
            shared: Statistics | None = None  # layers of a unit inside a block are called with the very same input
            for layer in unit.layers:
                module = self.model.get_submodule(layer)
                start = suffix.start_of.get(layer)
                statistics = None
                if start is None:
                    self.notes.append(f"{layer}: no data reached it; rounded to nearest without data")
                elif not isinstance(module, nn.Embedding) and not is_norm(module):
                    if shared is None or unit.block is None:
                        shared = self._statistics(module, start, suffix, masks)
                    statistics = shared
                for scheme in schemes:
                    if (layer, scheme) in self.solved:
                        continue
                    assert scheme.weight is not None
                    self.solved[layer, scheme] = self._solve(module, scheme, statistics)
            advance(1)

    def _statistics(
        self, module: nn.Module, start: int, suffix: Suffix, masks: Sequence[Tensor | None]
    ) -> Statistics | None:
        length = rows(module).shape[1]
        full = self.method.needs_hessian and getattr(module, "groups", 1) == 1
        found = Statistics.empty(length, full, next(module.parameters()).device)
        for index, mask in enumerate(masks):
            suffix.until(index, start, module, lambda x, m=mask: found.add(rows_of(x, module, m)))  # type: ignore[misc]
        found.check(type(module).__name__)
        found.cross = found.hessian  # the float path is the path here
        return found if found.num_rows else None

    def _solve(self, module: nn.Module, scheme: Scheme, statistics: Statistics | None) -> Solved:
        assert scheme.weight is not None
        weight_ON = rows(module).detach().float().clone()
        solution = self.method.solve(weight_ON, statistics, scheme.weight)
        quantizer = WeightQuantizer(scheme.weight, weight_ON.shape[0], weight_ON.shape[1], weight_ON.device)
        quantizer.set_scale(solution.scale, solution.zero_point)
        return Solved(solution.q, quantizer)

    def input_quantizer(self, layer: str, scheme: Scheme) -> ActivationQuantizer | None:
        """What quantizes the layer's input under this scheme; None where it stays in float."""
        module = self.model.get_submodule(layer)
        if scheme.input is None or isinstance(module, nn.Embedding) or is_norm(module):
            return None
        return ActivationQuantizer(scheme.input)

    @contextmanager
    def applied(self, choices: Mapping[Unit, Scheme]) -> Iterator[None]:
        """These units on their grids, the others as they are; afterwards the very tensors that were there before."""
        kept: list[tuple[nn.Parameter, Tensor]] = []
        done: set[int] = set()
        with ExitStack() as stack:
            stack.callback(_restore, kept)
            for unit, scheme in choices.items():
                if unit.role == "scores":
                    assert scheme.weight is not None
                    block = self.model.get_submodule(unit.layers[0])
                    stack.enter_context(quantized_scores(block, scheme.weight.grid.bits))
                    continue
                for layer in unit.layers:
                    module = self.model.get_submodule(layer)
                    weight = module._parameters["weight"]
                    assert weight is not None
                    if id(weight) not in done:
                        done.add(id(weight))
                        kept.append((weight, weight.data))
                        weight.data = self.solved[layer, scheme].weight(module)
                    if (quantizer := self.input_quantizer(layer, scheme)) is not None:
                        stack.enter_context(_quantized_input(module, quantizer))
            yield


def _restore(kept: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, data in reversed(kept):
        parameter.data = data
    kept.clear()


@contextmanager
def _quantized_input(module: nn.Module, quantizer: ActivationQuantizer) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (quantizer(args[0]), *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
