"""What the processes of one training run tell each other. No-ops in a single process.

The processes are started by `torchrun`, or by any program that has initialised torch.distributed. The parameters of a
model sharded by FSDP2 are `DTensor`s: here they become whole tensors and shards again.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from quantailor.processes import from_all as from_all
from quantailor.processes import from_rank as from_rank
from quantailor.processes import rank as rank
from quantailor.processes import world as world


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds in any process."""
    if world() == 1:
        return flag
    flags = torch.tensor([float(flag)], device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def mean(value: Tensor) -> Tensor:
    """The mean of a 0-d `value` over the processes."""
    if world() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU of all of it. Every process must ask."""
    value = tensor.detach()
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.to("cpu", copy=True)


@torch.no_grad()
def put(tensor: Tensor, value: Tensor) -> None:
    """The other way: `tensor` in place, sharded or not, from all of its `value`. Every process must do it."""
    tensor.copy_(like(tensor, value))


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """`value` where `tensor` lives, and sharded as it is if it is."""
    if isinstance(tensor, DTensor):
        return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    return value.to(tensor.device)
