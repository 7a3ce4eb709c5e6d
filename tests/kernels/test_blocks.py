"""A block in one native call, against its formula written out in float64."""

import pytest
import torch
import torch.nn.functional as F

from quantailor.kernels import decode
from quantailor.kernels.blocks import BlockShape, NativeBlock
from quantailor.kernels.decode import StoredWeight
from quantailor.kernels.native import library as native
from quantailor.numerics.grouping import per_element
from quantailor.numerics.packing import pack

pytestmark = pytest.mark.skipif(
    native.library() is None or not decode.has_kernel(), reason="no compiler, or no AVX2: there is no kernel to test"
)


def stored(out, length, bits):
    """(the weight as the kernel takes it, the same as float64 [O, N]); 32 bits: a float weight."""
    if bits == 32:
        weight = torch.randn(out, length) * length**-0.5
        return weight, weight.double()
    u = torch.randint(0, 2**bits, (out, length))
    scale = torch.rand(out, -(-length // 64)) * length**-0.5 * 2.0 ** (1 - bits)
    held = StoredWeight(pack(u, bits), scale, bits, length, 64, -(2.0 ** (bits - 1)))
    return held, (u.double() - 2 ** (bits - 1)) * per_element(scale.double(), length, 64)


class Case:
    """A random block and its formula."""

    def __init__(self, kinds, heads=4, kv_heads=2, dim=16, width=72, inner=108, biased=False, normed=False, act="silu"):
        torch.manual_seed(len(kinds) + heads + sum(kinds))
        kv, whole = kv_heads * dim, heads * dim
        sizes = [
            (whole, width),
            (kv, width),
            (kv, width),
            (width, whole),
            (inner, width),
            (inner, width),
            (width, inner),
        ]
        made = [stored(out, length, bits) for (out, length), bits in zip(sizes, kinds)]
        self.weights = [float64 for _, float64 in made]
        self.biases = [torch.randn(out) * 0.1 if biased else None for out, _ in sizes]
        gains = [torch.rand(width) + 0.5, torch.rand(width) + 0.5]
        gains += [torch.rand(dim) + 0.5 if normed else None for _ in range(2)]
        self.gains, self.heads, self.kv_heads, self.dim, self.act = gains, heads, kv_heads, dim, act
        shape = BlockShape(heads, kv_heads, dim, dim**-0.5, 1e-5, 1e-6, act)
        self.native = NativeBlock([held for held, _ in made], self.biases, gains, shape)

    def times(self, i, x):
        y = self.weights[i] @ x
        return y if self.biases[i] is None else y + self.biases[i].double()

    def norm(self, x, gain, eps):
        return x if gain is None else x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain.double()

    def turn(self, x, cos, sin):
        half = self.dim // 2
        return x * cos + torch.cat([-x[:, half:], x[:, :half]], -1) * sin

    def __call__(self, x, cos, sin, keys, values, position, visible):
        """The formula in native/block.c; changes `keys` and `values` float64."""
        n = self.norm(x, self.gains[0], 1e-5)
        q, k, v = (self.times(i, n).view(-1, self.dim) for i in range(3))
        q, k = self.norm(q, self.gains[2], 1e-6), self.norm(k, self.gains[3], 1e-6)
        q, keys[:, position] = self.turn(q, cos, sin), self.turn(k, cos, sin)
        values[:, position] = v
        repeat = self.heads // self.kv_heads
        scores = torch.einsum("hd,hld->hl", q, keys.repeat_interleave(repeat, 0)) * self.dim**-0.5
        hidden = ~visible
        hidden[position + 1 :] = True
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        mixed = torch.einsum("hl,hld->hd", shares, values.repeat_interleave(repeat, 0))
        x = x + self.times(3, mixed.flatten())
        m = self.norm(x, self.gains[1], 1e-5)
        gate = self.times(4, m)
        act = F.silu(gate) if self.act == "silu" else F.gelu(gate, approximate="tanh")
        return x + self.times(6, act * self.times(5, m))


def run(case, places=19, in_int8=False, steps=7):
    """Largest difference from the formula over the largest output, over some tokens."""
    dim, kv = case.dim, case.kv_heads
    keys, values = torch.randn(2, kv, places, dim)
    held = (keys.clone(), values.clone())
    scales = None
    if in_int8:
        scales = tuple(t.abs().amax(-1) / 127 for t in held)
        held = tuple(torch.round(t / s.unsqueeze(-1)).to(torch.int8) for t, s in zip(held, scales))
        keys, values = (t * s.unsqueeze(-1) for t, s in zip(held, scales))
    keys, values, worst = keys.double(), values.double(), 0.0
    for position in range(places - steps, places):
        x, angles = torch.randn(case.gains[0].numel()), torch.rand(dim // 2).repeat(2) * 6
        visible = torch.rand(places) > 0.3
        visible[position] = True
        turns = (angles.cos(), angles.sin())
        expected = case(x.double(), *(t.double() for t in turns), keys, values, position, visible.clone())
        case.native(x, *turns, *held, position, visible, scales)
        worst = max(worst, float((x - expected).abs().max() / expected.abs().max()))
    return worst, held, keys


@pytest.mark.parametrize("kinds", [[4] * 7, [8] * 7, [32] * 7, [4, 8, 2, 3, 1, 4, 8], [32, 4, 4, 8, 8, 3, 32]])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_equal_to_the_formula(kinds, biased, normed):
    worst, held, keys = run(Case(kinds, biased=biased, normed=normed))
    assert worst <= 2e-4  # inputs are held in 16 bits
    assert torch.allclose(held[0].double(), keys, atol=1e-3)


@pytest.mark.parametrize("heads", [(6, 1), (3, 3), (1, 1), (8, 4)])
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_heads_and_activations(heads, act):
    assert run(Case([4] * 7, *heads, dim=8, width=40, inner=36, act=act))[0] <= 2e-4


def test_keys_and_values_in_int8():
    worst, held, _ = run(Case([32] * 7), in_int8=True)
    assert held[0].dtype == torch.int8
    assert 1e-5 < worst <= 2e-2  # half a 127th of a row's largest for each new key and value


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads):
    before = torch.get_num_threads()
    found = []
    try:
        for count in (2, threads):
            torch.set_num_threads(count)
            case = Case([4] * 7)
            keys = torch.zeros(2, 2, 4, 16)
            x = torch.linspace(-1, 1, 72)
            case.native(x, torch.ones(16), torch.zeros(16), keys[0], keys[1], 0, torch.ones(4, dtype=torch.bool))
            found.append((x, keys))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("in_int8", [False, True])
def test_what_is_not_finite_stays_so(in_int8):
    """In its own token and, through keys and values, in those after it; a token that may not look at it is sound."""
    case = Case([4] * 7)
    cache = torch.zeros(2, 2, 4, 16, dtype=torch.int8 if in_int8 else torch.float32)
    scales = tuple(torch.zeros(2, 2, 4)) if in_int8 else None
    visible, turns = torch.ones(4, dtype=torch.bool), (torch.ones(16), torch.zeros(16))
    for position, sees in enumerate((True, True, False)):
        x = torch.ones(72)
        x[5] = torch.inf if position == 0 else 1.0
        visible[0] = sees
        case.native(x, *turns, *cache, position, visible, scales)
        assert bool(x.isnan().all()) if sees else bool(x.isfinite().all())
