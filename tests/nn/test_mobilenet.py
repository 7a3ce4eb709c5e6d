"""Convolutions under W8A8: a small MobileNet that has learned something, quantized, packed and measured."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantailor as qt
from quantailor.errors import UsageError
from quantailor.spec import Int, PerChannel, Scheme
from tests.models.zoo import gpt2, tokens

CLASSES = 8


def unit(inputs, outputs, kernel=3, stride=1, groups=1):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class MobileNet(nn.Module):
    """A stem, three pairs of a depthwise and a pointwise convolution, a head. [B, 1, 16, 16] -> [B, 8]

    Source of the pairs: Howard et al. 2017, arXiv:1704.04861, section 3.1.
    """

    def __init__(self):
        super().__init__()
        units = [unit(1, 16, stride=2)]
        for inputs, outputs, stride in ((16, 24, 1), (24, 32, 2), (32, 48, 1)):
            units += [unit(inputs, inputs, stride=stride, groups=inputs), unit(inputs, outputs, kernel=1)]
        self.features = nn.Sequential(*units)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, pixel_values):
        return self.head(self.features(pixel_values).mean((2, 3)))


def gratings(count):
    """Waves of any frequency, phase and contrast in one of 8 directions, off by up to a third, under noise."""
    label = torch.arange(count) % CLASSES
    angle = (math.pi / CLASSES * (label + 0.6 * (torch.rand(count) - 0.5)))[:, None, None]
    frequency, phase, contrast = (torch.rand(count, 1, 1) * width for width in (0.35, 2 * math.pi, 0.8))
    at = torch.arange(16.0) - 8
    waves = torch.sin((0.7 + frequency) * (at * angle.cos() + at[:, None] * angle.sin()) + phase)
    return ((0.2 + contrast) * waves + 0.8 * torch.randn(count, 16, 16))[:, None], label


@pytest.fixture(scope="module")
def trained():
    """(the model, calibration batches, held-out images, their labels); trained for two seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, (images, labels) = MobileNet(), gratings(4096)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=150)
    for _ in range(150):
        rows = torch.randint(len(images), (128,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    batches = [{"pixel_values": part} for part in images[:256].split(64)]
    return model.eval(), batches, *gratings(4000)


@torch.no_grad()
def accuracy(model, images, labels):
    found = torch.cat([model(part).argmax(1) for part in images.split(1000)])
    return float((found == labels).float().mean())


def test_the_float_model_knows_its_task(trained):
    model, _, images, labels = trained
    assert accuracy(model, images, labels) > 0.88  # measured: 90.8 %; by chance 12.5 %


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "w8a8-static-percentile", "w8a8-static-kl"])
def test_w8a8_costs_a_cnn_at_most_a_point(trained, scheme, method):
    model, batches, images, labels = trained
    simulated = qt.quantize_module(model, scheme, batches, method=method)
    served = qt.pack_module(simulated)
    with torch.no_grad():
        assert torch.equal(served(images[:200]), simulated(images[:200]))
        assert not torch.equal(served(images[:200]), model(images[:200]))
    assert accuracy(served, images, labels) >= accuracy(model, images, labels) - 0.01


def test_fewer_bits_do_cost_something(trained):
    """So that a point is a bound which can be broken: on this task 2 bits lose many."""
    model, batches, images, labels = trained
    two_bits = qt.quantize_module(model, "w2a2-static", batches, method="rtn")
    assert accuracy(two_bits, images, labels) < accuracy(model, images, labels) - 0.2


def test_every_convolution_is_quantized_and_depthwise_ones_a_channel_each(trained):
    model, batches, *_ = trained
    simulated = qt.quantize_module(model, "w8a8-static", batches, method="rtn")
    entries = {e.name: e for e in simulated.quantailor_state.inventory}
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert len(convolutions) == 7 and entries["head"].scheme == Scheme.parse("w8a8-static")
    depthwise = {n: m for n, m in convolutions.items() if m.groups > 1}
    assert [m.groups for m in depthwise.values()] == [16, 24, 32]
    for name, conv in convolutions.items():
        assert entries[name].scheme.weight.granularity == PerChannel()
        twin = simulated.get_submodule(name)
        assert twin.weight_quantizer.scale.shape == (conv.out_channels, 1, 1)
        assert twin.weight_quantizer.scale.unique().numel() == conv.out_channels
    kept = {e.kind for e in entries.values() if e.scheme is None}
    assert kept == {"BatchNorm2d"}


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_a_packed_depthwise_convolution_by_loops(trained, scheme):
    """From its integers and scales, a pixel and a channel at a time."""
    model, batches, images, _ = trained
    served = qt.pack_module(qt.quantize_module(model, scheme, batches, method="rtn")).features[1][0]
    with torch.no_grad():
        x = model.features[0](images[:2])
        found = served(x)
    q_w, s_w = served.packed.integers().view(16, 3, 3), served.packed.scales().flatten()
    padded = F.pad(x, (1, 1, 1, 1))
    for b, channel, row, column in ((0, 0, 0, 0), (0, 5, 3, 7), (1, 15, 7, 7), (1, 9, 0, 4)):
        s_x = float(x[b].abs().max() / 127.5) if scheme == "w8a8" else float(served.input_scale)
        window = padded[b, channel, row : row + 3, column : column + 3]
        total = 0
        for i in range(3):
            for j in range(3):
                q_x = min(max(round(float(window[i, j]) / s_x), Int(8).qmin), Int(8).qmax)
                total += q_x * int(q_w[channel, i, j])
        assert float(found[b, channel, row, column]) == pytest.approx(total * s_x * float(s_w[channel]), abs=1e-4)


@pytest.mark.parametrize("scheme", ["w8a8-outliers", "w8a8-ag8"])
def test_outliers_and_groups_are_for_matrix_products(trained, scheme):
    """A convolution has one scale an image; asked for more it is refused by name, and a rule is the way out."""
    model, batches, images, _ = trained
    with pytest.raises(UsageError, match=r"^features\.0\.0: .* cannot be a convolution's: .* give it w8a8 or"):
        qt.quantize_module(model, scheme, batches, method="rtn")
    rule = qt.Rule(Scheme.parse("w8a8"), module_type="Conv2d")
    simulated = qt.quantize_module(model, scheme, batches, method="rtn", rules=[rule])
    assert simulated.quantailor_state.inventory.quantized["head"] == Scheme.parse(scheme)
    with torch.no_grad():
        assert torch.equal(qt.pack_module(simulated)(images[:50]), simulated(images[:50]))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "w8a8-outliers2", "w8a8-ag24", "w4a8-g24-ag24"])
def test_conv1d_of_gpt2(scheme):
    """GPT-2's Conv1D is a matrix product stored the other way round: each scheme applies."""
    model, batch = gpt2(), tokens(9, 12, 7)
    simulated = qt.quantize_module(model, scheme, [batch, tokens(10, 3)], method="rtn")
    kinds = {e.kind for e in simulated.quantailor_state.inventory if e.scheme == Scheme.parse(scheme)}
    assert kinds == {"Conv1D"}
    with torch.no_grad():
        exact, found = model(**batch).logits, simulated(**batch).logits
        assert torch.equal(qt.pack_module(simulated)(**batch).logits, found)
    rows = batch["attention_mask"].bool()
    error = float((found - exact)[rows].norm() / exact[rows].norm())
    assert 0 < error < (0.05 if scheme.startswith("w8") else 0.5)
