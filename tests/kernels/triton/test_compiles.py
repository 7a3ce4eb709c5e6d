"""Triton's compiler, which is stricter than its interpreter, makes machine code of every kernel for GPUs that are not
here (compute capability 8.0, 9.0), as the launchers call them. What makes their results and speed can be read there."""

import pytest
import torch

from quantailor.kernels.triton import library as gpu
from tests.kernels.triton.where import HAS_GPU, HAS_TRITON, INSTALL

if not HAS_TRITON:
    pytest.skip(INSTALL, allow_module_level=True)
if HAS_GPU:
    pytest.skip("a GPU is here, and its driver would be disturbed: test_on_gpu.py", allow_module_level=True)
if gpu.interprets():
    pytest.skip("nothing is compiled in the interpreter's process", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from quantailor.kernels.triton import common, decode, int_linear, kernels, product

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


class Absent:
    """The driver of a GPU that is not here: enough to compile for it."""

    def __init__(self, capability):
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=None: 0
        self.get_active_torch_device = lambda: torch.device("cpu")


@pytest.fixture(params=[80, 90])
def compiled(request, monkeypatch, tmp_path):
    """(kernel, what was made of it), filled by launches that only compile."""
    made = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        made.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))
        return made[-1][1]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(int_linear._int_linear, "configs", [int_linear.CONFIGS[7]])  # nothing can be measured
    monkeypatch.setattr(decode._decode_linear, "configs", [decode._config(4, 64, 1)])
    monkeypatch.setattr(driver, "_active", Absent(request.param))
    monkeypatch.setattr(common, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # where tensors of a CPU are
    return made


class Recording(Absent):
    """A driver that writes down what it is told to launch."""

    def __init__(self, capability):
        super().__init__(capability)
        self.launched = []
        self.utils = self
        self.get_device_properties = lambda device: {"max_shared_mem": 2**20}
        self.load_binary = lambda name, kernel, shared, device: (object(), name, 0, 0, 1024)
        self.launcher_cls = lambda source, metadata: self._launch

    def _launch(self, x, y, z, stream, function, metadata, of_launch, enter, leave, *arguments):
        self.launched.append((function, (x, y, z), arguments))


def test_a_second_launch_is_the_first_one_without_triton_s_look_at_it(monkeypatch, tmp_path):
    """The very grid and arguments; Triton is asked again only for what it would compile anew."""
    recorded, asked = Recording(90), []
    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: asked.append(self.__name__) or run(self, *a, **k))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(int_linear._int_linear, "configs", [int_linear.CONFIGS[7]])
    monkeypatch.setattr(driver, "_active", recorded)
    monkeypatch.setattr(common, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    x, w, one = torch.zeros(96, 256, dtype=torch.int8), torch.zeros(160, 256, dtype=torch.int8), torch.ones(160, 1)
    for rows in (96, 64, 96, 33):  # tuned for 128, for 64; known; 16 does not divide it
        int_linear.int_linear(x[:rows], one[:rows], w, one, None, None, None, None, None, torch.bfloat16)
    kernels.lsq_backward(w.float(), w.float(), one, None, 0.0, 0.0, 0.1, -8, 7, 256)
    kernels.lsq_backward(w.float(), w.bfloat16(), one, None, 0.0, 0.0, 0.1, -8, 7, 256)
    assert asked == ["_int_linear", "_int_linear", "_int_linear", "_lsq_backward", "_lsq_backward"]
    first, second, third = recorded.launched[:3]
    assert [grid for _, grid, _ in recorded.launched[:4]] == [(2, 1, 1), (2, 1, 1), (2, 1, 1), (2, 1, 1)]
    same = [a is b if isinstance(a, torch.Tensor) else a == b for a, b in zip(first[2], third[2], strict=True)]
    names = int_linear._int_linear.fn.arg_names
    assert {name for name, equal in zip(names, same, strict=True) if not equal} <= {"x_q", "x_scale", "y"}  # made anew
    assert first[0] == second[0] == "_int_linear" and second[2][names.index("rows")] == 64


def test_passes(compiled, monkeypatch):
    w, scale, zero = torch.zeros(8, 256), torch.ones(8, 2), torch.zeros(8, 2, dtype=torch.int32)
    kernels.quantize_tokens(w.bfloat16(), -128, 127)
    kernels.quantize_weight(w, scale, None, 0.0, -8, 7, 128)
    kernels.fake_quantize_weight(w, scale, zero, 0.0, 0, 15, 128)
    kernels.lsq_backward(w, w.bfloat16(), scale, zero, 0.0, 0.0, 0.1, 0, 15, 128)
    half = torch.empty(8, 256, dtype=torch.bfloat16)
    kernels.scaled_bf16(w.char(), torch.ones(8), w.char(), torch.ones(1))
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: torch.zeros(8, 256, dtype=torch.int32))
    product.by_torch(w.char(), scale[:, :1], half.t().char(), torch.ones(256, 1), torch.ones(256), torch.bfloat16)
    assert len(compiled) == 6
    for name, code in compiled:
        ptx = code.asm["ptx"]
        assert "fma.rn" not in ptx, f"{name} would round once where torch rounds twice"
        assert "div.full" not in ptx and "div.approx" not in ptx, f"{name} divides inexactly"


@pytest.mark.parametrize("group_size", [None, 128, 32])
def test_int_linear(compiled, group_size):
    x_q, w_q = torch.zeros(256, 512, dtype=torch.int8), torch.zeros(256, 512, dtype=torch.int8)
    scale = torch.ones(256, 1 if group_size is None else 512 // group_size)
    shift = scale if group_size == 128 else None
    int_linear.int_linear(
        x_q, torch.ones(256, 1), w_q, scale, shift, None, group_size, None, scale[:, 0], torch.bfloat16
    )
    ((_, code),) = compiled
    ptx = code.asm["ptx"]
    assert "fma.rn.f32" not in ptx
    assert "s32.s8.s8" in ptx, "the product is not on tensor cores"
    assert "cp.async" in ptx, "nothing is loaded ahead"


@pytest.mark.parametrize("compiled", [80], indirect=True)
@pytest.mark.parametrize(("bits", "zeros"), [(4, False), (4, True), (2, False), (1, False), (8, True)])
def test_decode(compiled, bits, zeros):
    data, scale = torch.zeros(64, 4096 * bits // 32, dtype=torch.int32), torch.ones(64, 32)
    zero = torch.zeros(64, 32, dtype=torch.uint8) if zeros else None
    x = torch.zeros(1, 4096, dtype=torch.bfloat16)
    kernels.decode_linear(x, data, scale, zero, -8.0, bits, 128, None, torch.bfloat16)
    ((_, code),) = compiled
    ptx = code.asm["ptx"]
    assert "cvt.rn.f32.s32" not in ptx and "cvt.rn.f32.u32" not in ptx, "fields are converted by the few units for it"
    if bits == 4 and VERSION >= (3, 7):  # inputs and weights meet in one thread's registers; 3.6 takes shared memory
        assert code.metadata.shared <= 64 and "bar.sync" not in ptx


@pytest.mark.parametrize("compiled", [80], indirect=True)
def test_decode_of_signed_bytes(compiled):
    data, scale = torch.zeros(64, 512, dtype=torch.int8), torch.ones(64, 1)
    kernels.decode_linear(torch.zeros(4, 512), data, scale, None, 0.0, 8, None, torch.ones(64), torch.float32)
    assert len(compiled) == 1
