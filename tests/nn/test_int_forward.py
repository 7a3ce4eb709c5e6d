import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from quantailor.kernels import passes
from quantailor.kernels.ops import IntegerInput, IntegerWeight, float_matmul, int_linear
from quantailor.nn import int_forward
from quantailor.nn.int_forward import integer_forward, set_backward
from quantailor.nn.packed import packed
from quantailor.numerics import grids
from quantailor.numerics.grouping import from_groups, to_groups
from quantailor.numerics.lsq import gradient_scale, lsq
from quantailor.spec import Int
from tests.nn.layers import quantized


def draw(group_size):
    x_q, q = torch.randint(-128, 128, (2, 3, 20), dtype=torch.int8), torch.randint(-8, 8, (5, 20), dtype=torch.int8)
    groups = 1 if group_size is None else -(-20 // group_size)
    x_scale, scale = torch.rand(2, 3, 1) + 0.1, torch.rand(5, groups) + 0.1
    w_hat = q * scale.repeat_interleave(group_size or 20, 1)[:, :20]
    return IntegerInput(x_q, x_scale), IntegerWeight(q, scale, None, group_size), x_q * x_scale, w_hat, torch.randn(5)


def test_forward_is_the_integer_product():
    for group_size in (None, 8):
        x, weight, x_hat, w_hat, bias = draw(group_size)
        found = integer_forward(x_hat, w_hat, bias, x, weight)
        assert torch.equal(found, int_linear(x, weight, bias))
        torch.testing.assert_close(found, torch.nn.functional.linear(x_hat, w_hat, bias), rtol=1e-5, atol=1e-4)


def test_backward_is_the_product_s_by_finite_differences():
    """The surrogate x_hat @ w_hat^T + bias is linear in each argument: central differences in float64 are exact."""
    x, weight, x_hat, w_hat, bias = draw(8)
    grad = torch.randn(2, 3, 5)
    leaves = [t.clone().requires_grad_() for t in (x_hat, w_hat, bias)]
    integer_forward(*leaves, x, weight).backward(grad)
    values = [t.double() for t in (x_hat, w_hat, bias)]
    for position, leaf in enumerate(leaves):
        for index in range(leaf.numel()):
            ends = []
            for sign in (1, -1):
                moved = [v.clone() for v in values]
                moved[position].view(-1)[index] += sign * 0.5
                ends.append((torch.nn.functional.linear(*moved) * grad).sum())
            difference = float(ends[0] - ends[1])
            assert abs(difference - float(leaf.grad.flatten()[index])) <= 1e-5 * max(1.0, abs(difference))


def test_only_what_asks_for_a_gradient_gets_one():
    x, weight, x_hat, w_hat, _ = draw(None)
    w_hat.requires_grad_()
    integer_forward(x_hat, w_hat, None, x, weight).sum().backward()
    assert w_hat.grad is not None and x_hat.grad is None


INTEGER_SCHEMES = [
    *("w8a8", "w8a8-static", "w4a8-g32", "w4a8-g32-asym"),
    *("w2a8-g32-balanced", "w1.58a8", "w3a8-g24", "w4a8-g32-asym-static"),
]


def simulated(layer, x):
    """What the layer says it computes, in float64: LSQ's weight, the quantized input, one product."""
    a, w = layer.input_quantizer, layer.weight_quantizer
    grid, zero = w.spec.grid, 0 if w.zero_point_OG is None else w.zero_point.double()
    qmin, qmax, offset = grids.limits(grid)
    rows = to_groups(layer.weight.double(), w.spec.group_size)
    stretch = 0.0 if isinstance(grid, Int) else 0.5
    w_hat = lsq(rows, w.scale.double(), zero, qmin, qmax, g=w.g, offset=offset, stretch=stretch)
    x_hat = a.integers(x).dequantize().double() if a.spec.dynamic else None
    if x_hat is not None:
        x_hat = x.double() + (x_hat - x.double()).detach()
    else:
        g = gradient_scale(x.shape[-1], 127)
        x_hat = lsq(x.double(), a.scale.double(), 0, -128, 127, g=g)
    return F.linear(x_hat, from_groups(w_hat, x.shape[-1]), None if layer.bias is None else layer.bias.double())


def both(scheme, seed=0, rows=(2, 40), out=33, length=100):
    """(layer, input, gradient of the output), scales set, some elements clipped."""
    torch.manual_seed(seed)
    layer = quantized(torch.nn.Linear(length, out), scheme, torch.randn(*rows, length)).train()
    with torch.no_grad():
        layer.weight[::3, ::5] *= 3
        layer.weight_quantizer.log_scale.normal_(0, 0.05)
    return layer, torch.randn(*rows, length, requires_grad=True), torch.randn(*rows, out)


def gradients(layer, x, y, grad):
    leaves = {"x": x, **dict(layer.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(y, tuple(leaves.values()), grad.to(y.dtype))))


@pytest.mark.parametrize("scheme", INTEGER_SCHEMES)
def test_integers_and_simulation_train_alike_to_1e_6(scheme):
    layer, x, grad = both(scheme)
    y, reference = layer(x), simulated(layer, x)
    assert float((y.detach() - reference.detach()).norm() / reference.detach().norm()) < 1e-6
    found, expected = gradients(layer, x, y, grad), gradients(layer, x, reference, grad)
    assert set(found) >= {"x", "weight", "bias", "weight_quantizer.log_scale"}
    for name in expected:
        difference = (found[name].double() - expected[name].double()).norm() / expected[name].double().norm()
        # One number summed over all of x from terms that cancel: float32 has no more digits of it.
        assert float(difference) < (1e-4 if name == "input_quantizer.log_scale" else 1e-6), name


@pytest.mark.parametrize("scheme", INTEGER_SCHEMES)
def test_a_backward_in_bfloat16_rounds_the_gradient_and_little_else(scheme):
    layer, x, grad = both(scheme)
    exact = gradients(layer, x, layer(x), grad)
    set_backward(layer, torch.bfloat16)
    rounded = gradients(layer, x, layer(x), grad)
    assert not torch.equal(rounded["x"], exact["x"])
    for name, value in exact.items():
        assert rounded[name].dtype == value.dtype
        assert float((rounded[name] - value).norm() / value.norm()) < 2**-7, name
    assert torch.equal(rounded["bias"], exact["bias"])


@pytest.mark.parametrize("in_bf16", [False, True])
@pytest.mark.parametrize("scheme", INTEGER_SCHEMES)
def test_a_layer_that_was_turned_into_bfloat16_as_a_whole(scheme, in_bf16):
    """Scales are bfloat16 then as well, half the bytes that native code reads."""
    layer, x, grad = both(scheme)
    layer, x = layer.to(torch.bfloat16), x.detach().bfloat16().requires_grad_()
    set_backward(layer, torch.bfloat16 if in_bf16 else torch.float32)
    y, reference = layer(x), simulated(layer, x)
    most = float(reference.detach().abs().max())
    torch.testing.assert_close(y, reference.bfloat16(), rtol=2**-6, atol=2**-6 * most)
    with int_forward.float_products():
        assert torch.equal(y, layer(x))
    found, expected = gradients(layer, x, y, grad), gradients(layer, x, reference, grad)
    assert set(found) == set(expected)
    for name, value in expected.items():
        difference = (found[name].double() - value.double()).norm() / value.double().norm()
        assert float(difference) < 2**-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16-g24", "w2a16-g32-balanced", *INTEGER_SCHEMES])
def test_turned_into_half_what_trains_is_what_will_be_packed(scheme, dtype):
    """Reciprocals of half scales once put up to a tenth of the elements on other integers."""
    layer, x, _ = both(scheme)
    layer, x = layer.to(dtype), x.detach().to(dtype)
    w = layer.weight_quantizer
    assert torch.equal(w(layer.weight), w.dequantize(w.integers(layer.weight)).to(dtype))
    assert torch.equal(packed(layer)(x), layer.eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32", "w8a8-static", "w4a8-g32-asym"])
def test_a_frozen_layer_passes_on_the_same_gradient_and_the_lowest_one_has_the_same_of_its_weight(scheme, dtype):
    """Each product alone has the bits that it has beside the other."""
    layer, x, grad = both(scheme)
    set_backward(layer, dtype)
    whole = gradients(layer, x, layer(x), grad)
    x.requires_grad_(False)
    below = gradients(layer, x, layer(x), grad)
    x.requires_grad_(True)
    layer.requires_grad_(False)
    above = gradients(layer, x, layer(x), grad)
    assert torch.equal(above["x"], whole["x"]) and set(above) == {"x"}
    assert set(below) == set(whole) - {"x"} and all(torch.equal(below[name], whole[name]) for name in below)


def test_only_known_types_can_be_set():
    with pytest.raises(ValueError, match=r"bfloat16 or float32, not torch\.float16"):
        set_backward(torch.nn.Linear(2, 2), torch.float16)


def bytes_kept(layer, x, known):
    """Of each tensor that autograd keeps for backward, those at `known` addresses left out."""
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in known:
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return kept


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
def test_an_int8_copy_of_the_input_is_all_that_is_kept(scheme):
    layer, x, _ = both(scheme, rows=(64,), length=256)
    parameters = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}
    kept = bytes_kept(layer, x, parameters)
    scales = layer.weight_quantizer.scale.numel() * 4
    assert sum(kept) <= x.numel() + 64 * 4 + 4 * scales  # int8, a scale a token, and the small tensors of the scales


SIMULATED = ["w4a16-g32", "w4a16-g32-asym", "w8a16", "w2a16-g32-balanced", "w1a16-g32", "w1.58a16-g64"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scheme", SIMULATED)
def test_a_weight_that_is_made_twice_gives_the_bits_of_one_that_is_kept(scheme, autocast, dtype):
    layer, x, grad = both(scheme)
    layer, x = layer.to(dtype), x.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, kept = layer(x), F.linear(x, layer.fake_weight(), layer.bias)
    assert y.dtype == kept.dtype and torch.equal(y, kept)
    found, expected = (gradients(layer, x, result, grad.to(result.dtype)) for result in (y, kept))
    assert set(found) >= {"x", "weight", "bias", "weight_quantizer.log_scale"}
    for name, value in expected.items():
        if name == "weight_quantizer.log_scale":  # added in another order where the gradient comes in bfloat16
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))
        else:
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w2a16-g32-balanced"])
def test_of_a_simulated_layer_only_the_input_and_scales_are_kept(scheme):
    layer, x, _ = both(scheme, rows=(64,), length=256)
    parameters = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}
    assert sum(bytes_kept(layer, x, parameters)) <= 5 * layer.weight_quantizer.scale.numel() * 4


@pytest.mark.parametrize("frozen", ["weight", "x"])
def test_a_simulated_layer_makes_no_gradient_that_nobody_asks_for(frozen, monkeypatch):
    layer, x, grad = both("w4a16-g32")
    expected = gradients(layer, x, layer(x), grad)
    if frozen == "x":
        x = x.detach()
    else:
        layer.weight.requires_grad_(False)
        layer.weight_quantizer.log_scale.requires_grad_(False)
        monkeypatch.setattr(passes, "lsq_backward", None)
    layer(x).backward(grad)
    mine = {"weight": layer.weight.grad, "x": x.grad}
    assert mine[frozen] is None
    other = {"weight": "x", "x": "weight"}[frozen]
    assert torch.equal(mine[other], expected[other])


def counted(monkeypatch):
    calls = []
    real = passes.quantize_tokens
    monkeypatch.setattr(passes, "quantize_tokens", lambda *a: calls.append(1) or real(*a))
    return calls


def test_layers_given_the_same_tensor_share_its_integers(monkeypatch):
    layers = [both("w8a8", seed)[0] for seed in range(3)]
    alone = []
    x = torch.randn(5, 100)
    for layer in layers:
        alone.append(layer(x.clone()))
    fewer_bits = both("w8a4", 0)[0]
    calls = counted(monkeypatch)
    assert all(torch.equal(layer(x), y) for layer, y in zip(layers, alone)) and len(calls) == 1
    x += 1  # the same tensor, another content
    assert not torch.equal(layers[0](x), alone[0]) and len(calls) == 2
    fewer_bits(x)
    assert len(calls) == 3
    layers[0](x)
    assert len(calls) == 4


def test_shared_integers_go_when_the_tensor_goes():
    layer = both("w8a8")[0]
    x = torch.randn(5, 100)
    integers = weakref.ref(layer.input_quantizer.integers(x))
    assert integers() is not None
    del x
    assert integers() is None


def test_inference_tensors_are_not_shared_and_work():
    layer = both("w8a8")[0]
    with torch.inference_mode():
        x = torch.randn(5, 100)
        first = layer(x)
        x.zero_()
        assert not torch.equal(layer(x), first)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32", "w4a16-g32", "w8a8-static"])
def test_compiled_without_a_break_and_checkpointed_it_is_the_same(scheme):
    layer, x, grad = both(scheme)
    y = layer(x)
    expected = gradients(layer, x, y, grad)
    torch._dynamo.reset()
    for way in (
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        lambda x: checkpoint(layer, x, use_reentrant=False),
    ):
        again = way(x)
        assert torch.equal(again, y)
        found = torch.autograd.grad(again, (x, *[p for p in layer.parameters() if p.requires_grad]), grad)
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(found, expected.values()))


def test_a_proof_of_parity_takes_another_product(monkeypatch):
    layer, x, _ = both("w8a8")
    seen = []
    monkeypatch.setattr(int_forward, "float_matmul", lambda a, b: seen.append(1) or float_matmul(a, b))
    with torch.no_grad():
        plain = layer(x)
        assert not seen
        with int_forward.float_products():
            assert torch.equal(layer(x), plain) and seen
