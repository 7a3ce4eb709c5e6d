"""Our account of compressed-tensors' arithmetic, held against compressed-tensors itself, to the last bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantailor import api
from quantailor.formats.stock import as_stock, flat_inputs, stock_logits
from tests.formats.making import quantized, rule


def layer(scheme, rows=24, columns=40):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(columns, rows))
    batches = [{"input": torch.randn(2, 4, columns)}]
    return api.pack_module(api.quantize_module(model, scheme, batches, method="rtn"))


@pytest.mark.parametrize("shape", [(2, 5, 40), (1, 1, 40), (3, 40), (1, 40), (2, 3, 4, 40)])
def test_a_layer_gives_the_bits_of_compressed_tensors(shape):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    model = layer("w8a8")
    x = torch.randn(shape) * 3
    x[0] = x[0].masked_fill(torch.rand(x[0].shape) < 0.3, 0)
    if len(shape) == 3:
        x[-1, -1] = 0  # a token of nothing
    arguments = quantization.QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    scale, zero_point = compute_dynamic_scales_and_zp(x, arguments, nn.Module())
    expected = F.linear(fake_quantize(x, scale, zero_point, arguments), model[0].packed.dequantize(), model[0].bias)
    with as_stock(model), torch.no_grad():
        assert torch.equal(model(x), expected)
    with torch.no_grad():  # and afterwards it is ours again: the same to float precision where tokens are scaled alike
        ours = model(x)
    if len(shape) == 3:
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=3e-2)


def test_layers_with_float_inputs_are_left_alone():
    model = layer("w4a16-g8")
    before = model[0].forward
    with as_stock(model):
        assert model[0].forward == before


def test_what_gets_a_flat_input_is_named(classifier, lm):
    bert = api.pack(quantized(classifier, "w8a8", [rule("*.pooler.dense", "w8a8")], method="rtn")).model
    ids = torch.randint(3, 40, (2, 7))
    probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert flat_inputs(bert, probe) == ["bert.pooler.dense"]
    llama = api.pack(quantized(lm, "w8a8", method="rtn")).model
    assert flat_inputs(llama, probe) == []
    ours = llama(**probe).logits
    assert (stock_logits(llama, probe) - ours).abs().max() <= 2e-2 * ours.abs().max()
