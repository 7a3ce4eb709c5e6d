"""On a GPU two blocks stand for all: others would be compiled and timed for every size. test_on_gpu.py tries each."""

import pytest

from tests.kernels.triton.where import runs_on_gpu


@pytest.fixture(autouse=True)
def _few_blocks(monkeypatch):
    if runs_on_gpu():
        from quantailor.kernels.triton import decode, int_linear

        monkeypatch.setattr(int_linear._int_linear, "configs", [int_linear.CONFIGS[0], int_linear.CONFIGS[4]])
        monkeypatch.setattr(decode._decode_linear, "configs", decode.CONFIGS[:2])
