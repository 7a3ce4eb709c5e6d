"""HQQ on one layer, without data."""

import torch
from cost_job import BITS, GROUP, WEIGHT, serve
from hqq.core.quantize import Quantizer

settings = {"nbits": BITS, "group_size": GROUP, "axis": 1, "optimize": True, "device": "cpu"}


def solve(_: object) -> torch.Tensor:
    w_q, meta = Quantizer.quantize(WEIGHT, compute_dtype=torch.float32, bitpack=False, **settings)
    return Quantizer.dequantize(w_q, meta)


serve("hqq", settings, lambda: None, solve)
