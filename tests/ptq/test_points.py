"""Static ranges of points are those of the data that counts, on the quantized blocks before."""

import math

import pytest
import torch

import quantailor as qt
from quantailor.errors import UsageError
from quantailor.models.prepare import FAKE_QUANT
from quantailor.models.structure import modules_of
from quantailor.nn.points import PointQuantizer
from tests.models import zoo

STATIC = dict.fromkeys(("scores", "norm", "gelu", "residual", "embedding", "output"), "a8-static-minmax")


def batches():
    return [zoo.tokens(6, 4), zoo.tokens(5, 3, side="left")]


@torch.no_grad()
def inputs_of(model, name, rows):
    """Values of the rows that count that reach a module, over all batches, [n, N]."""
    kept = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    for batch in rows:
        model(**batch)
    handle.remove()
    return torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(kept, rows)])


@torch.no_grad()
def test_ranges_of_the_first_block_are_the_float_models():
    torch.manual_seed(1)
    model, rows = zoo.bert(), batches()
    quantized = qt.quantize_module(model, "w4a16", rows, method="rtn", points=STATIC)
    layer, block = quantized.bert.encoder.layer[0], "bert.encoder.layer.0"

    def expect(point, values):
        assert torch.allclose(point.scale, values.abs().max().reshape(1) / 127.5, rtol=1e-5)

    expect(layer.intermediate.intermediate_act_fn.output_point, inputs_of(model, f"{block}.output.dense", rows))
    expect(layer.attention.output.LayerNorm.output_point, inputs_of(model, f"{block}.intermediate.dense", rows))
    expect(layer.residual_points[0], inputs_of(model, f"{block}.attention.output.LayerNorm", rows))
    expect(layer.residual_points[1], inputs_of(model, f"{block}.output.LayerNorm", rows))
    expect(layer.embedding_point, inputs_of(model, block, rows))
    own, largest = model.bert.encoder.layer[0].attention.self, 0.0
    kept = []
    handle = own.query.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    for batch in rows:
        model(**batch)
    handle.remove()
    for x, batch in zip(kept, rows):
        for b, mask in enumerate(batch["attention_mask"].bool()):
            q, k = (m(x[b, mask]).view(int(mask.sum()), 4, 8) for m in (own.query, own.key))
            largest = max(largest, float(torch.einsum("qhd,khd->hqk", q, k).abs().max()) / math.sqrt(8))
    expect(layer.attention.self.score_point, torch.tensor(largest))


@torch.no_grad()
def test_the_second_block_sees_the_quantized_first():
    model, rows = zoo.bert(), batches()
    quantized = qt.quantize_module(model, "w2a16-g32", rows, method="rtn", points={"gelu": "a2-static-minmax"})
    found = quantized.bert.encoder.layer[1].intermediate.intermediate_act_fn.output_point.scale.clone()
    block = quantized.bert.encoder.layer[1]
    for _, layer in modules_of(block, FAKE_QUANT):
        layer.weight_quantizer.enabled = False
    # Weights of the second block were moved into their cells by less than a step: take the float model's own.
    for name, module in modules_of(block, FAKE_QUANT):
        module.weight.copy_(model.bert.encoder.layer[1].get_submodule(name).weight)
    for _, point in modules_of(block, PointQuantizer):
        point.enabled = False
    values = inputs_of(quantized, "bert.encoder.layer.1.output.dense", rows)
    assert torch.allclose(found, values.abs().max().reshape(1) / 1.5, rtol=1e-4)
    plain = inputs_of(model, "bert.encoder.layer.1.output.dense", rows).abs().max() / 1.5
    assert (found - plain).abs() > 1e-3 * plain


@pytest.mark.parametrize(
    ("make", "method"), [(zoo.llama, "rtn"), (zoo.llama, "qronos"), (zoo.albert, "rtn"), (zoo.t5, "rtn")]
)
def test_every_point_is_calibrated_and_on_whatever_the_way(make, method):
    rows = batches()
    if make is zoo.t5:
        rows = [{**b, "decoder_input_ids": b["input_ids"]} for b in rows]
    points = {n: "a8-static-minmax" for n in STATIC if not (make is zoo.albert and n == "embedding")}
    quantized = qt.quantize_module(make(), "w8a8", rows, method=method, points={**points, "norm": "a8"})
    found = [m for _, m in modules_of(quantized, PointQuantizer)]
    assert found
    assert all(m.enabled and m.observer is None and m.mask is None for m in found)
    assert all(bool(m.calibrated) for m in found if not m.spec.dynamic)
    outputs = [m.output_quantizer for _, m in modules_of(quantized, FAKE_QUANT) if m.output_quantizer is not None]
    assert outputs
    assert all(bool(q.calibrated) for q in outputs)


def test_more_bits_lose_less():
    torch.manual_seed(2)
    model, rows = zoo.llama(), batches()
    with torch.no_grad():
        expected = [model(**b).logits for b in rows]
    errors = []
    for bits in (8, 6, 4):
        points = {**dict.fromkeys(STATIC, f"a{bits}"), "kv": f"a{bits}", "norm": f"a{bits}-static"}
        quantized = qt.quantize_module(model, "w8a16", rows, method="rtn", points=points)
        with torch.no_grad():
            errors.append(sum(float((quantized(**b).logits - e).square().mean()) for b, e in zip(rows, expected)))
    assert errors[0] < errors[1] < errors[2]


def test_static_points_need_data(tiny_bert):
    with pytest.raises(UsageError, match=r"norm=a8-static needs calibration data.*norm=a8"):
        qt.quantize(tiny_bert, "w8a8", points={"norm": "a8-static"})
    assert qt.quantize(tiny_bert, "w8a8", points={"norm": "a8"}).state.inventory.points
