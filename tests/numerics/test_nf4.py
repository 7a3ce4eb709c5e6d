import pytest
import torch

from quantailor.numerics import nf4

# arXiv:2305.14314, appendix E.
PUBLISHED = """
-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0
"""


def test_the_levels_are_the_published_ones():
    assert tuple(float(level) for level in PUBLISHED.split(",")) == nf4.LEVELS


def test_the_levels_are_quantiles_of_the_normal_distribution():
    """As bitsandbytes makes them: 7 quantiles below 0, 0 itself, 8 above, evenly spaced in probability to 0.9677083."""
    above = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)]) / above.max()
    torch.testing.assert_close(torch.tensor(nf4.LEVELS, dtype=torch.float64), levels, rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_level_by_brute_force(dtype):
    x = torch.cat([torch.randn(60, 64), torch.linspace(-1, 1, 640).view(10, 64), torch.zeros(1, 64)]).to(dtype)
    absmax = x.abs().amax(1, keepdim=True).clamp(min=0.1)
    q = nf4.encode(x, absmax)
    assert q.dtype == torch.uint8 and int(q.max()) == 15
    distance = (
        x[..., None].double() / absmax[..., None].double() - torch.tensor(nf4.LEVELS, dtype=torch.float64)
    ).abs()
    torch.testing.assert_close(distance.gather(-1, q.long()[..., None])[..., 0], distance.amin(-1), rtol=0, atol=1e-7)
    decoded = nf4.decode(q, absmax)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, torch.tensor(nf4.LEVELS, dtype=dtype)[q.long()] * absmax)
    assert torch.equal(nf4.encode(decoded, absmax), q)
    assert not decoded[-1].any()  # 0 is a level


def test_the_largest_element_of_a_block_is_exact():
    x = torch.randn(50, 64)
    absmax = x.abs().amax(1, keepdim=True)
    decoded = nf4.decode(nf4.encode(x, absmax), absmax)
    at = x.abs().argmax(1, keepdim=True)
    assert torch.equal(decoded.gather(1, at), x.gather(1, at))


@pytest.mark.parametrize("shape", [(7,), (256,), (3, 100), (40, 64)])  # within, at and across blocks of 256
def test_double_quantization_by_its_definition(shape):
    absmax = torch.rand(shape) + 0.5
    codes, second, mean = nf4.double_quantize(absmax)
    flat = absmax.flatten()
    assert codes.shape == shape and second.shape == (-(-flat.numel() // 256),) and mean.shape == (1,)
    centred = flat - flat.double().mean().float()
    expected = []
    for block, step in zip(centred.split(256), second):
        assert step == block.abs().max() / 448
        expected.append((block / step).to(torch.float8_e4m3fn).float() * step)
    restored = nf4.double_dequantize(codes, second, mean)
    assert torch.equal(restored, (torch.cat(expected) + mean).view(shape))
    # E4M3 has 3 bits of mantissa: half a unit of the last is 1/16; below 2^-6 its step is fixed.
    error = (restored.flatten() - flat).abs()
    assert (error <= centred.abs() / 16 + second.repeat_interleave(256)[: len(flat)] * 2**-10 + 1e-6).all()


def test_double_quantization_takes_4127_thousandths_of_a_bit_more_than_the_integers():
    num_weights = 64 * 256 * 3
    codes, second, _ = nf4.double_quantize(torch.rand(num_weights // 64))
    bits = 4 + (codes.numel() * 8 + second.numel() * 32) / num_weights
    assert bits == 4 + 8 / 64 + 32 / (64 * 256) and round(bits, 3) == 4.127


@pytest.mark.parametrize(
    "absmax",
    [
        torch.cat([torch.full((200,), 1e-4), torch.full((56,), 5.0)]),
        torch.tensor([1.0, 1e-3, 3e38, 3e38, 1e-30]),
        torch.full((300,), 0.25),
        torch.tensor([0.3]),
        torch.logspace(-38, 38, 700),
    ],
    ids=["two sizes", "outliers", "all alike", "one", "every size"],
)
def test_double_quantized_scales_stay_finite_and_positive(absmax):
    restored = nf4.double_dequantize(*nf4.double_quantize(absmax))
    assert torch.isfinite(restored).all() and (restored > 0).all()
    if absmax.unique().numel() == 1:
        assert torch.equal(restored, absmax)
