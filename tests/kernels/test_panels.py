"""The product on AVX2: exact sums at sizes around tiles, panels, blocks and groups, and what is applied to them."""

import pytest
import torch
import torch.nn.functional as F

from quantailor.kernels import ops, panels
from quantailor.kernels.native import library as native
from quantailor.kernels.ops import IntegerInput, IntegerWeight, float_matmul, int_linear, int_matmul
from quantailor.numerics import affine

needs_panels = pytest.mark.skipif(bool(panels.why_not()), reason=panels.why_not() or "there is a kernel")
FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def integers(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@needs_panels
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 17, 200])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 31, 64, 385, 770, 1537])
@pytest.mark.parametrize("out", [1, 15, 16, 17, 50])
def test_sums_are_exact(rows, length, out):
    torch.manual_seed(0)
    for x, w in (
        (integers(rows, length), integers(out, length)),
        (torch.full((rows, length), -128, dtype=torch.int8), torch.full((out, length), -128, dtype=torch.int8)),
    ):
        assert torch.equal(panels.panel_product(x, w), (x.long() @ w.long().T).float())


@needs_panels
def test_the_largest_sums_do_not_overflow():
    x = torch.full((7, panels._LONGEST), -128, dtype=torch.int8)
    assert torch.equal(panels.panel_product(x, x[:3]), torch.full((7, 3), float(panels._LONGEST * 2**14)))
    assert not panels.fits(torch.zeros(1, panels._LONGEST + 1, dtype=torch.int8), x)


@needs_panels
@pytest.mark.parametrize("group_size", [None, 1, 7, 32, 48, 400])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("rows", "length", "out"), [(1, 40, 3), (6, 100, 16), (13, 385, 17), (200, 800, 33)])
def test_the_same_bits_as_exact_float_sums(monkeypatch, rows, length, out, group_size, shifted):
    monkeypatch.setattr(ops, "multiplies_int8", lambda: False)
    torch.manual_seed(0)
    groups = 1 if group_size is None else -(-length // group_size)
    shift = torch.randint(-9, 9, (out, groups)) + 0.5 if shifted else None
    weight = IntegerWeight(integers(out, length), torch.randn(out, groups), shift, group_size)
    for scale in (torch.rand(1), torch.rand(rows, 1)):
        x = IntegerInput(integers(rows, length), scale)
        for bias in (torch.randn(out), None):
            expected = int_linear(x, weight, bias, matmul=float_matmul)
            assert torch.equal(int_linear(x, weight, bias), expected)
            assert torch.equal(int_linear(x, weight, bias, dtype=torch.bfloat16), expected.bfloat16())


@needs_panels
def test_slices_and_threads_give_the_same():
    torch.manual_seed(0)
    x, w = integers(333, 300), integers(70, 300)
    expected = (x[:, 50:250].long() @ w[:, 50:250].long().T).float()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(panels.panel_product(x[:, 50:250], w[:, 50:250]), expected)
    finally:
        torch.set_num_threads(before)


@needs_panels
@pytest.mark.parametrize("name", FUNCTIONS)
def test_activation_functions_and_the_next_layers_integers(name):
    """Float results within some units of the last place; int8 as `affine.quantize` of torch's own, but for ties."""
    torch.manual_seed(0)
    parts = (integers(300, 64), torch.tensor([0.03]), integers(201, 64), torch.rand(201, 1) * 2e-3, None, None)
    bias, scale = 2 * torch.randn(201), torch.tensor([0.0137])
    y = panels.panel_linear(*parts, bias)
    expected = FUNCTIONS[name](y.double()).float()  # in float32 torch's own are 1.2e-6 off with AVX-512
    assert (panels.panel_linear(*parts, bias, activation=name) - expected).abs().max() <= 1e-6
    out = torch.empty(300, 201, dtype=torch.int8)
    found = panels.panel_linear(*parts, bias, activation=name, out=out, next_scale=scale, limits=(-127, 127))
    wanted = affine.quantize(expected, scale, 0, -127, 127)
    differ = found != wanted
    assert differ.sum() <= 3 and (found.int() - wanted.int()).abs().max() <= 1
    near = (expected / scale - (expected / scale).floor() - 0.5).abs()
    assert (near[differ] < 1e-3).all()  # none but where a last bit decides


@needs_panels
@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("out", [1, 15, 16, 17, 31, 32, 33, 201])
@pytest.mark.parametrize("name", [None, *FUNCTIONS])
def test_finishing_a_product_made_elsewhere(name, out, rows):
    """As torch does it to some units of the last place, and bit for bit as the epilogue of `panel_linear`."""
    torch.manual_seed(0)
    parts = (integers(rows, 64), torch.tensor([0.03]), integers(out, 64), torch.rand(out, 1) * 2e-3, None, None)
    y = panels.panel_linear(*parts, 2 * torch.randn(out))
    given, scale = y.clone(), torch.tensor([0.0137])
    expected = y if name is None else FUNCTIONS[name](y.double()).float()
    found = panels.finish(y, activation=name, out=torch.empty_like(y))
    assert (found - expected).abs().max() <= 1e-6 and torch.equal(y, given)
    q = torch.empty(rows, out, dtype=torch.int8)
    panels.finish(y, activation=name, out=q, next_scale=scale, limits=(-127, 127))
    wanted = affine.quantize(expected, scale, 0, -127, 127)
    differ = q != wanted
    near = (expected / scale - (expected / scale).floor() - 0.5).abs()
    assert (near[differ] < 1e-3).all() and (q.int() - wanted.int()).abs().max() <= 1
    assert panels.finish(y, activation=name) is y and torch.equal(y, found)  # in place
    bf16 = panels.finish(given, activation=name, out=torch.empty(rows, out, dtype=torch.bfloat16))
    assert torch.equal(bf16, found.bfloat16())


@needs_panels
@pytest.mark.parametrize("name", [None, *FUNCTIONS])
@pytest.mark.parametrize("threads", [1, 3])
def test_finishing_is_the_epilogue_of_the_panels(name, threads):
    torch.manual_seed(0)
    parts = (integers(70, 64), torch.rand(70), integers(77, 64), torch.rand(77, 1) * 2e-3, None, None, torch.randn(77))
    last = {"activation": name, "next_scale": torch.tensor([0.0137]), "limits": (-127, 127)}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for kind in (torch.float32, torch.int8):
            empty = torch.empty(70, 77, dtype=kind)
            expected = panels.panel_linear(*parts, out=empty.clone(), **last)
            assert torch.equal(panels.finish(panels.panel_linear(*parts), out=empty, **last), expected)
    finally:
        torch.set_num_threads(before)


@needs_panels
def test_a_product_that_is_not_finite_stays_so_when_finished():
    y = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]])
    torch.testing.assert_close(panels.finish(y.clone()), y, rtol=0, atol=0, equal_nan=True)
    for name in FUNCTIONS:
        assert panels.finish(y.clone(), activation=name)[0, 0].isnan()


@needs_panels
def test_without_a_function_int8_is_the_quantized_result():
    torch.manual_seed(0)
    parts = (integers(50, 90), torch.rand(50), integers(40, 90), torch.rand(40, 1) * 1e-2, None, None, torch.randn(40))
    scale, out = torch.tensor([0.37]), torch.empty(50, 40, dtype=torch.int8)
    found = panels.panel_linear(*parts, out=out, next_scale=scale)
    assert torch.equal(found, affine.quantize(panels.panel_linear(*parts), scale, 0, -128, 127))
    assert found.min() == -128 and found.max() == 127


def test_without_it_sums_are_floats_and_it_is_said(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "why_not", lambda: "QUANTAILOR_NATIVE=0 switches our own kernels off")
    monkeypatch.setattr(native, "has_tiles", lambda: False)
    monkeypatch.setattr(ops, "multiplies_int8", lambda: False)
    x, w = integers(9, 50), integers(4, 50)
    assert torch.equal(int_matmul(x, w), (x.long() @ w.long().T).float())
    assert ops.product_here() == "exact float sums (QUANTAILOR_NATIVE=0 switches our own kernels off)"
