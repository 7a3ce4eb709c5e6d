"""A quantized model becomes a float one again: each layer with the weights that its integers stand for."""

from __future__ import annotations

import torch
from torch import nn

from quantailor.models.prepare import FAKE_QUANT, unpack_model
from quantailor.models.structure import modules_of, replace
from quantailor.nn.fake_quant import FakeQuantConv2d, FakeQuantEmbedding, FakeQuantLinear


@torch.no_grad()
def dequantize_model(model: nn.Module) -> nn.Module:
    """Replace every packed or fake-quantized layer by a float one, in place; tied weights stay tied.

    Weights are those of the grid, to the bit; activations are no longer quantized. Norms that were folded stay folded.
    """
    unpack_model(model)
    made: dict[int, nn.Parameter] = {}
    for name, layer in list(modules_of(model, FAKE_QUANT)):
        weight = made.setdefault(id(layer.weight), nn.Parameter(layer.fake_weight().detach().clone()))
        replace(model, name, _float_layer(layer, weight).train(layer.training))
    if hasattr(model, "quantailor_state"):
        del model.quantailor_state
    return model


def _float_layer(layer: FakeQuantLinear | FakeQuantConv2d | FakeQuantEmbedding, weight: nn.Parameter) -> nn.Module:
    new: nn.Module
    if isinstance(layer, FakeQuantLinear):
        new = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    elif isinstance(layer, FakeQuantEmbedding):
        new = nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
    else:
        new = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            bias=layer.bias is not None,
            device="meta",
        )
    new.weight = weight
    if layer.bias is not None:
        new.bias = layer.bias
    return new
