"""Packed weights read by the GPU kernel, against the float64 product; sizes cross words, blocks, groups and rows."""

import dataclasses

import pytest
import torch

from quantailor.kernels import decode
from quantailor.kernels.decode import StoredWeight, decode_linear, why_not
from quantailor.kernels.triton import library as gpu
from quantailor.models.serving import serving
from quantailor.nn.packed import packed
from quantailor.numerics.grouping import per_element
from tests.kernels.test_decode import SIZES, drawn, magnitude, spread
from tests.kernels.triton.where import device_of_tests
from tests.nn.layers import linear, quantized

DEVICE = device_of_tests()
from quantailor.kernels.triton import common  # noqa: E402
from quantailor.kernels.triton import decode as subject  # noqa: E402

KINDS = [(b, k) for b in (1, 2, 4, 8) for k in ("moved", "zero points")] + [(8, "signed")]


def exact(x, u, weight, bias=None):
    """x @ w_hat^T + bias in float64."""
    length, size = weight.in_features, weight.group_size
    moved = u.double() + weight.move
    if weight.zero_point is not None:
        moved = u.double() - per_element(weight.zero_point.double(), length, size)
    y = x.double() @ (moved * per_element(weight.scale.double().expand(u.shape[0], -1), length, size)).t()
    return y if bias is None else y + bias.double()


def on_device(weight):
    moved = {n: getattr(weight, n) for n in ("data", "scale", "zero_point")}
    return dataclasses.replace(weight, **{n: t if t is None else t.to(DEVICE) for n, t in moved.items()})


def product(x, weight, bias=None, dtype=torch.float32):
    assert not why_not(weight, x.shape[0], DEVICE)
    return decode_linear(x.to(DEVICE), on_device(weight), None if bias is None else bias.to(DEVICE), dtype).cpu()


@pytest.mark.parametrize("size", [(2, 172, 9, None), (8, 320, 10, 64), *SIZES[6:]])
@pytest.mark.parametrize(("bits", "kind"), KINDS)
def test_equal_to_the_float_product(bits, kind, size):
    tokens, length, rows, group = size
    u, weight = drawn(bits, length, rows, group, kind)
    if reason := why_not(weight, tokens, DEVICE):
        assert "do not fit words" in reason and group % (32 // bits)
        return
    x, bias = spread(tokens, length), torch.randn(rows)
    added = bias if kind == "zero points" else None
    y, expected = product(x, weight, added), exact(x, u, weight, added)
    assert y.dtype == torch.float32 and y.shape == (tokens, rows)
    assert ((y - expected).abs() <= 5e-7 * (magnitude(x, u, weight) + bias.abs())).all()


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.bfloat16), (3, torch.float16), (8, torch.bfloat16)])
def test_half_precision_goes_in_and_out_with_one_rounding(rows, dtype):
    u, weight = drawn(4, 200, 9, 40, "moved")
    x, bias = torch.randn(rows, 200).to(dtype), torch.randn(9).to(dtype)
    y = product(x, weight, bias, dtype)
    assert y.dtype == dtype
    assert torch.equal(y, product(x.float(), weight, bias.float()).to(dtype))
    torch.testing.assert_close(y.double(), exact(x, u, weight, bias), rtol=2**-8, atol=1e-3)


def test_small_integers_give_exact_sums():
    for bits, kind in KINDS:
        u, weight = drawn(bits, 256, 10, None, kind)
        weight = dataclasses.replace(weight, scale=torch.full((10, 1), 0.25))
        x = torch.randint(-8, 9, (2, 256)).float()
        assert torch.equal(product(x, weight).double(), exact(x, u, weight))


@pytest.mark.skipif(DEVICE == "cuda", reason="the autotuner tries them all there")
@pytest.mark.parametrize("config", subject.CONFIGS[::5], ids=str)  # each number of rows, each of words
def test_blocks_of_all_kinds_give_the_product(config, monkeypatch):
    monkeypatch.setattr(common, "_compiled", {})
    monkeypatch.setattr(subject._decode_linear, "configs", [config])
    for bits, kind in ((4, "zero points"), (8, "signed")):
        u, weight = drawn(bits, 580, 9, 32, kind)
        x = spread(5, 580)
        assert ((product(x, weight) - exact(x, u, weight)).abs() <= 5e-7 * magnitude(x, u, weight)).all()


def test_some_block_is_left_to_try():
    for bits in (1, 2, 4, 8):
        for rows in (1, 2, 4):
            kept = subject._worth_trying(subject.CONFIGS, {}, FIELDS=32 // bits, ROWS=rows)
            assert kept, (bits, rows)


def test_one_scale_for_a_whole_weight_and_inputs_that_are_not_finite():
    u, weight = drawn(8, 128, 9, None, "signed")
    weight = dataclasses.replace(weight, scale=torch.tensor([[0.03]]))
    x = torch.randn(3, 128)
    x[1, 5] = torch.inf
    y = product(x, weight)
    assert not y[1].isfinite().any()
    torch.testing.assert_close(y[[0, 2]].double(), exact(x[[0, 2]], u, weight), rtol=1e-5, atol=1e-5)


def test_a_compiled_layer_that_serves_takes_it(monkeypatch):
    """As one operator of its graph; more rows, and a layer that does not serve, take the float product there."""
    layer, x = linear(length=96)
    model = torch.nn.Sequential(packed(quantized(layer, "w4a16-g32-asym", x))).to(DEVICE).eval()
    rows = torch.randn(decode.MOST_ROWS_GPU + 1, 96, device=DEVICE)
    taken, run = [], gpu.kernels().decode_linear
    monkeypatch.setattr(gpu.kernels(), "decode_linear", lambda x, *more: taken.append(len(x)) or run(x, *more))
    with torch.inference_mode():
        proven = model(rows)
        with serving(model):
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
            few, many = compiled(rows[:3]), compiled(rows)
            assert taken == [3] and torch.equal(few, model(rows[:3])) and torch.equal(many, proven)
        assert torch.equal(compiled(rows[:3]), model(rows[:3])) and len(taken) == 2
    torch.testing.assert_close(few, proven[:3], rtol=1e-5, atol=1e-5)


def test_a_compiler_sees_one_operator():
    _, weight = drawn(4, 64, 5, 32, "zero points")
    parts = (weight.data, weight.scale, 4, 64, 32, 0.0, weight.zero_point, None, torch.randn(5), torch.bfloat16)
    moved = [v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in (torch.randn(3, 64), *parts)]
    torch.library.opcheck(torch.ops.quantailor.decode_linear.default, tuple(moved))


def test_what_the_kernel_is_not_taken_for():
    _, weight = drawn(4, 64, 3, 4, "moved")
    assert "groups of 4 do not fit words of 8 weights" in why_not(weight, 1, DEVICE)
    _, weight = drawn(4, 64, 3, 32, "moved")
    assert f"beyond {decode.MOST_ROWS_GPU}" in why_not(weight, decode.MOST_ROWS_GPU + 1, DEVICE)
    of_all = StoredWeight(weight.data, weight.scale[:1, :1], 4, 64, None, 0.0, torch.ones(1, 1, dtype=torch.uint8))
    assert "one zero point for the whole weight" in why_not(of_all, 1, DEVICE)
