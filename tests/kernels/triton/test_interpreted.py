"""Runs what needs Triton's interpreter in a process of its own: the files beside this one, and the tests of the torch
and native twins, which then meet the GPU kernels (QUANTAILOR_TRITON is not set, so nothing else may be asked)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantailor.kernels.triton import library as gpu
from tests.kernels.triton.where import HAS_TRITON, INSTALL

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason=INSTALL),
    pytest.mark.skipif(gpu.interprets(), reason="this is that process"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "which"),
    [
        ("tests/kernels/triton", ""),
        ("tests/kernels/test_passes.py", "triton"),
        (
            "tests/kernels/test_ops.py",
            "leading2 or integers_alone or no_tokens or one_scale",
        ),  # leading2: of many like it
    ],
)
def test_gpu_kernels_in_the_interpreter(place, which):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "QUANTAILOR_TRITON"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-x", place, "-k", which]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 50, done.stdout[-1000:]
