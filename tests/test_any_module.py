"""Any nn.Module goes through: a small CNN and an MLP, quantized, packed, with the same outputs."""

import pytest
import torch
from torch import nn

import quantailor as qt


class TinyCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, pixel_values):
        x = self.point(self.depthwise(self.stem(pixel_values).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 33), nn.GELU(), nn.Linear(33, 4))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "w4a16", "w4a16-g32"])
@pytest.mark.parametrize("kind", [TinyCNN, MLP])
@pytest.mark.parametrize("method", ["rtn", "gptq", "qronos"])
def test_simulated_is_packed(kind, scheme, method):
    model = kind().eval()
    name, shape = ("pixel_values", (4, 3, 10, 10)) if kind is TinyCNN else ("x", (4, 20))
    batches = [{name: torch.randn(shape)} for _ in range(3)]
    quantized = qt.quantize_module(model, scheme, batches, method=method)
    with torch.no_grad():
        exact, simulated = model(**batches[0]), quantized(**batches[0])
        packed = qt.pack_module(quantized)(**batches[0])
    assert torch.equal(simulated, packed)
    error = float((simulated - exact).norm() / exact.norm())
    assert 0 < error < (0.05 if scheme.startswith("w8") else 0.4)
    kept = [entry for entry in quantized.quantailor_state.inventory if entry.scheme is None]
    assert all(entry.reason for entry in kept)
