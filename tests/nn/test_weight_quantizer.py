import pytest
import torch

from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.numerics import grids
from quantailor.numerics.lsq import gradient_scale
from quantailor.observers.weights import weight_scale
from quantailor.spec import NF4, Balanced, Binary, Int, PerChannel, PerGroup, PerTensor, QuantSpec, Scheme
from tests.nn.layers import SCHEMES

SPECS = {name: Scheme.parse(name).weight for name in SCHEMES}


def made(spec, rows=11, length=100):
    weight = torch.randn(rows, length)
    quantizer = WeightQuantizer(spec, rows, length)
    quantizer.set_scale(*weight_scale(weight, spec))
    return quantizer, weight


@pytest.mark.parametrize("name", SPECS)
def test_simulated_values_are_the_dequantized_integers(name):
    quantizer, weight = made(SPECS[name])
    q = quantizer.integers(weight)
    x_hat = quantizer.dequantize(q)
    simulated = quantizer(weight)
    assert q.shape == simulated.shape == weight.shape
    if isinstance(SPECS[name].grid, NF4):
        torch.testing.assert_close(simulated, x_hat, rtol=0, atol=1e-6)
    else:
        assert torch.equal(simulated, x_hat)
    index = torch.tensor([[3, 0], [10, 3]])
    assert torch.equal(quantizer.rows(weight, index), simulated[index])
    quantizer.enabled = False
    assert quantizer(weight) is weight and torch.equal(quantizer.rows(weight, index), weight[index])


@pytest.mark.parametrize(
    "spec, shape, n",
    [
        (QuantSpec(Int(4), PerTensor()), (1, 1, 1), 1100),
        (QuantSpec(Int(4), PerChannel()), (11, 1, 1), 100),
        (QuantSpec(Int(4), PerGroup(32)), (11, 4, 1), 32),
        (QuantSpec(Int(8, symmetric=False), PerGroup(128)), (11, 1, 1), 100),
        (QuantSpec(Binary(), PerGroup(100)), (11, 1, 1), 100),
    ],
    ids=str,
)
def test_shapes_and_lsq_s_gradient_scale(spec, shape, n):
    quantizer = WeightQuantizer(spec, 11, 100)
    assert quantizer.scale.shape == quantizer.zero_point.shape == shape
    assert quantizer.g == gradient_scale(n, grids.limits(spec.grid)[1])
    assert torch.equal(quantizer.scale, torch.ones(shape))


@pytest.mark.parametrize("name", SPECS)
def test_a_scale_is_exactly_where_calibration_put_it(name):
    spec = SPECS[name]
    weight = torch.randn(11, 100)
    scale, zero_point = weight_scale(weight, spec)
    quantizer = WeightQuantizer(spec, 11, 100)
    with torch.no_grad():
        quantizer.log_scale.fill_(0.3)
    quantizer.set_scale(scale, zero_point)
    if name != "nf4-dq":
        assert torch.equal(quantizer.scale, scale) and torch.equal(quantizer.zero_point, zero_point)
    if name != "nf4-dq" and not isinstance(spec.grid, NF4):
        assert not quantizer.log_scale.any()


def test_double_quantization_rounds_the_scales_once():
    spec = SPECS["nf4-dq"]
    quantizer, _ = made(spec, rows=300)
    codes, second, mean = quantizer.doubled
    assert codes.shape == (300, 2) and second.shape == (3,) and mean.shape == (1,)
    other = WeightQuantizer(spec, 300, 100)
    other.set_double(codes, second, mean)
    assert torch.equal(other.scale, quantizer.scale)
    assert made(SPECS["nf4"])[0].doubled is None


def test_scales_keep_their_sign_wherever_training_takes_them():
    """A random walk of the parameter, far beyond any training."""
    quantizer, weight = made(SPECS["w2a16-g32"])
    with torch.no_grad():
        signs = quantizer.scale.sign()
        assert set(signs.unique().tolist()) == {-1.0, 1.0}
        for _ in range(200):
            quantizer.log_scale += torch.randn_like(quantizer.log_scale)
            assert torch.equal(quantizer.scale.sign(), signs) and torch.isfinite(quantizer.scale).all()
            assert torch.isfinite(quantizer(weight)).all()


def test_the_learned_logarithm_has_the_scale_s_gradient_times_the_scale():
    quantizer, weight = made(SPECS["w3a16-g32"])
    grad = torch.randn_like(weight)
    quantizer(weight).backward(grad)
    scale = quantizer.scale.detach().requires_grad_()
    w = torch.nn.functional.pad(weight, (0, 28)).unflatten(1, (4, 32))
    g = torch.nn.functional.pad(grad, (0, 28)).unflatten(1, (4, 32))
    grids.fake_quantize(w, scale, 0, quantizer.spec.grid, quantizer.g).backward(g)
    torch.testing.assert_close(quantizer.log_scale.grad, scale.grad * scale.detach())


@pytest.mark.parametrize("name", [n for n in SPECS if "nf4" not in n])
def test_a_shadow_keeps_the_integers_and_stays_in_their_cells(name):
    quantizer, weight = made(SPECS[name])
    spec = quantizer.spec
    qmin, qmax, offset = grids.limits(spec.grid)
    nearest = quantizer.integers(weight)
    for q in (nearest, torch.randint(qmin, qmax + 1, weight.shape).to(nearest.dtype)):
        shadow = quantizer.shadow(weight, q)
        assert torch.equal(quantizer.integers(shadow), q)
        groups = -(-100 // (spec.group_size or 100))
        size = spec.group_size or 100
        scale = quantizer.scale.detach().expand(11, groups, 1).repeat_interleave(size, 2).flatten(1)[:, :100]
        zero_point = quantizer.zero_point.expand(11, groups, 1).repeat_interleave(size, 2).flatten(1)[:, :100]
        v = shadow / scale + zero_point - offset
        tolerance = 1e-4
        assert ((v - q).abs() <= 0.48 + tolerance).all()
        assert (v > qmin).all() and (v < qmax).all()  # inside LSQ's limits: every weight has a gradient
        # The nearest point of the cell to the old weight: the projection, computed the slow way.
        old = (weight / scale + zero_point - offset).double()
        low = torch.where(q == qmin, q + 0.02, q - 0.48)
        high = torch.where(q == qmax, q - 0.02, q + 0.48)
        candidates = torch.stack([low.double(), high.double(), torch.where((old >= low) & (old <= high), old, low)])
        distance = (candidates - old).abs()
        assert ((v.double() - old).abs() <= distance.amin(0) + tolerance * (1 + old.abs() / 100)).all()


@pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
def test_the_shadow_of_nf4_is_the_level_itself(name):
    quantizer, weight = made(SPECS[name])
    q = torch.randint(0, 16, weight.shape, dtype=torch.int8)
    shadow = quantizer.shadow(weight, q)
    assert torch.equal(shadow, quantizer.dequantize(q)) and torch.equal(quantizer.integers(shadow), q)


@pytest.mark.parametrize("name", ["w8a8", "w4a8-g32", "w4a8-g32-asym", "w2a8-g32-balanced", "w1.58a8"])
def test_the_integer_weight_says_the_same(name):
    quantizer, weight = made(SPECS[name])
    w = quantizer.integer_weight(weight)
    shift = torch.zeros(()) if w.shift is None else w.shift.repeat_interleave(w.group_size or 100, 1)[:, :100]
    scale = w.scale.repeat_interleave(w.group_size or 100, 1)[:, :100]
    assert torch.equal((w.q + shift) * scale, quantizer.dequantize(w.q))
    assert (w.shift is None) == (name in ("w8a8", "w4a8-g32", "w1.58a8"))


def test_scales_that_cannot_be_are_refused():
    quantizer, _ = made(SPECS["w4a16-g32"])
    good = torch.ones(11, 4, 1)
    with pytest.raises(ValueError, match=r"scale has shape \[11, 4\]; this weight needs \[11, 4, 1\]"):
        quantizer.set_scale(good[..., 0], torch.zeros(11, 4, 1))
    for name, bad in (("w4a16-g32", 0.0), ("w4a16-g32", float("nan")), ("w4a16-g32", float("inf")), ("w8a16", -1.0)):
        quantizer, _ = made(SPECS[name])
        broken = torch.ones_like(quantizer.base_scale)
        broken[2] = bad
        with pytest.raises(ValueError, match=r"scale must be finite and (positive|not 0)"):
            quantizer.set_scale(broken, torch.zeros_like(broken))


@pytest.mark.parametrize("name", [n for n in SPECS if "nf4" not in n])
def test_weights_leave_the_edges_of_their_cells_and_keep_their_integers(name):
    """Moved 0.15 of a step inside where a solver left them on an edge; all others stay bit for bit."""
    quantizer, weight = made(SPECS[name])
    spec = quantizer.spec
    qmin, qmax, offset = grids.limits(spec.grid)
    q = torch.randint(qmin, qmax + 1, weight.shape).to(quantizer.integers(weight).dtype)
    shadow = quantizer.shadow(weight, q)
    moved = quantizer.off_the_edges(shadow)
    assert torch.equal(quantizer.integers(moved), q)
    groups, size = -(-100 // (spec.group_size or 100)), spec.group_size or 100
    scale, zero_point = (
        t.detach().float().expand(11, groups, 1).repeat_interleave(size, 2).flatten(1)[:, :100]
        for t in (quantizer.scale, quantizer.zero_point)
    )
    before, after = (w / scale + zero_point - offset - q for w in (shadow, moved))
    edge = (before.abs() > 0.475) & (before.abs() < 0.5)
    if not isinstance(spec.grid, Int | Balanced):
        assert moved is shadow
        return
    assert edge.any() and ((after[edge] - 0.35 * before[edge].sign()).abs() < 1e-3).all()
    assert torch.equal(moved[before.abs() < 0.465], shadow[before.abs() < 0.465])
