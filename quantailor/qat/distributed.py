"""What the processes of one training run tell each other. No-ops in a single process.

The processes are started by `torchrun`, or by any program that has initialised torch.distributed. The parameters of a
model sharded by FSDP2 are `DTensor`s: here they become whole tensors and shards again.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


def world() -> int:
    """How many processes train; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world() > 1 else 0


def from_rank(value: T, source: int = 0) -> T:
    """What process `source` has for `value`: sent to all."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def from_all(value: T) -> list[T]:
    """Every process's `value`, by rank."""
    if world() == 1:
        return [value]
    found: list[T | None] = [None] * world()
    dist.all_gather_object(found, value)
    return found  # type: ignore[return-value]


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
