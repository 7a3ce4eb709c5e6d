import dataclasses
import math

import pytest
import torch

from quantailor.errors import UntrustedInput, UsageError
from quantailor.nn.activation_quantizer import ActivationQuantizer, quantize_activation
from quantailor.numerics.lsq import lsq
from quantailor.observers.ranges import make_observer
from quantailor.spec import (
    NF4,
    Balanced,
    Binary,
    Int,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    Ternary,
)


def dynamic(grid):
    return QuantSpec(grid, PerToken(), dynamic=True, range="minmax")


@pytest.mark.parametrize("grid", [Int(8), Int(4), Int(2), Int(8, narrow=True), Binary()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dynamic_simulated_values_are_integers_times_scale(grid, dtype):
    quantizer = ActivationQuantizer(dynamic(grid))
    x = torch.randn(2, 3, 10, dtype=dtype)
    found = quantizer.integers(x)
    assert found.q.dtype == torch.int8 and found.scale.shape == (2, 3, 1)
    assert torch.equal(quantizer(x), (found.q * found.scale).to(dtype))
    assert not list(quantizer.parameters()) and not list(quantizer.buffers())
    quantizer.enabled = False
    assert quantizer(x) is x


@pytest.mark.parametrize("method", ["minmax", "ema", "mse", "percentile", "kl", "histogram"])
@pytest.mark.parametrize("bits", [8, 4])
def test_static_from_calibration_to_integers(method, bits):
    spec = QuantSpec(Int(bits), PerTensor(), range=method)
    quantizer, observer = ActivationQuantizer(spec), make_observer(method, spec.grid)
    assert not quantizer.calibrated
    data = [torch.randn(3, 4, 10) * (i + 1) for i in range(4)]
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    quantizer.start_calibration()
    quantizer.mask = mask
    for x in data:
        assert quantizer(x) is x
        observer.observe(x[mask.bool()])
    quantizer.finish_calibration()
    expected, _ = observer.scale_zero_point(spec.grid)
    assert quantizer.calibrated and torch.equal(quantizer.scale, expected.reshape(1)) and quantizer.observer is None
    found = quantizer.integers(data[0])
    q = torch.round(data[0] * (1 / expected)).clamp(spec.grid.qmin, spec.grid.qmax)
    assert torch.equal(found.q, q.to(torch.int8))
    assert torch.equal(quantizer(data[0]), q * quantizer.scale)


def test_the_percentile_of_the_spec_is_the_observer_s():
    quantizer = ActivationQuantizer(QuantSpec(Int(8), PerTensor(), range="percentile", percentile=90.0))
    quantizer.start_calibration()
    quantizer(torch.linspace(-1, 3, 2001))
    quantizer.finish_calibration()
    assert abs(quantizer.scale.item() * 127.5 - 2.6) < 0.005  # 0 .. 1 twice, 1 .. 3 once: 90 % of |x| is below 2.6


def test_static_gradients_are_lsq_s():
    quantizer = ActivationQuantizer(QuantSpec(Int(4), PerTensor()))
    quantizer.set_scale(torch.tensor(0.3))
    x = torch.randn(3, 5, 16, requires_grad=True)
    grad = torch.randn(3, 5, 16)
    quantizer(x).backward(grad)
    leaves = x.detach().clone().requires_grad_(), torch.tensor([0.3], requires_grad=True)
    lsq(*leaves, 0, -8, 7, g=(16 * 7) ** -0.5).backward(grad)
    torch.testing.assert_close(x.grad, leaves[0].grad)
    torch.testing.assert_close(quantizer.log_scale.grad, leaves[1].grad * 0.3)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_static_scale_is_finite_and_positive(bad):
    quantizer = ActivationQuantizer(QuantSpec(Int(8), PerTensor()))
    with pytest.raises(ValueError, match="scale must be finite and positive"):
        quantizer.set_scale(torch.tensor(bad))
    assert not quantizer.calibrated


def test_a_static_scale_stays_positive_in_training():
    quantizer = ActivationQuantizer(QuantSpec(Int(8), PerTensor()))
    quantizer.set_scale(torch.tensor(1e-3))
    with torch.no_grad():
        for _ in range(300):
            quantizer.log_scale += torch.randn(1)
            assert quantizer.scale > 0 and torch.isfinite(quantizer.scale)


def test_calibration_without_sound_data_is_an_error():
    quantizer = ActivationQuantizer(QuantSpec(Int(8), PerTensor()))
    quantizer.start_calibration()
    with pytest.raises(UntrustedInput, match="an observer saw no data"):
        quantizer.finish_calibration()
    quantizer(torch.full((2, 3), math.nan))
    with pytest.raises(UntrustedInput, match="1 of 1 calibration batches held NaN or Inf"):
        quantizer.finish_calibration()


def test_dynamic_scales_need_no_calibration():
    quantizer = ActivationQuantizer(dynamic(Int(8)))
    quantizer.start_calibration()
    assert quantizer.observer is None
    quantizer.finish_calibration()


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(Int(8, symmetric=False), PerTensor()),
        dynamic(Int(8, symmetric=False)),
        QuantSpec(Int(8), PerChannel()),
        QuantSpec(Int(8), PerGroup(32)),
        QuantSpec(Int(8, symmetric=False), PerGroup(32), dynamic=True),
        QuantSpec(Binary(), PerGroup(32), dynamic=True),
        QuantSpec(Int(8), PerTensor(), dynamic=True),
        QuantSpec(Binary(), PerTensor()),
        dynamic(Ternary()),
        QuantSpec(Balanced(2), PerTensor()),
        QuantSpec(NF4(), PerGroup(64)),
    ],
    ids=str,
)
def test_specs_that_activations_cannot_have_are_refused(spec):
    with pytest.raises(UsageError) as error:
        ActivationQuantizer(spec)
    assert "use a symmetric integer grid, per token or group (dynamic) or per tensor (static)" in str(error.value)


def test_the_packed_layer_takes_the_same_road():
    x = torch.randn(2, 3, 10)
    for spec, scale in ((dynamic(Int(8)), None), (dynamic(Binary()), None), (QuantSpec(Int(8), PerTensor()), 0.02)):
        quantizer = ActivationQuantizer(spec)
        if scale:
            quantizer.set_scale(torch.tensor(scale))
        ours, simulated = quantize_activation(x, spec, torch.tensor([scale]) if scale else None), quantizer.integers(x)
        assert torch.equal(ours.q, simulated.q) and torch.equal(ours.scale, simulated.scale)


@pytest.mark.parametrize("grid", [Int(8), Int(3), Int(4, narrow=True)], ids=str)
@pytest.mark.parametrize("size", [1, 4, 7, 10, 64])
def test_groups_have_a_scale_each(size, grid):
    """Every group as if it were a token of its own; the last may be shorter."""
    x = torch.randn(2, 3, 10) * torch.logspace(-2, 2, 10)
    quantizer = ActivationQuantizer(QuantSpec(grid, PerGroup(size), dynamic=True))
    found = quantizer.integers(x)
    assert found.group_size == size and found.scale.shape == (2, 3, -(-10 // size))
    whole = ActivationQuantizer(dynamic(grid))
    for group, start in enumerate(range(0, 10, size)):
        alone = whole.integers(x[..., start : start + size])
        assert torch.equal(found.q[..., start : start + size], alone.q)
        assert torch.equal(found.scale[..., group], alone.scale.squeeze(-1))
        assert torch.equal(quantizer(x)[..., start : start + size], whole(x[..., start : start + size]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outlier_columns_are_those_of_the_whole_call(dtype):
    """Any row's magnitude at the threshold takes the column out of all rows; the others do not see it."""
    x = torch.randn(4, 3, 10).clamp(-2, 2).to(dtype)
    x[0, 1, 7], x[3, 2, 2], x[1, 0, 4] = -6.0, 100.0, 5.96875
    quantizer = ActivationQuantizer(dataclasses.replace(dynamic(Int(8)), outliers=6.0))
    found = quantizer.integers(x)
    rest = [0, 1, 3, 4, 5, 6, 8, 9]
    assert found.columns.tolist() == [2, 7] and torch.equal(found.values, x[..., [2, 7]].float())
    alone = ActivationQuantizer(dynamic(Int(8))).integers(x[..., rest])
    assert not found.q[..., [2, 7]].any() and torch.equal(found.q[..., rest], alone.q)
    assert torch.equal(found.scale, alone.scale)
    y = quantizer(x)
    assert y.dtype == dtype and torch.equal(y[..., [2, 7]], x[..., [2, 7]])
    assert torch.equal(y[..., rest], alone.dequantize().to(dtype))
    row = quantizer.integers(x[1:2])
    assert row.columns.tolist() == [] and not torch.equal(row.q[0, 0], found.q[1, 0])  # alone, it is another row


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(Int(8), PerGroup(4), dynamic=True), dataclasses.replace(dynamic(Int(8)), outliers=1.5)],
    ids=["groups", "outliers"],
)
def test_dynamic_gradients_are_the_identity(spec):
    x, grad = torch.randn(3, 10, requires_grad=True), torch.randn(3, 10)
    ActivationQuantizer(spec)(x).backward(grad)
    assert torch.equal(x.grad, grad)


@pytest.mark.parametrize(
    "spec",
    [
        dynamic(Int(8)),
        dynamic(Int(2)),
        QuantSpec(Int(8), PerTensor()),
        QuantSpec(Int(8), PerGroup(3), dynamic=True),
        dataclasses.replace(dynamic(Int(8)), outliers=6.0),
    ],
    ids=str,
)
def test_zeros_denormals_and_one_token(spec):
    quantizer = ActivationQuantizer(spec)
    for x in (
        torch.zeros(2, 8),
        torch.full((1, 8), 1e-42),
        torch.full((3, 8), -7.0),
        torch.randn(1, 1),
        torch.ones(0, 8),
    ):
        y = quantizer(x)
        assert y.shape == x.shape and torch.isfinite(y).all()
        assert torch.equal(y, quantizer.integers(x).dequantize())
