"""FSDP2: the parameters of a model lie in parts on several processes, gathered block by block where they are used.

The Trainer's own way to FSDP falls back to DDP on CPUs without a word, so the model is sharded here and given to the
Trainer as one that looks after itself. Source: torch.distributed.fsdp.fully_shard, "FSDP2" in torch's documentation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from quantailor.errors import UsageError
from quantailor.models.structure import blocks
from quantailor.qat import distributed
from quantailor.qat.best import Score


def sharded(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `model` whose parameters are sharded over the processes, a unit a block; the given one stays whole.

    Raises: UsageError where the parameters are of several types: a unit is gathered as one run of bytes.
    """
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UsageError(f"parallel='fsdp2' needs all parameters of one type, these are {names}; load it in float32")
    copied = copy.deepcopy(model).to(device)
    mesh = init_device_mesh(device.type, (distributed.world(),))
    for name, block in blocks(copied):
        if name:
            fully_shard(block, mesh=mesh)
    fully_shard(copied, mesh=mesh)
    for unit in copied.modules():  # places for whole parameters are made here: inference mode would spoil them
        if isinstance(unit, FSDPModule):
            unit.unshard()
            unit.reshard()
    return copied


def scored_sharded(validate: Callable[[nn.Module], Score]) -> Callable[[nn.Module], Score]:
    """`validate` of a sharded model, whose outermost parameters a forward pass without backward leaves whole."""

    def validated(model: nn.Module) -> Score:
        score = validate(model)
        for unit in model.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()
        return score

    return validated
