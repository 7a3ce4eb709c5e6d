"""What is said where the GPU kernels do not run, and that nothing of Triton is imported before they are asked for."""

import os
import subprocess
import sys

import pytest
import torch

from quantailor.kernels import decode, ops
from quantailor.kernels.native import library as native
from quantailor.kernels.triton import library as gpu
from tests.kernels.test_decode import drawn


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    """As in a process that was started without TRITON_INTERPRET; nothing that is loaded here stays."""
    monkeypatch.setattr(gpu, "interprets", lambda: False)
    gpu._load.cache_clear()
    yield
    gpu._load.cache_clear()


def test_switched_off(monkeypatch):
    monkeypatch.setenv("QUANTAILOR_TRITON", "0")
    assert gpu.why_not("cuda") == "QUANTAILOR_TRITON=0 switches our GPU kernels off"
    assert not gpu.takes(torch.ones(2))
    _, weight = drawn(4, 64, 3, 32, "moved")
    assert decode.why_not(weight, 1, "cuda") == gpu.why_not("cuda")
    assert ops.product_here("cuda") == "torch's products (QUANTAILOR_TRITON=0 switches our GPU kernels off)"


def test_not_installed(monkeypatch):
    monkeypatch.delenv("QUANTAILOR_TRITON", raising=False)
    monkeypatch.delitem(sys.modules, "quantailor.kernels.triton.kernels", raising=False)
    for name in [n for n in sys.modules if n == "triton" or n.startswith("quantailor.kernels.triton.")]:
        if name != "quantailor.kernels.triton.library":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delattr("quantailor.kernels.triton.kernels", raising=False)
    assert gpu.why_not("cuda") == "triton is not installed: pip install quantailor[gpu]"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed: pip install quantailor[gpu]")
    monkeypatch.delenv("QUANTAILOR_TRITON", raising=False)
    assert gpu.why_not("cuda") == "torch sees no NVIDIA GPU"


def test_other_devices_are_named():
    assert gpu.why_not("mps") == "our GPU kernels run on CUDA devices, and this is mps"
    assert not gpu.takes(torch.ones(2)) and not gpu.takes(torch.ones(2), torch.ones(2, device="meta"), None)


def test_a_cpu_never_imports_triton():
    code = """
import sys, torch
from quantailor.kernels import decode, ops, passes
w, scale = torch.randn(4, 64), torch.rand(4, 1)
q = passes.quantize_weight(w, scale, None, 0.0, -8, 7, 64)
ops.int_linear(ops.IntegerInput(q, torch.ones(1)), ops.IntegerWeight(q, scale, None, None), None)
assert "quantailor.kernels.triton.kernels" not in sys.modules
"""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_gpu_that_cannot_run_a_kernel_is_told_and_not_used(monkeypatch):
    """No compiler for Triton's launcher, say: the reason is kept, and torch operators go on."""
    pytest.importorskip("triton", reason="triton is not installed: pip install quantailor[gpu]")
    from quantailor.kernels.triton import kernels

    def broken():
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.delenv("QUANTAILOR_TRITON", raising=False)
    monkeypatch.setattr(kernels, "try_out", broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu.why_not("cuda") == "triton could not run a kernel here: Failed to find C compiler."
    gpu._load.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert gpu.why_not("cuda") == "Tesla T4 is older than Ampere, which our GPU kernels need"


def test_a_cpu_is_told_as_before(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "why_not", lambda: "no C compiler was found")
    _, weight = drawn(4, 64, 3, 32, "moved")
    assert decode.why_not(weight, 1, "cpu") == "no C compiler was found"
    assert decode.why_not(weight, 1, "mps") == "the kernels run on a CPU or an NVIDIA GPU, and this is mps"
    assert ops.product_here() == ops.product_here("cpu") != ops.product_here("cuda")
