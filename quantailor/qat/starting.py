"""Where weights stand when training begins: not on the edges between two integers, where a solver leaves some."""

from __future__ import annotations

import torch
from torch import nn

from quantailor.models.prepare import FAKE_QUANT
from quantailor.models.structure import modules_of
from quantailor.qat.settings import Settings

_MOVES_WEIGHTS = ("lsq", "lsq+", "ste", "pact")  # on a grid whose scale does not follow them


@torch.no_grad()
def off_the_edges(model: nn.Module, settings: Settings) -> None:
    """Of all weights that train (WeightQuantizer.off_the_edges). Nothing where quantization comes in by and by: floats
    count there."""
    if settings.trains != "all" or settings.gradient not in _MOVES_WEIGHTS or settings.blend:
        return
    for _, module in modules_of(model, FAKE_QUANT):
        quantizer = module.weight_quantizer
        if quantizer is None or not module.weight.requires_grad:
            continue
        moved = quantizer.off_the_edges(module.weight_ON)
        if torch.equal(quantizer.integers(moved), quantizer.integers(module.weight_ON)):  # half precision may lack room
            module.weight.copy_(moved.view_as(module.weight))
