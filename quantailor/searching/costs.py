"""What a layer costs under a scheme: bytes as they are stored, or nanoseconds as they are measured."""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch import nn

from quantailor.models.prepare import pack_model
from quantailor.models.structure import modules_of
from quantailor.nn.fake_quant import FakeQuantLinear, fake_quantized
from quantailor.nn.packed import PackedWeight
from quantailor.observers.weights import weight_scale
from quantailor.spec import QuantSpec, Scheme


def packed_bytes(spec: QuantSpec | None, out_features: int, in_features: int, float_bytes: int = 4) -> int:
    """Bytes of a weight as `PackedWeight` stores it: integers with the padding of each row, scales, zero points.

    `spec` None: the float weight, `float_bytes` an element.
    """
    if spec is None:
        return out_features * in_features * float_bytes
    stored = PackedWeight(spec, out_features, in_features, device="meta")
    return sum(b.numel() * b.element_size() for b in stored.buffers())


@torch.no_grad()
def packed_nanoseconds(layer: nn.Linear, scheme: Scheme, tokens: int = 1, repeats: int = 15) -> int:
    """Median time of one call of the packed layer on `tokens` rows, on the layer's device, in whole nanoseconds.

    `scheme` float: of the layer as it is. Dynamic or no activation scales: static ones need calibration first.
    """
    timed: nn.Module = layer
    if not scheme.is_float:
        twin = fake_quantized(copy.deepcopy(layer), scheme)
        assert isinstance(twin, FakeQuantLinear)
        if twin.weight_quantizer is not None:
            twin.weight_quantizer.set_scale(*weight_scale(twin.weight_ON, twin.weight_quantizer.spec))
        timed = pack_model(nn.Sequential(twin))
        assert not any(True for _ in modules_of(timed, FakeQuantLinear))
    x = torch.randn(tokens, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.weight)
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    times = []
    for number in range(repeats + 3):
        began = time.perf_counter_ns()
        timed(x)
        wait()
        if number >= 3:
            times.append(time.perf_counter_ns() - began)
    return int(statistics.median(times))
