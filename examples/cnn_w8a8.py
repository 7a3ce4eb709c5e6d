"""8-bit weights and activations for a small MobileNet, trained here on drawn stripes:   python examples/cnn_w8a8.py"""

import torch
from torch import nn

import quantailor as qt


def stripes(count):  # noisy waves in one of 8 directions, [count, 1, 16, 16], and which
    label, at = torch.arange(count) % 8, torch.arange(16.0)
    angle, phase = (0.3927 * label)[:, None, None], 6.28 * torch.rand(count, 1, 1)
    waves = torch.sin(0.9 * (at * angle.cos() + at[:, None] * angle.sin()) + phase)
    return (waves + 2 * torch.randn_like(waves))[:, None], label


torch.manual_seed(0)
sizes = [(1, 16, 3, 2, 1), (16, 16, 3, 1, 16), (16, 32, 1, 1, 1), (32, 32, 3, 2, 32), (32, 48, 1, 1, 1)]
convs = [nn.Conv2d(i, o, k, stride, k // 2, groups=groups) for i, o, k, stride, groups in sizes]
layers = [layer for conv in convs for layer in (conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU6())]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 8))
optimizer, (images, labels) = torch.optim.Adam(model.parameters(), 1e-2), stripes(2000)
for x, y in (stripes(128) for _ in range(150)):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
print(f"float: {(model.eval()(images).argmax(1) == labels).float().mean():.1%}")
for scheme in ("w8a8", "w8a8-static"):
    quantized = qt.quantize_module(model, scheme, [{"input": stripes(128)[0]} for _ in range(4)], method="rtn")
    print(f"{scheme}: {(qt.pack_module(quantized)(images).argmax(1) == labels).float().mean():.1%}")
