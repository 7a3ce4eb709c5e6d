"""A BatchNorm behind a convolution becomes part of it, before anything is quantized.

    w' = w * gamma / sqrt(var + eps)        b' = (b - mean) * gamma / sqrt(var + eps) + beta     by output channel

Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2, Eq. 14 (there with batch statistics during training; here the
running averages are folded once, and training goes on without the norm). Pairs are found by watching which norm is
given the very tensor that a convolution made, and each fold is proved by running the model: one that moves the output
is undone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.models.structure import modules_of, replace
from quantailor.numerics.measures import relative_max_difference

TOLERANCE = 1e-5  # of the largest output: what adding in another order may move


def fold_norms(model: nn.Module, convolutions: Collection[str], inputs: Mapping[str, Tensor]) -> list[str]:
    """Fold the norms behind these convolutions of a float `model`, in place; the names of the norms that are gone.

    `inputs`: what the model is run on to find them and to prove each fold. A norm without running averages, or a
    convolution whose output is read by something else as well, stays as it is.
    """
    pairs = _pairs(model, convolutions, inputs)
    before = _output(model, inputs) if pairs else None
    folded = []
    for convolution, norm in pairs.items():
        conv, bn = model.get_submodule(convolution), model.get_submodule(norm)
        assert isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)
        weight, bias = conv.weight, conv.bias
        conv.weight, conv.bias = folded_parameters(conv, bn)
        replace(model, norm, nn.Identity())
        after = _output(model, inputs)
        assert before is not None
        if relative_max_difference(after, before) <= TOLERANCE:
            folded.append(norm)
        else:
            conv.weight, conv.bias = weight, bias
            replace(model, norm, bn)
    return folded


@torch.no_grad()
def folded_parameters(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[nn.Parameter, nn.Parameter]:
    """(weight [O, I, H, W], bias [O]) of the convolution that does in evaluation what both do; computed in float64."""
    assert norm.running_mean is not None and norm.running_var is not None
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        gain = gain * norm.weight.double()
    shift = -norm.running_mean.double() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
    bias = shift * gain + (norm.bias.double() if norm.affine else 0.0)
    weight = conv.weight.double() * gain.view(-1, 1, 1, 1)
    return nn.Parameter(weight.to(conv.weight.dtype)), nn.Parameter(bias.to(conv.weight.dtype))


def _pairs(model: nn.Module, convolutions: Collection[str], inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """Convolution -> the norm that is given its very output; each runs once."""
    made: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, str] = {}
    calls: dict[str, int] = {}

    def after(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            made[id(output)] = (name, output)  # kept, so that its id stays its own

        return hook

    def before(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            calls[name] = calls.get(name, 0) + 1
            if id(args[0]) in made:
                found[made[id(args[0])][0]] = name

        return hook

    handles = [
        module.register_forward_hook(after(name))
        for name, module in modules_of(model, nn.Conv2d)
        if name in convolutions
    ]
    norms = [(n, m) for n, m in modules_of(model, nn.BatchNorm2d) if m.running_var is not None]
    handles += [module.register_forward_pre_hook(before(name)) for name, module in norms]
    with _removed(handles):
        _output(model, inputs)
    return {conv: norm for conv, norm in found.items() if calls[conv] == calls[norm] == 1}


@contextmanager
def _removed(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _output(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's logits in evaluation; each module is in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(iter(model.parameters())).device
    model.eval()
    try:
        result = model(**{name: value.to(device) for name, value in inputs.items() if name != "labels"})
    finally:
        for module, mode in modes:
            module.training = mode
    logits: Tensor = (result.logits if hasattr(result, "logits") else result).float()
    return logits
