"""Runs what needs Triton's interpreter in a process of its own: the files beside this one, and the tests of the torch
and native twins, which then meet the GPU kernels (QUANTAILOR_TRITON is not set, so nothing else may be asked)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantailor.kernels.triton import library as gpu
from tests.kernels.triton.where import HAS_GPU, HAS_TRITON, INSTALL

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason=INSTALL),
    pytest.mark.skipif(gpu.interprets(), reason="this is that process"),
    pytest.mark.skipif(HAS_GPU, reason="the files beside this one run on the GPU that is here"),
]


# Of many cases that are alike, one stands for all: the interpreter is slow.
FEW = "(triton and not shape3 and not shape4 and not shape5 and not compilers) or integers_alone or no_tokens"
FEW += " or one_scale or (leading2 and not leading2-1- and not leading2-16- and not leading2-33-)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("places", "which"),
    [(["tests/kernels/triton"], ""), (["tests/kernels/test_passes.py", "tests/kernels/test_ops.py"], FEW)],
)
def test_gpu_kernels_in_the_interpreter(places, which):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "QUANTAILOR_TRITON"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-x", *places, "-k", which]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 50, done.stdout[-1000:]
