"""What only a GPU can show: the machine code's results at the sizes of real layers, the autotuner, torch.compile, and
that the packed layers take the kernels."""

import pytest
import torch

from quantailor.kernels import decode, ops, passes
from quantailor.kernels.ops import IntegerInput, float_matmul, int_linear
from quantailor.kernels.triton import library as gpu
from quantailor.models.serving import serving
from quantailor.nn.int_forward import WeightGrid, integer_linear
from quantailor.nn.packed import QuantLinear, packed
from tests.kernels.test_decode import drawn as drawn_packed
from tests.kernels.triton.where import HAS_GPU, HAS_TRITON, INSTALL
from tests.nn.layers import linear, quantized

if not HAS_GPU:
    pytest.skip("no CUDA device: these tests are of a GPU's own results", allow_module_level=True)
if not HAS_TRITON or gpu.interprets():
    pytest.skip("the interpreter is not the GPU" if HAS_TRITON else INSTALL, allow_module_level=True)

from quantailor.kernels.triton import common, product
from quantailor.kernels.triton import int_linear as fused
from tests.kernels.triton.test_decode import exact, on_device
from tests.kernels.triton.test_int_linear import drawn
from tests.kernels.triton.test_int_linear import on_device as moved

pytestmark = pytest.mark.cuda


def test_our_kernels_run_here():
    assert gpu.why_not("cuda") == ""


@pytest.mark.parametrize("config", fused.CONFIGS, ids=str)
def test_every_block_gives_the_same_bits(config, monkeypatch):
    case = moved(*drawn(300, 640, 270, shifted=True))
    monkeypatch.setattr(fused._int_linear, "configs", [config])
    monkeypatch.setattr(fused._int_linear, "cache", {})
    monkeypatch.setattr(common, "_compiled", {})
    assert torch.equal(int_linear(*case), int_linear(*case, matmul=float_matmul))
    assert next(iter(common._compiled.values()))[1].items() >= config.kwargs.items()


def test_what_is_compiled_for_one_address_is_not_taken_for_another(monkeypatch):
    monkeypatch.setattr(common, "_compiled", {})
    memory = torch.randn(8 * 64 + 1, device="cuda")
    for x in (memory[:-1].view(8, 64), memory[1:].view(8, 64), memory[:-1].view(8, 64), memory[: 7 * 64].view(7, 64)):
        q, scale = passes.quantize_tokens(x, -128, 127)
        expected = passes.quantize_tokens(x.cpu(), -128, 127)
        assert torch.equal(q.cpu(), expected[0]) and torch.equal(scale.cpu(), expected[1])
    assert len(common._compiled) == 2  # multiples of 16 bytes, and others; rows are no argument


@pytest.mark.parametrize(("length", "group_size"), [(4096, None), (4096, 128), (4096, 32), (4000, None)])
@pytest.mark.parametrize("rows", [1, 8, 33, 512, 2048])
def test_the_product_at_real_sizes(rows, length, group_size):
    case = drawn(rows, length, 1040, group_size, shifted=group_size is not None)
    expected = int_linear(*moved(*case), matmul=float_matmul)  # by float sums, on the GPU
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(int_linear(*moved(*case), dtype=dtype), expected.to(dtype))


def test_torch_s_product_and_ours_agree(monkeypatch):
    case = moved(*drawn(64, 512, 256))
    found = []
    for times in ((1.0, 2.0), (2.0, 1.0)):
        monkeypatch.setitem(product._found, (64, 512, 256), times)
        found.append(int_linear(*case))
    monkeypatch.setattr(gpu, "takes", lambda *tensors: False)
    found.append(int_linear(*case))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("size", [32, 128, 4096])
def test_passes_at_real_sizes(size):
    w, scale = torch.randn(1000, 4096), torch.rand(1000, 4096 // size) + 0.01
    grad = torch.randn_like(w).bfloat16()
    grid = (scale, None, 0.0, -8, 7, size)
    there = [t.cuda() if isinstance(t, torch.Tensor) else t for t in grid]
    for one in (passes.quantize_weight, passes.fake_quantize_weight):
        assert torch.equal(one(w.cuda(), *there).cpu(), one(w, *grid))
    numbers = (0.0, 0.5, 0.1, -8, 7, size)
    mine = passes.lsq_backward(w.cuda(), grad.cuda(), scale.cuda(), None, *numbers)
    theirs = passes.lsq_backward(w, grad, scale, None, *numbers)
    assert torch.equal(mine[0].cpu(), theirs[0])
    torch.testing.assert_close(mine[1].cpu(), theirs[1], rtol=1e-4, atol=1e-4)
    q, token = passes.quantize_tokens(w.cuda().bfloat16(), -128, 127)
    expected = passes.quantize_tokens(w.bfloat16(), -128, 127)
    assert torch.equal(q.cpu(), expected[0]) and torch.equal(token.cpu(), expected[1])


@pytest.mark.parametrize(("bits", "kind"), [(4, "moved"), (4, "zero points"), (2, "moved"), (8, "signed")])
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_at_real_sizes(rows, bits, kind, dtype):
    u, weight = drawn_packed(bits, 4096, 1000, 128, kind)
    x = (torch.randn(rows, 4096) / 64).to(dtype)
    expected = exact(x, u, weight)
    found = decode.decode_linear(x.cuda(), on_device(weight), None, dtype).cpu().double()
    most = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=most * (1e-5 if dtype == torch.float32 else 2**-8))


def test_a_compiled_step_is_the_eager_one():
    x, w, scale = torch.randn(64, 256), torch.randn(128, 256), torch.rand(128, 1) / 50 + 0.02
    grid = WeightGrid(0.0, 0.0, 0.1, -128, 127, None)

    def step(x, w, scale):
        q, x_scale = passes.quantize_tokens(x.detach(), -128, 127)  # integers carry no gradient
        return integer_linear(x, w, scale, None, IntegerInput(q, x_scale), None, grid, True)

    found = []
    for run in (step, torch.compile(step, fullgraph=True)):
        leaves = [t.clone().cuda().requires_grad_() for t in (x, w, scale)]
        y = run(*leaves)
        y.square().sum().backward()
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*found):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-5 * float(eager.abs().max()))


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym", "w2a16-g32", "w8a16", "w8a8", "w4a8-g32"])
def test_packed_layers_take_the_kernels(scheme):
    layer, x = linear(length=96)
    model = torch.nn.Sequential(packed(quantized(layer, scheme, x))).cuda().eval()
    x = x.cuda()[..., :1, :]
    with torch.inference_mode():
        proven = model(x)
        with serving(model) as choices:
            assert [c.few_rows for c in choices] == ["integer product" if "a8" in scheme else "packed kernel"]
            served = model(x)
    assert isinstance(model[0], QuantLinear)
    torch.testing.assert_close(served, proven, rtol=1e-3, atol=1e-3 * float(proven.abs().max()))


def test_what_runs_is_told():
    int_linear(*moved(*drawn(1024, 4096, 4096)))
    assert " ms; " in ops.product_here("cuda", has_run=True)
    int_linear(*moved(*drawn(1, 4096, 4096)))
    assert "few rows" in ops.product_here("cuda", has_run=True)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_layer_that_serves_is_the_eager_one(mode):
    layer, x = linear(length=96)
    model = torch.nn.Sequential(packed(quantized(layer, "w4a16-g32", x))).cuda().eval()
    row = torch.randn(1, 96, device="cuda")
    with torch.inference_mode(), serving(model):
        compiled = torch.compile(model, mode=mode)
        for _ in range(3):  # a graph is recorded at the second
            assert torch.equal(compiled(row), model(row))
