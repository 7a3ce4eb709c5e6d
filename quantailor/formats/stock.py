"""What stock transformers with compressed-tensors computes from a folder of ours, said in torch: the same integers and
scales, multiplied as reals.

    x_hat = clamp(round(x / s), -128, 127) s,   s = max |x| / 127.5 of a token, or static        w_hat = q scale
    y     = x_hat w_hat^T + b                   in float, where `kernels/ops.py` multiplies integers and scales sums

In exact arithmetic both are equal. In float they differ in the last bits, and a negative extreme, which lies halfway
between -127 and -128, is rounded by those bits in the next layer; whole logits then differ by a percent, while no
integer of a weight, no scale and no rule does. Under `as_stock` our model gives what theirs gives, so that a difference
which is more than that shows. Source: compressed-tensors 0.20, quantization/lifecycle/forward.py and utils/helpers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantailor.evaluate.measuring import measuring
from quantailor.formats.layout import is_plain_int8
from quantailor.models.structure import logits_of, modules_of
from quantailor.nn.packed import QuantLinear


@contextmanager
def as_stock(model: nn.Module) -> Iterator[None]:
    """Within: the packed layers of `model` whose inputs are quantized compute as compressed-tensors does."""
    layers = [module for _, module in modules_of(model, QuantLinear) if _is_its(module)]
    for module in layers:
        module.forward = _forward_of(module)
    try:
        yield
    finally:
        for module in layers:
            del module.forward


def stock_logits(model: nn.Module, probe: Mapping[str, Tensor]) -> Tensor:
    """float32 logits that stock transformers gives on `probe`."""
    with as_stock(model), measuring(model) as device:
        return logits_of(model(**{name: value.to(device) for name, value in probe.items()})).float().cpu()


def flat_inputs(model: nn.Module, probe: Mapping[str, Tensor]) -> list[str]:
    """Layers with quantized inputs that are given a 2-D input. compressed-tensors (0.20) takes one scale for all of it
    where each token has one in ours, so stock transformers computes something else there."""
    found: list[str] = []

    def hook_for(name: str) -> Callable[..., None]:
        return lambda _module, args: found.append(name) if args[0].dim() < 3 else None

    handles = [
        module.register_forward_pre_hook(hook_for(name))
        for name, module in modules_of(model, QuantLinear)
        if _is_its(module) and module.scheme.input.dynamic
    ]
    try:
        with measuring(model) as device:
            model(**{name: value.to(device) for name, value in probe.items()})
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(found))


def _is_its(module: Any) -> bool:
    spec = module.scheme.input
    return spec is not None and is_plain_int8(spec)


def _forward_of(module: QuantLinear) -> Callable[[Tensor], Tensor]:
    static: Tensor | None = getattr(module, "input_scale", None)

    def forward(x: Tensor) -> Tensor:
        bias = None if module.bias is None else module.bias.to(x.dtype)
        weight = module.packed.dequantize().to(x.dtype)
        if static is not None:
            return F.linear(torch.round(x / static).clamp(-128, 127) * static, weight, bias)
        axes = tuple(range(2, x.dim()))  # its "token" is what the first two axes name; without a third: everything
        low, high = (x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)) if axes else torch.aminmax(x)
        zero = torch.zeros_like(low)
        largest = torch.max(torch.min(low, zero).abs(), torch.max(high, zero).abs())
        scale = largest / 127.5
        scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
        x_hat = torch.round(x / scale).clamp(-128, 127) * scale
        return F.linear(x_hat, weight, bias)

    return forward
