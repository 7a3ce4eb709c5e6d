import pytest
import torch
from torch import nn

from quantailor.nn.fake_quant import FakeQuantEmbedding, FakeQuantLinear, fake_quantized
from quantailor.nn.packed import PackedWeight, QuantEmbedding, conv_settings, packed
from quantailor.numerics.packing import words_per_row
from quantailor.spec import Int, PerChannel, PerTensor, QuantSpec, Scheme
from tests.nn.layers import LAYERS, SCHEMES, conv2d, linear, pairs, quantized


@pytest.mark.parametrize(("kind", "scheme"), pairs())
def test_packed_and_simulated_give_the_same_bits(kind, scheme):
    layer, x = LAYERS[kind]()
    simulated = quantized(layer, scheme, x)
    served = packed(simulated)
    quantizer = simulated.weight_quantizer
    assert torch.equal(served.packed.integers(), quantizer.integers(simulated.weight_ON))
    assert torch.equal(served.packed.scales(), quantizer.scale.squeeze(-1))
    with torch.no_grad():
        assert torch.equal(served.packed.dequantize(), quantizer.dequantize(served.packed.integers()))
        for mode in (True, False):
            y = simulated.train(mode)(x)
            assert torch.equal(served(x), y) and y.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "scheme"), [pair for pair in pairs() if pair[0] in ("linear", "conv1d", "embedding", "conv2d")]
)
def test_in_half_precision_as_well(kind, scheme, dtype):
    layer, x = LAYERS[kind]()
    x = x.to(dtype) if x.is_floating_point() else x
    simulated = quantized(layer.to(dtype), scheme, x)
    served = packed(simulated)
    y = simulated(x)
    assert y.dtype == dtype and torch.equal(served(x), y)
    floats = dict(served.packed.named_buffers())
    assert all(b.dtype in (torch.float32, torch.uint8, torch.int8, torch.int32) for b in floats.values())


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "w4a8-g32", "w8a8-outliers0.99", "w8a8-ag2048"])
def test_rows_of_thousands_sum_to_the_same_bits(scheme):
    """All of one sign and near the largest integer: sums that float32 alone would round on their way."""
    layer, _ = linear(length=4096, rows=9)
    nn.init.uniform_(layer.weight, 0.9, 1.0)
    x = torch.rand(20, 4096) * 0.1 + 0.9
    simulated = quantized(layer, scheme, x)
    assert torch.equal(packed(simulated)(x), simulated(x))


@pytest.mark.parametrize("shape", [(100,), (0, 100), (1, 100), (17, 100), (2, 0, 100)])
@pytest.mark.parametrize(
    "scheme", ["w8a8", "w4a8-g32", "w4a16-g32", "w1a1", "w8a8-outliers2", "w4a8-g32-ag32", "w8a8-ag7"]
)
def test_any_number_of_rows(scheme, shape):
    layer, x = linear()
    simulated = quantized(layer, scheme, x)
    x = torch.randn(shape)
    assert torch.equal(packed(simulated)(x), simulated(x)) and simulated(x).shape == (*shape[:-1], 33)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tied_weight_is_packed_once(scheme):
    table, head = nn.Embedding(40, 100), nn.Linear(100, 40, bias=False)
    head.weight = table.weight
    index, x = torch.randint(0, 40, (3, 4)), torch.randn(5, 100)
    simulated = quantized(table, scheme, index)
    output = fake_quantized(head, Scheme.parse(scheme))
    output.weight_quantizer = simulated.weight_quantizer
    if output.input_quantizer is not None and not output.input_quantizer.spec.dynamic:
        output.input_quantizer.set_scale(torch.tensor(0.02))
    assert output.weight is simulated.weight
    first = packed(simulated)
    second = packed(output, first.packed)
    assert second.packed is first.packed
    assert torch.equal(first(index), simulated(index)) and torch.equal(second(x), output(x))


def test_a_quantized_output_gives_the_same_bits():
    spec = QuantSpec(Int(8), PerTensor())
    scheme = Scheme(QuantSpec(Int(4), PerChannel()), spec, spec)
    for layer, x in (linear(), conv2d()):
        simulated = quantized(layer, scheme, x)
        y = simulated(x)
        assert torch.equal(packed(simulated)(x), y)
        assert y.unique().numel() <= 256


def test_one_scale_for_the_tensor():
    for symmetric in (True, False):
        scheme = Scheme(QuantSpec(Int(4, symmetric=symmetric), PerTensor()), Scheme.parse("w8a8").input)
        layer, x = linear()
        simulated = quantized(layer, scheme, x)
        served = packed(simulated)
        assert served.packed.scales().shape == (1, 1) and torch.equal(served(x), simulated(x))
    layer, index = LAYERS["embedding"]()
    simulated = quantized(layer, scheme, index)
    assert torch.equal(packed(simulated)(index), simulated(index))


@pytest.mark.parametrize(
    "scheme, names",
    [
        ("w8a8", {"q", "scale"}),
        ("w4a16-g32", {"words", "scale"}),
        ("w4a16-g128-asym", {"words", "scale", "zero_point"}),
        ("nf4", {"words", "scale"}),
        ("nf4-dq", {"words", "scale_codes", "scale_second", "scale_mean"}),
        ("w1a1", {"words", "scale"}),
    ],
)
def test_what_is_stored(scheme, names):
    layer, x = linear()
    served = packed(quantized(layer, scheme, x))
    assert set(dict(served.packed.named_buffers())) == names
    assert not list(served.parameters())
    bits, group = served.packed.spec.grid.bits, served.packed.spec.group_size
    size = sum(b.numel() * b.element_size() for b in served.packed.buffers())
    groups = 1 if group is None else -(-100 // group)
    expected = 33 * (100 if bits == 8 else 4 * words_per_row(100, bits))
    expected += {"nf4-dq": 33 * groups + 4 + 4, "w4a16-g128-asym": 33 * groups * 5}.get(scheme, 33 * groups * 4)
    assert size == expected


def test_double_quantization_of_a_large_layer_costs_4_127_bits_a_weight():
    """4 bits, 8 for the scale of each 64, 32 for each 256 of these: 4 + 8/64 + 32/(64 * 256) (QLoRA, section 3)."""
    for scheme, bits in (("nf4-dq", 4.127), ("nf4", 4.5)):
        store = PackedWeight(Scheme.parse(scheme).weight, 4096, 4096, device="meta")
        stored = 8 * sum(b.numel() * b.element_size() for b in store.buffers()) / 4096**2
        assert round(stored, 3) == bits


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_outliers_are_chosen_a_call_and_multiply_the_dequantized_weight(kind):
    """LLM.int8 as the paper's section 3.2 says it, from what the packed layer stores."""
    layer, x = LAYERS[kind]()
    x[0, 3, [5, 70]] = torch.tensor([40.0, -50.0])
    served = packed(quantized(layer, "w8a8-outliers", x))
    w_hat = served.packed.dequantize()
    kept = [n for n in range(100) if (x[..., n].abs() >= 6).any()]
    rest = [n for n in range(100) if n not in kept]
    assert kept == [5, 70]
    for rows, columns in ((x, kept), (x[1:], [])):  # without its batch mate no row has an outlier
        others = rest if columns else range(100)
        step = rows[..., others].abs().amax(-1, keepdim=True) / 127.5
        q = torch.round(rows[..., others] / step).clamp(-128, 127)
        expected = q * step @ w_hat[:, others].T + rows[..., columns] @ w_hat[:, columns].T + served.bias
        torch.testing.assert_close(served(rows), expected, rtol=1e-4, atol=1e-4)


def test_empty_buffers_have_the_shapes_of_filled_ones():
    """A loader makes the module first and fills it afterwards."""
    for scheme in SCHEMES:
        layer, x = linear()
        filled = packed(quantized(layer, scheme, x)).packed
        empty = PackedWeight(filled.spec, 33, 100, device="meta")
        assert {n: (b.shape, b.dtype) for n, b in empty.named_buffers()} == {
            n: (b.shape, b.dtype) for n, b in filled.named_buffers()
        }


def test_the_weight_can_be_looked_at():
    for kind in ("linear", "embedding"):
        layer, x = LAYERS[kind]()
        simulated = quantized(layer, "w4a16-g32", x)
        assert torch.equal(packed(simulated).weight, simulated.fake_weight())
    assert repr(packed(simulated)).startswith("QuantEmbedding(\n  w4a16-g32\n  (packed): PackedWeight(40 x 100, Int(")


def test_embeddings_keep_the_dtype_of_the_model():
    layer, index = LAYERS["embedding"]()
    served = packed(quantized(layer.bfloat16(), "w8a16", index))
    assert served.dtype == served(index).dtype == torch.bfloat16
    assert QuantEmbedding(served.scheme, served.packed, None).dtype == torch.float32


def test_packing_keeps_the_mode_and_copies_the_bias():
    layer, x = linear()
    simulated = quantized(layer, "w8a8", x)
    for mode in (True, False):
        served = packed(simulated.train(mode))
        assert served.training is mode
    assert served.bias.data_ptr() != simulated.bias.data_ptr() and torch.equal(served.bias, simulated.bias)
    assert (served.packed.in_features, served.packed.out_features) == (served.in_features, served.out_features)


def test_padding_that_is_not_zeros_is_refused():
    layer, _ = conv2d(padding_mode="reflect")
    with pytest.raises(ValueError, match="padding_mode='reflect': only zeros can be packed; keep this layer by a rule"):
        conv_settings(layer)


def test_simulated_layers_are_still_what_they_replace():
    """So that peft and isinstance walks find them."""
    layer, x = linear()
    assert isinstance(quantized(layer, "w8a8", x), nn.Linear) and isinstance(
        quantized(*conv_first(), moved=False), nn.Conv2d
    )
    table, index = LAYERS["embedding"]()
    twin = quantized(table, "w8a8", index)
    assert isinstance(twin, nn.Embedding) and isinstance(twin, FakeQuantEmbedding) and twin.input_quantizer is None
    assert isinstance(quantized(*LAYERS["conv1d"]()[:1], "w8a8", x), FakeQuantLinear)


def conv_first():
    layer, x = conv2d()
    return layer, "w8a8", x
