"""Norms become part of convolutions without moving the output, and only where that is so."""

import copy

import pytest
import torch
from torch import nn

from quantailor.models.folding import TOLERANCE, fold_norms, folded_parameters
from tests.models.vision import mobilenet


def stirred(model):
    """Norms with averages, gains and shifts that are not the identity."""
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        with torch.no_grad():
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.3, 2.0)
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.2)
    return model.eval()


@pytest.mark.parametrize(("groups", "bias", "affine"), [(1, True, True), (6, False, True), (2, True, False)])
def test_a_fold_by_the_equation_a_channel_at_a_time(groups, bias, affine):
    conv, norm = nn.Conv2d(6, 12, 3, groups=groups, bias=bias), nn.BatchNorm2d(12, affine=affine, eps=1e-3).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 3)
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    weight, shift = folded_parameters(conv, norm)
    for o in range(12):
        gamma, beta = (float(norm.weight[o]), float(norm.bias[o])) if affine else (1.0, 0.0)
        gain = gamma / (float(norm.running_var[o]) + 1e-3) ** 0.5
        torch.testing.assert_close(weight[o], conv.weight[o] * gain, rtol=1e-5, atol=1e-6)
        start = float(conv.bias[o]) if bias else 0.0
        assert float(shift[o]) == pytest.approx((start - float(norm.running_mean[o])) * gain + beta, abs=1e-5)


def test_mobilenet_folds_to_1e_5():
    model = stirred(mobilenet())
    images = {"pixel_values": torch.randn(3, 3, 32, 32)}
    convolutions = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    folded_model = copy.deepcopy(model)
    folded = fold_norms(folded_model, convolutions, images)
    with torch.no_grad():
        before, after = model(**images).logits, folded_model(**images).logits
        other = torch.randn(2, 3, 32, 32)
        elsewhere = (model(other).logits - folded_model(other).logits).abs().max() / model(other).logits.abs().max()
    assert len(folded) == len(convolutions) == 52
    assert 0 < float((after - before).abs().max() / before.abs().max()) <= TOLERANCE and float(elsewhere) <= TOLERANCE
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded_model.modules())


def test_a_convolution_that_is_kept_keeps_its_norm():
    model = stirred(mobilenet())
    chosen = {"mobilenet_v2.layer.0.conv_3x3.convolution"}
    assert fold_norms(model, chosen, {"pixel_values": torch.randn(2, 3, 32, 32)}) == [
        "mobilenet_v2.layer.0.conv_3x3.normalization"
    ]


class Shared(nn.Module):
    """A convolution whose output is read beside its norm as well."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


def test_a_fold_that_moves_the_output_is_undone():
    model = stirred(Shared())
    before = copy.deepcopy(model.state_dict())
    assert fold_norms(model, {"conv"}, {"x": torch.randn(2, 2, 4, 4)}) == []
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
