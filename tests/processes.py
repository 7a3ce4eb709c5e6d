"""Forked processes joined by gloo, as torchrun would start them, for tests of what several do together."""

import os
import pickle  # noqa: TID251  between a test and its own forks
import socket
import time
import traceback

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState


def in_processes(tmp_path, work, count=2):
    """What `work(rank)` returned in each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(count)}
                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()
                PartialState._reset_state()
                dist.init_process_group("gloo", rank=rank, world_size=count)
                result = work(rank)
                (tmp_path / f"result-{rank}").write_bytes(pickle.dumps(result))
                dist.destroy_process_group()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    end = time.monotonic() + 120
    left = list(pids)
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.remove(pid)
                assert os.waitstatus_to_exitcode(status) == 0, "its traceback is on stderr"
        assert time.monotonic() < end, "the processes wait for one another"
        time.sleep(0.02)
    return [pickle.loads((tmp_path / f"result-{rank}").read_bytes()) for rank in range(count)]
