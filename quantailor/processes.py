"""Several processes on one job: who takes part, and what they tell each other. No-ops in a single process.

They are started by `torchrun`, or by any program that has initialised torch.distributed.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def world() -> int:
    """How many processes take part; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world() > 1 else 0


def join() -> bool:
    """Take part where `torchrun` started this process; whether it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or world() > 1:
        return False
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return True


def leave() -> None:
    """Undo `join`."""
    if world() > 1:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for every process."""
    if world() > 1:
        dist.barrier()


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
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found
