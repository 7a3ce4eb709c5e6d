import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantailor.errors import UsageError
from quantailor.nn.fake_quant import fake_quantized, set_rounded
from quantailor.nn.packed import packed
from quantailor.numerics.grouping import to_groups
from quantailor.observers.weights import weight_scale
from quantailor.spec import NF4, Balanced, Binary, Int, PerTensor, Scheme
from tests.nn.layers import LAYERS, PATHOLOGICAL, SCHEMES, SPECS, conv2d, embedding, linear, pairs, quantized


@pytest.mark.parametrize(("kind", "scheme"), pairs())
def test_gradients_reach_everything_that_learns(kind, scheme):
    layer, x = LAYERS[kind]()
    twin = quantized(layer, scheme, x)
    twin.train()
    if x.is_floating_point():
        x.requires_grad_()
    y = twin(x)
    y.backward(torch.randn_like(y))
    learns = dict(twin.named_parameters())
    assert learns["weight"] is twin.weight and twin.weight.grad.abs().sum() > 0
    if twin.bias is not None:
        assert twin.bias.grad.abs().sum() > 0
    is_nf4 = isinstance(twin.weight_quantizer.spec.grid, NF4)
    assert twin.weight_quantizer.log_scale.requires_grad is not is_nf4
    for name, parameter in learns.items():
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all() and parameter.grad.shape == parameter.shape, name
            if name.endswith("log_scale"):
                assert parameter.grad.abs().sum() > 0
    assert kind == "embedding" or x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "scheme",
    [
        *("w8a8", "w4a8-g32", "w4a8-g32-asym", "w8a8-static", "w1.58a8", "w1a1"),
        *("w8a8-outliers2", "w4a8-g32-asym-outliers2", "w8a8-ag7", "w4a8-g32-ag32"),
    ],
)
def test_the_integer_forward_has_the_gradients_of_the_simulated_product(scheme):
    """Straight through: as if x_hat and w_hat had been multiplied in float."""
    layer, x = linear()
    twin = quantized(layer, scheme, x)
    grads = []
    for simulated in (False, True):
        twin.zero_grad()
        leaf = x.clone().requires_grad_()
        y = F.linear(twin.input_quantizer(leaf), twin.fake_weight(), twin.bias) if simulated else twin(leaf)
        y.backward(torch.sin(torch.arange(y.numel())).view_as(y))
        grads.append([leaf.grad, *(p.grad.clone() for p in twin.parameters())])
    for found, expected in zip(*grads):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_do_not_depend_on_the_mode(scheme):
    layer, x = linear()
    twin = quantized(layer, scheme, x)
    trained = twin.train()(x)
    with torch.no_grad():
        assert torch.equal(twin.eval()(x), trained)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-outliers2", "w8a8-ag64"])
def test_under_autocast_only_the_result_is_rounded_as_a_float_layer_s_is(scheme):
    layer, x = linear(length=600)
    twin = quantized(layer, scheme, x)
    with torch.no_grad():
        plain = twin(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(twin(x), plain.bfloat16()) and torch.equal(packed(twin)(x), plain.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        twin(x).sum().backward()
    assert torch.isfinite(twin.weight.grad).all()


def test_what_each_layer_computes():
    """The float layer, on the tensors that its quantizers give."""
    layer, x = linear()
    twin = quantized(layer, "w4a16-g32", x)
    assert torch.equal(twin(x), F.linear(x, twin.fake_weight(), layer.bias))
    layer, x = conv2d()
    twin = quantized(layer, "w4a8-g32", x)
    image_scales = x.flatten(1).abs().amax(1) / 127.5
    x_hat = torch.stack([torch.round(i / s).clamp(-128, 127) * s for i, s in zip(x, image_scales)])
    assert torch.equal(twin(x), F.conv2d(x_hat, twin.fake_weight(), layer.bias, stride=2, padding=1))
    layer, index = embedding()
    twin = quantized(layer, "w4a16-g32", index)
    assert torch.equal(twin(index), F.embedding(index, twin.fake_weight()))


def test_switched_off_a_layer_is_the_float_one():
    for kind, make in LAYERS.items():
        layer, x = make()
        expected = layer(x)
        twin = quantized(layer, "w4a8-g32", x)
        for quantizer in (twin.weight_quantizer, twin.input_quantizer):
            if quantizer is not None:
                quantizer.enabled = False
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=2e-6 if kind == "conv1d" else 0)


@pytest.mark.parametrize("scheme", ["w8a8-outliers2", "w8a8-ag7"])
def test_the_gradient_is_that_of_both_products_together(scheme):
    """Straight through, columns in float included: dy/dx is the dequantized weight, dy/dw what the layer saw."""
    layer, x = linear()
    twin, grad = quantized(layer, scheme, x, moved=False), torch.randn(2, 5, 33)
    x.requires_grad_()
    twin(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ twin.fake_weight().detach())
    x_hat = twin.input_quantizer.integers(x).dequantize()
    inside = twin.weight_quantizer.integers(twin.weight_ON).int().abs() < 127  # beyond it LSQ clips
    expected = grad.flatten(0, 1).T @ x_hat.flatten(0, 1)
    torch.testing.assert_close(twin.weight.grad[inside], expected[inside])
    if "outliers" in scheme:
        kept = (x.abs() >= 2).flatten(0, 1).any(0)
        assert kept.any() and not kept.all() and torch.equal(x_hat[..., kept], x[..., kept])
        assert not (x_hat[..., ~kept] == x[..., ~kept]).all()


@pytest.mark.parametrize("scheme", ["w8a8-outliers", "w8a8-ag64"])
def test_a_convolution_has_neither_outliers_nor_groups(scheme):
    layer, _ = conv2d()
    with pytest.raises(UsageError, match="give it w8a8 or w8a8-static by a rule, or keep it"):
        fake_quantized(layer, Scheme.parse(scheme))


def test_conv1d_becomes_a_linear_of_the_transposed_weight():
    layer, _ = LAYERS["conv1d"]()
    twin = fake_quantized(layer, Scheme.parse("w8a8"))
    assert torch.equal(twin.weight, layer.weight.T) and twin.bias is layer.bias


def test_parameters_are_shared_with_the_layer_replaced():
    for kind in ("linear", "conv2d", "embedding"):
        layer, _ = LAYERS[kind]()
        twin = fake_quantized(layer.eval(), Scheme.parse("w8a8"))
        assert twin.weight is layer.weight and getattr(twin, "bias", None) is getattr(layer, "bias", None)
        assert twin.training is False
    with pytest.raises(TypeError, match="LayerNorm has no fake-quantized twin"):
        fake_quantized(nn.LayerNorm(4), Scheme.parse("w8a8"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_solver_s_integers_are_kept_to_the_last_one(scheme, dtype):
    """Any integers, however far from the weight: these are what the module must hold afterwards."""
    layer, x = linear(bias=False)
    twin = quantized(layer.to(dtype), scheme, x.to(dtype), moved=False)
    quantizer = twin.weight_quantizer
    nearest = quantizer.integers(twin.weight_ON)
    values = nearest.unique()
    moved = (nearest.int() + torch.randint(-1, 2, nearest.shape)).clamp(int(values.min()), int(values.max()))
    anything = values[torch.randint(len(values), nearest.shape)]
    for q in (nearest, moved.to(nearest.dtype), anything):
        set_rounded(twin, q)
        assert torch.equal(quantizer.integers(twin.weight_ON), q)
        assert twin.weight.dtype == dtype


def test_weights_stay_where_they_are_inside_their_cell():
    layer, x = linear(bias=False)
    twin = quantized(layer, "w4a16-g32", x, moved=False)
    before = twin.weight.detach().clone()
    q = twin.weight_quantizer.integers(twin.weight_ON)
    set_rounded(twin, q)
    scale = twin.weight_quantizer.scale.squeeze(-1).repeat_interleave(32, 1)[:, :100]
    steps = before / scale
    inner = ((steps - q).abs() < 0.47) & (q > -8) & (q < 7)
    torch.testing.assert_close(twin.weight[inner], before[inner], rtol=1e-5, atol=0)
    assert ((twin.weight - before).abs() <= 0.52 * scale.abs() + 1e-6)[(steps > -8.5) & (steps < 7.5)].all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("case", PATHOLOGICAL)
def test_no_weight_gives_a_value_that_is_not_finite(case, spec):
    layer, x = linear()
    with torch.no_grad():
        PATHOLOGICAL[case](layer.weight)
    twin = quantized(layer, Scheme(spec), x * 1e-3, moved=False)
    w_hat, weight = twin.fake_weight().detach(), twin.weight_ON.detach()
    assert torch.isfinite(w_hat).all()
    if "3e38" in case:
        return
    largest, error = float(weight.abs().max()), (w_hat - weight).abs()
    assert float(error.max()) <= largest + 1e-30
    if isinstance(spec.grid, Int | Balanced) or spec.grid == NF4():
        # Half a step, a whole one at a symmetric grid's upper end (NF4: half its widest gap) with the min-max scale,
        # in every group; the search may clip some elements, but pays for none of them.
        step, _ = weight_scale(weight, dataclasses.replace(spec, range="minmax"))
        bound = step * (0.1520 if isinstance(spec.grid, NF4) else 1.0) * 1.001
        if isinstance(spec.granularity, PerTensor):
            error = error.view(1, -1)
        errors = to_groups(error, spec.group_size).square().sum(-1, keepdim=True)
        count = to_groups(torch.ones_like(error), spec.group_size).sum(-1, keepdim=True)
        assert (errors <= bound**2 * count + 1e-30).all()
    y = twin(x * 1e-3)
    y.sum().backward()
    assert torch.isfinite(y).all() and all(
        torch.isfinite(p.grad).all() for p in twin.parameters() if p.grad is not None
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_weight_that_is_not_finite_is_refused(spec, bad):
    layer, _ = linear()
    with torch.no_grad():
        layer.weight[3, 70] = bad
    with pytest.raises(ValueError, match="its weight holds NaN or Inf, which have no place on a grid"):
        weight_scale(layer.weight, spec)


def test_an_untouched_row_of_an_embedding_gets_no_gradient():
    layer, _ = embedding()
    twin = quantized(layer, "w4a16-g32", torch.tensor([1, 2]))
    twin(torch.tensor([[1, 5, 5]])).sum().backward()
    touched = torch.zeros(40, dtype=torch.bool)
    touched[[1, 5]] = True
    assert (twin.weight.grad.abs().sum(1) > 0).tolist() == touched.tolist()
    assert (twin.weight_quantizer.log_scale.grad.abs().sum((1, 2)) > 0).tolist() == touched.tolist()


def test_binary_weights_are_never_zero():
    layer, x = linear()
    twin = quantized(layer, "w1a16", x)
    assert isinstance(twin.scheme.weight.grid, Binary) and (twin.fake_weight() != 0).all()
