"""Where GPU kernels are tested: on a GPU where there is one, else on CPU tensors in Triton's interpreter.

The interpreter has to be asked for before Triton is imported, and other tests of a process are not to be disturbed; so
test_interpreted.py runs the files beside it in a process of their own, with TRITON_INTERPRET=1.
"""

from importlib.util import find_spec

import pytest
import torch

from quantailor.kernels.triton import library as gpu

INSTALL = "triton is not installed: pip install quantailor[gpu]"
HAS_TRITON = find_spec("triton") is not None
HAS_GPU = torch.cuda.is_available()


def device_of_tests() -> str:
    """Skips the module that asks, with the reason, where its kernels cannot run."""
    if not HAS_TRITON:
        pytest.skip(INSTALL, allow_module_level=True)
    if gpu.interprets():
        return "cpu"
    if not HAS_GPU:
        pytest.skip("no GPU: test_interpreted.py runs this in a process of its own", allow_module_level=True)
    return "cuda"


def runs_on_gpu() -> bool:
    """Whether the tests' kernels are machine code on a GPU, not interpreted."""
    return HAS_TRITON and HAS_GPU and not gpu.interprets()
