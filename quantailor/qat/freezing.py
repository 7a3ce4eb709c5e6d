"""Hybrids: which parameters stay exactly as PTQ left them while others train.

Everything here only switches `requires_grad` off and says what it switched, so that one run can put it back. What does
not train has no gradient either: below the lowest parameter that does, torch records nothing and backward ends there.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from quantailor.errors import UsageError
from quantailor.models.structure import modules_of
from quantailor.qat.groups import freeze_lower, freeze_matrices, kinds_of
from quantailor.qat.settings import Settings


def train_only(model: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    """Stop every parameter outside the layers that a pattern names; what was stopped.

    A shell-style pattern (`*.down_proj`, `model.layers.4.*`) names a layer by its whole name, and all that the layer
    holds: weight, bias, scales. Raises: UsageError where a pattern names nothing that trains.
    """
    if not patterns:
        return []
    trains = list(kinds_of(model))
    chosen: set[str] = set()
    for pattern in patterns:
        hit = {name for name in trains if any(fnmatch.fnmatchcase(n, pattern) for n in owners(name))}
        if not hit:
            layers = dict.fromkeys(_layer_of(name) for name in trains)
            raise UsageError(
                f"train_only {pattern!r} names nothing that trains here; names look like {', '.join(list(layers)[:3])}"
            )
        chosen |= hit
    parameters = dict(model.named_parameters())
    return _stop([parameters[name] for name in trains if name not in chosen])


def owners(parameter: str) -> list[str]:
    """The modules that a parameter lies in, the outermost first, and its own name last."""
    parts = parameter.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _layer_of(parameter: str) -> str:
    for part in (".weight_quantizer.", ".input_quantizer.", ".output_quantizer."):
        parameter = parameter.partition(part)[0] + ("." if part in parameter else "")
    return parameter.rpartition(".")[0]


def train_ranges(model: nn.Module) -> list[nn.Parameter]:
    """Leave only the scales of static inputs to train; what was stopped. Raises: UsageError where there are none."""
    kinds = kinds_of(model)
    if "ranges" not in kinds.values():
        raise UsageError("trains='ranges' trains scales of static inputs, and there are none; use a -static scheme")
    parameters = dict(model.named_parameters())
    return _stop([parameters[name] for name, kind in kinds.items() if kind != "ranges"])


@contextmanager
def frozen(model: nn.Module, settings: Settings) -> Iterator[None]:
    """What the settings freeze does not train in the block: neither parameters nor running averages."""
    stopped: list[nn.Parameter] = []
    with ExitStack() as stack:
        try:
            if settings.trains == "scales":
                stopped += freeze_matrices(model)
            if settings.trains == "ranges":
                stopped += train_ranges(model)
            stopped += freeze_lower(model, settings.freeze_lower)
            stopped += train_only(model, settings.train_only)
            if stopped:
                stack.enter_context(_averages_held(model))
            yield
        finally:
            for parameter in stopped:
                parameter.requires_grad_(True)


@contextmanager
def _averages_held(model: nn.Module) -> Iterator[None]:
    """A BatchNorm that does not train computes with its running averages and leaves them: in training mode its output,
    and so all that lies behind it, would be another one than the frozen layers were calibrated on."""
    handles: list[Any] = []
    for _, module in modules_of(model, _BatchNorm):
        if not any(p.requires_grad for p in module.parameters()):
            handles.append(module.register_forward_pre_hook(_in_evaluation))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_evaluation(module: nn.Module, _: Any) -> None:
    module.training = False  # the Trainer switches the whole model to training at each step


def _stop(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    return parameters
