"""What is freed goes back to the system."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from quantailor.models import memory

GAPS = """
import re
from contextlib import nullcontext
import torch
from quantailor.models.memory import large_blocks_mapped
def resident(): return int(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
before = torch.ones(30 * 2**20, dtype=torch.uint8); del before  # glibc now keeps what is smaller on its heap
start = resident()
with {context}:
    large, small = [], []
    for _ in range(40):
        large.append(torch.ones(4 * 2**20, dtype=torch.uint8))
        small.append(torch.ones(2**18, dtype=torch.uint8))  # pins the heap above each large block
    del large
    print(resident() - start)
"""


def test_free_lets_go_of_tensors_and_keeps_shapes():
    layer = nn.Linear(3, 5)
    memory.free(layer)
    assert layer.weight.is_meta and layer.weight.shape == (5, 3)


def test_without_glibc_nothing_is_asked_of_it(monkeypatch):
    monkeypatch.setattr(memory, "_trim", None)
    monkeypatch.setattr(memory, "_mallopt", None)
    memory.free(nn.Linear(2, 2))
    with memory.large_blocks_mapped():
        assert torch.ones(2).sum() == 2


def test_the_threshold_is_set_and_put_where_glibc_would_have_it(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "_mallopt", lambda *a: calls.append(a) or 1)
    with pytest.raises(KeyError), memory.large_blocks_mapped():
        raise KeyError
    assert calls == [(-3, 2**20), (-3, 32 * 2**20)]


@pytest.mark.skipif(memory._mallopt is None, reason="the C library is not glibc")
def test_gaps_of_the_heap_hold_no_large_block():
    """160 MiB are freed below blocks that stay; mapped, they are given back."""
    held = []
    for context in ("nullcontext()", "large_blocks_mapped()"):
        run = subprocess.run([sys.executable, "-c", GAPS.format(context=context)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        held.append(float(run.stdout))
    assert held[1] < 40 < 120 < held[0]
