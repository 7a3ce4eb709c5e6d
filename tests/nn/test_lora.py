"""Adapters inside the rounding, against the equation written out element by element; merged integers to the bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantailor.errors import UsageError
from quantailor.models.adapt import fractions_of
from quantailor.nn import recompute
from quantailor.nn.fake_quant import fake_quantized
from quantailor.nn.lora import Adapter, LoRA, LoRALinear
from quantailor.nn.packed import packed
from quantailor.numerics import grids
from quantailor.observers.weights import weight_scale
from quantailor.spec import Scheme

SCHEMES = [
    "w4a16-g32",
    "w4a16",
    "w8a16",
    "w3a16-g32",
    "w2a16-g32",
    "w2a16-g32-balanced",
    "w4a16-g32-asym",
    "w8a16-asym",
]
SCHEMES += ["w1.58a16", "w1a16", "w8a8", "w4a8-g32", "w8a8-static", "w4a8-g32-asym"]


def layer_of(scheme, lora, base_bits=8, shape=(24, 72), trained=True):
    """A layer with an adapter that has moved, and its parts as plain tensors."""
    source = nn.Linear(shape[1], shape[0])
    twin = fake_quantized(source, Scheme.parse(scheme))
    quantizer = twin.weight_quantizer
    quantizer.set_scale(*weight_scale(twin.weight_ON, quantizer.spec))
    if twin.input_quantizer is not None and not twin.input_quantizer.spec.dynamic:
        twin.input_quantizer.set_scale(torch.tensor(0.02))
    bits = max(0, base_bits - quantizer.spec.grid.bits) if lora.inside else 0
    kept = fractions_of(quantizer, twin.weight_ON, bits)
    layer = LoRALinear(packed(twin), kept if bits else None, bits)
    adapter = Adapter(lora, layer.packed, torch.device("cpu"))
    layer.add("default", adapter)
    layer.active = "default"
    if trained:
        with torch.no_grad():
            adapter.lora_B.normal_(std=float(quantizer.scale.abs().mean()))
            if adapter.log_scale is not None:
                adapter.log_scale.normal_(std=0.1)
    return layer, kept, bits


def trained_weight(layer, kept, bits):
    """(integers, weight) by the equation: round(q + r / 2^f + alpha/r (BA) / s), clipped; in loops over elements."""
    grid, size = layer.packed.spec.grid, layer.packed.spec.group_size or layer.in_features
    qmin, qmax, offset = grids.limits(grid)
    adapter, scale = layer.adapter, layer.packed.scales()
    learned = scale if adapter.log_scale is None else scale * adapter.log_scale.exp()
    zero_point, q0 = layer.packed.zero_points(), layer.packed.integers()
    delta = adapter.lora_B @ adapter.lora_A
    q, w = torch.empty_like(delta), torch.empty_like(delta)
    for o in range(layer.out_features):
        for n in range(layer.in_features):
            at = (o if scale.shape[0] > 1 else 0, n // size)
            z = zero_point[at] if isinstance(zero_point, torch.Tensor) else 0
            v = q0[o, n].float() + kept[o, n] / 2**bits
            q[o, n] = torch.round(v + delta[o, n] * (adapter.lora.scaling / scale[at])).clamp(qmin, qmax)
            w[o, n] = (q[o, n] - z + offset) * learned[at]
    return q, w


@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_merge_and_equation_are_one(scheme):
    """Sizes cross group and run boundaries: 72 inputs in groups of 32, 24 outputs."""
    layer, kept, bits = layer_of(scheme, LoRA(r=3, lora_alpha=5, scales=True))
    q, w = trained_weight(layer, kept, bits)
    x = torch.randn(2, 5, 72)
    merged = layer.merged()
    assert torch.equal(merged.packed.integers().float(), q.float())
    assert not torch.equal(q.float(), layer.packed.integers().float())  # the adapter did move integers
    torch.testing.assert_close(merged.packed.dequantize(), w)
    assert torch.equal(layer(x), merged(x))
    if layer.scheme.input is None:
        torch.testing.assert_close(layer(x), F.linear(x, w, layer.bias))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_fresh_adapter_is_the_base(scheme):
    layer, _, _ = layer_of(scheme, LoRA(r=4), trained=False)
    x = torch.randn(7, 72)
    with_adapter = layer(x)
    assert torch.equal(layer.merged().packed.integers(), layer.packed.integers())
    layer.active = None
    assert torch.equal(layer(x), with_adapter)


def gradients_by_definition(layer, kept, bits, x, dy):
    """STE, clipped; the scale's exactly; of float tensors that autograd has."""
    grid, size = layer.packed.spec.grid, layer.packed.spec.group_size or layer.in_features
    qmin, qmax, offset = grids.limits(grid)
    adapter, scale = layer.adapter, layer.packed.scales()
    index = torch.arange(layer.in_features) // size
    s = scale.expand(layer.out_features, -1)[:, index]
    zero_point = layer.packed.zero_points()
    z = zero_point.expand(layer.out_features, -1)[:, index] if isinstance(zero_point, torch.Tensor) else 0
    a, b = (p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
    log_scale = adapter.log_scale.detach().clone().requires_grad_()
    v = layer.packed.integers().float() + kept / 2**bits + adapter.lora.scaling * (b @ a) / s
    rounded = torch.round(v)
    inside = (rounded >= qmin) & (rounded <= qmax)
    q = torch.where(inside, v + (rounded - v).detach(), rounded.clamp(qmin, qmax).detach())
    w = (q - z + offset) * s * log_scale.exp().expand(layer.out_features, -1)[:, index]
    x_hat = x if layer.scheme.input is None else x + (layer._quantize_input(x).dequantize() - x).detach()
    (F.linear(x_hat, w, layer.bias) * dy).sum().backward()
    return a.grad, b.grad, log_scale.grad


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "w8a8-static"])
def test_gradients_are_those_of_the_equation(scheme):
    layer, kept, bits = layer_of(scheme, LoRA(r=3, scales=True))
    x, dy = torch.randn(2, 5, 72, requires_grad=True), torch.randn(2, 5, 24)
    (layer(x) * dy).sum().backward()
    of_x = x.grad.clone()
    x.grad = None
    a, b, scale = gradients_by_definition(layer, kept, bits, x, dy)
    adapter = layer.adapter
    torch.testing.assert_close(adapter.lora_A.grad, a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.lora_B.grad, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.log_scale.grad, scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_x, x.grad, rtol=1e-4, atol=1e-4)


def test_a_static_range_stops_the_gradient_of_what_it_clips():
    layer, _, _ = layer_of("w8a8-static", LoRA(r=3))
    x = torch.tensor([[0.5] * 36 + [9.0] * 36], requires_grad=True)  # the range ends at 127 * 0.02
    layer(x).sum().backward()
    assert (x.grad[0, :36] != 0).any() and (x.grad[0, 36:] == 0).all()


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a8-g32", "w8a8", "w4a16-g32-asym"])
def test_runs_of_rows_change_nothing(scheme, monkeypatch):
    """Seven rows at a time, 24 in all: the last run is shorter."""
    layer, _, _ = layer_of(scheme, LoRA(r=3, scales=True))
    x, dy = torch.randn(9, 72, requires_grad=True), torch.randn(9, 24)
    results = []
    for at_once in (2**18, 7 * 72):
        monkeypatch.setitem(recompute._WEIGHTS_AT_ONCE, "cpu", at_once)
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        (y * dy).sum().backward()
        assert torch.equal(layer.merged().packed.integers(), layer.merged().packed.integers())
        adapter = layer.adapter
        results.append([y, x.grad.clone(), *(p.grad.clone() for p in adapter.parameters())])
    for whole, in_runs in zip(*results):
        torch.testing.assert_close(whole, in_runs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8"])
def test_no_float_weight_is_kept_for_backward(scheme, inside):
    layer, _, _ = layer_of(scheme, LoRA(r=2, inside=inside))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 72, requires_grad=True)).sum()
    assert kept and all(t.numel() < layer.out_features * layer.in_features for t in kept)


def test_beside_is_the_base_and_lora():
    layer, _, _ = layer_of("w4a16-g32", LoRA(r=3, lora_alpha=5, inside=False))
    x, adapter = torch.randn(4, 72), layer.adapter
    expected = F.linear(x, layer.packed.dequantize(), layer.bias) + 5 / 3 * (
        x @ adapter.lora_A.t() @ adapter.lora_B.t()
    )
    torch.testing.assert_close(layer(x), expected)
    merged = layer.merged()
    target = layer.packed.dequantize() + 5 / 3 * adapter.lora_B @ adapter.lora_A
    error = (merged.packed.dequantize() - target).norm() / (target - layer.packed.dequantize()).norm()
    assert layer.merge_error() == pytest.approx(float(error.detach()), rel=1e-4) and layer.merge_error() > 0.1


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
def test_nf4_takes_an_adapter_beside_and_none_inside(scheme):
    with pytest.raises(UsageError, match="no integers"):
        layer_of(scheme, LoRA(r=3))
    layer, _, _ = layer_of(scheme, LoRA(r=3, inside=False))
    assert layer.merged()(torch.randn(2, 72)).shape == (2, 24)


def test_dropout_inside_leaves_out_columns_of_a_for_a_whole_step():
    layer, _, _ = layer_of("w8a16", LoRA(r=3, lora_dropout=0.5), base_bits=12)
    layer.train()
    x = torch.eye(72)
    torch.manual_seed(1)
    columns = (layer(x) - layer.bias).t()
    torch.manual_seed(1)
    mask = F.dropout(torch.ones(72), 0.5)
    adapter = layer.adapter
    with torch.no_grad():
        adapter.lora_A.mul_(mask)
    layer.eval()
    torch.testing.assert_close(columns, (layer(x) - layer.bias).t())
    assert 10 < int((mask == 0).sum()) < 62


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"r": 0}, "r=0"),
        ({"r": 2.5}, "r=2.5"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"target_modules": ()}, "names no layer"),
        ({"target_modules": "q_proj"}, "no list"),
        ({"base_bits": 0}, "base_bits=0"),
        ({"init": "pissa"}, "init='pissa'"),
        ({"iterations": 0}, "iterations=0"),
        ({"scales": True, "inside": False}, "scales"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(options, word):
    with pytest.raises(UsageError, match=word):
        LoRA(**options)
