"""NF4: sixteen levels at quantiles of a normal distribution, and scales that are quantized a second time.

    x_hat = absmax * LEVELS[q],  q = the nearest level,  blocks of 64 share absmax.
Double quantization stores absmax, minus its mean, in 8-bit floats (E4M3) with one FP32 scale for every 256 of them:
4 + 8/64 + 32/(64*256) = 4.127 bits a weight.

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E (the levels, as published there).
"""

import torch
from torch import Tensor

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)  # fmt: skip
SECOND_BLOCK = 256
_E4M3_MAX = 448.0


def encode(x: Tensor, absmax: Tensor) -> Tensor:
    """Index of the nearest level, in absmax.dtype. Shapes: `x` [*], `absmax` broadcastable. Returns uint8 [*]."""
    levels = torch.tensor(LEVELS, dtype=absmax.dtype, device=x.device)
    boundaries = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize((x.to(absmax.dtype) / absmax).contiguous(), boundaries).to(torch.uint8)


def decode(q: Tensor, absmax: Tensor) -> Tensor:
    """The reals that indices stand for, in absmax.dtype."""
    levels = torch.tensor(LEVELS, dtype=absmax.dtype, device=q.device)
    return levels[q.long()] * absmax


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the scales themselves. `absmax` [*] -> codes uint8 [*] (E4M3 bits), scales [ceil(n/256)], mean [1]."""
    flat = absmax.float().flatten()
    mean = flat.double().mean().float()
    blocks = torch.nn.functional.pad(flat - mean, (0, -flat.numel() % SECOND_BLOCK)).unflatten(0, (-1, SECOND_BLOCK))
    second = blocks.abs().amax(1) / _E4M3_MAX
    second = torch.where(second > 0, second, torch.ones_like(second))
    codes = (blocks / second[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.flatten()[: flat.numel()].reshape(absmax.shape), second, mean.reshape(1)


def double_dequantize(codes: Tensor, second: Tensor, mean: Tensor) -> Tensor:
    """The scales that `double_quantize` stored. Returns float32, the shape of `codes`.

    Error: at most 1/16 of a scale's distance from the mean; one that would fall to 0 or below is the smallest positive
    normal number instead.
    """
    values = codes.flatten().view(torch.float8_e4m3fn).float()
    values = values * second.repeat_interleave(SECOND_BLOCK)[: values.numel()] + mean
    return values.clamp(min=torch.finfo(torch.float32).tiny).reshape(codes.shape)
