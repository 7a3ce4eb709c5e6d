"""Fake-quantized layers with searched scales, as calibration leaves them: what the tests of modules start from."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantailor.nn.fake_quant import fake_quantized
from quantailor.observers.weights import weight_scale
from quantailor.spec import (
    KNOWN_SCHEMES,
    NF4,
    Balanced,
    Binary,
    Int,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
    Scheme,
    Ternary,
    why_not_convolution,
)

SCHEMES = [name for name in KNOWN_SCHEMES if name != "float"] + [
    *("w8a8-asym", "w8a16-asym", "w4a8-g32-asym", "w8a8-asym-static", "w4a8-g32-static", "w3a16-g32-asym"),
    *("w2a8-g32-balanced", "w1a8-g32", "w5a4-g7", "w1.58a16-g64", "w7a8-g100"),
    *("w8a8-outliers2", "w4a8-g32-asym-outliers2", "w2a8-g32-balanced-outliers1.5", "w8a8-asym-outliers2.5"),
    *("w4a8-ag7", "w4a8-g7-ag7-asym", "w1a8-ag32", "w8a8-g200-ag200"),
]


def linear(bias=True, rows=33, length=100):
    return nn.Linear(length, rows, bias=bias), torch.randn(2, 5, length)


def conv1d():
    layer = Conv1D(33, 100)
    nn.init.normal_(layer.bias)
    return layer, torch.randn(2, 5, 100)


def embedding():
    return nn.Embedding(40, 100, padding_idx=0), torch.randint(0, 40, (3, 7))


def conv2d(**options):
    settings = {"kernel_size": 3, "padding": 1, "stride": 2, **options}
    return nn.Conv2d(6, 10, **settings), torch.randn(3, 6, 9, 8)


LAYERS = {
    "linear": linear,
    "linear without bias": lambda: linear(bias=False),
    "conv1d": conv1d,
    "embedding": embedding,
    "conv2d": conv2d,
    "conv2d grouped": lambda: conv2d(groups=2, bias=False),
    "conv2d same": lambda: conv2d(kernel_size=(4, 3), padding="same", dilation=(1, 2), stride=1),
    "conv2d valid": lambda: conv2d(kernel_size=(1, 5), padding="valid"),
}


def pairs():
    """Each kind of layer with each scheme that it can have."""
    convolutions = [s for s in SCHEMES if why_not_convolution(Scheme.parse(s)) is None]
    return [(kind, s) for kind in LAYERS for s in (convolutions if "conv2d" in kind else SCHEMES)]


# [33, 100] weights that break naive scales; each function works in place.
PATHOLOGICAL = {
    "zero": lambda w: w.zero_(),
    "zero row": lambda w: w[3].zero_(),
    "zero group": lambda w: w[:, 32:64].zero_(),
    "constant": lambda w: w.fill_(0.3),
    "constant row": lambda w: w[5].fill_(-2.0),
    "denormal": lambda w: w.mul_(1e-42),
    "denormal row": lambda w: w[2].mul_(1e-41),
    "smallest normal": lambda w: w.mul_(1e-37),
    "one outlier": lambda w: w[0, 0].fill_(1e4),
    "3e38": lambda w: w[1, 7].fill_(3e38),
    "-3e38 row": lambda w: w[4].fill_(-3e38),
    "both 3e38": lambda w: w[6].copy_(torch.tensor([3e38, -3e38]).repeat(50)),
}
SPECS = [
    QuantSpec(Int(bits, symmetric=symmetric), granularity)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for granularity in (PerTensor(), PerChannel(), PerGroup(32))
] + [
    *(QuantSpec(grid, PerGroup(32)) for grid in (Balanced(2), Ternary(), Binary(), NF4(), NF4(double_quant=True))),
    *(QuantSpec(grid, PerTensor()) for grid in (Balanced(2), Ternary(), Binary())),
    QuantSpec(Int(4, narrow=True), PerGroup(32), range="minmax"),
]


def quantized(layer, scheme, x, moved=True):
    """The twin of `layer` on searched scales, moved a little as training would."""
    twin = fake_quantized(layer, Scheme.parse(scheme) if isinstance(scheme, str) else scheme)
    twin.weight_quantizer.set_scale(*weight_scale(twin.weight_ON, twin.weight_quantizer.spec))
    activations = [q for q in (twin.input_quantizer, twin.output_quantizer) if q is not None and not q.spec.dynamic]
    for quantizer in activations:
        quantizer.start_calibration()
    twin(x)
    for quantizer in activations:
        quantizer.finish_calibration()
    if moved:
        with torch.no_grad():
            for quantizer in (twin.weight_quantizer, *activations):
                if quantizer.log_scale.requires_grad:
                    quantizer.log_scale.add_(0.1 * torch.randn_like(quantizer.log_scale))
    return twin
