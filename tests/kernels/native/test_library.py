"""Building and loading our own machine code: once, safely, and never a reason to fail."""

import os
import subprocess
import sys

import pytest

from quantailor.kernels.native import library as native


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No library remembered, and an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QUANTAILOR_NATIVE", raising=False)
    native._load.cache_clear()
    native.has_tiles.cache_clear()
    yield tmp_path
    native._load.cache_clear()
    native.has_tiles.cache_clear()


def test_it_is_built_once_and_found_again(fresh):
    if native.library() is None:
        pytest.skip(native.why_not())
    (built,) = (fresh / "quantailor").iterdir()
    stamp = built.stat().st_mtime_ns
    native._load.cache_clear()
    assert native.library() is not None and built.stat().st_mtime_ns == stamp
    assert list((fresh / "quantailor").iterdir()) == [built]


def test_the_environment_switches_it_off(fresh, monkeypatch):
    monkeypatch.setenv("QUANTAILOR_NATIVE", "0")
    assert native.library() is None and "QUANTAILOR_NATIVE=0" in native.why_not() and not native.has_tiles()


def test_without_a_compiler_there_is_a_reason(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    assert native.library() is None and "no C compiler" in native.why_not()


def test_a_compiler_that_fails_is_told(fresh, monkeypatch):
    broken = fresh / "mycc"
    broken.write_text("#!/bin/sh\necho 'mycc: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert native.library() is None and native.why_not() == "mycc could not build our kernels: mycc: no such thing"
    assert list((fresh / "quantailor").iterdir()) == []


def test_nothing_is_run_from_a_folder_that_others_can_write_to(fresh):
    (fresh / "quantailor").mkdir()
    (fresh / "quantailor").chmod(0o777)
    assert native.library() is None and "can be written by others" in native.why_not()


def test_two_builders_at_once_do_not_harm_each_other(fresh):
    code = "from quantailor.kernels.native import library as n; print(n.library() is not None, n.why_not())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(fresh)}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert outputs[0] == outputs[1]


def test_a_model_runs_the_same_without_it(fresh):
    """Same training step, same bits, with and without the library: quantized weights and activations."""
    code = """
import torch
from quantailor.nn.fake_quant import fake_quantized
from quantailor.spec import Scheme
torch.manual_seed(0); torch.set_num_threads(1)
layer = fake_quantized(torch.nn.Linear(96, 40), Scheme.parse("w8a8"))
layer.weight_quantizer.set_scale(layer.weight.detach().abs().amax(1)[:, None, None] / 127.5, torch.zeros(40, 1, 1))
x = torch.randn(64, 96)
y = layer(x); y.sum().backward()
import hashlib
print([hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for t in (y, layer.bias.grad)])
"""
    found = []
    for switch in ("1", "0"):
        environment = {**os.environ, "XDG_CACHE_HOME": str(fresh), "QUANTAILOR_NATIVE": switch}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        found.append(run.stdout)
    assert found[0] == found[1]
