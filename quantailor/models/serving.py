"""The fast path of a packed model: products chosen by shape, for as long as it serves.

Outside, packed layers run as `check` proves them, bit for bit what was trained. Inside, a layer whose weight alone is
quantized multiplies few rows by the kernel that reads packed weights (kernels/decode.py), many by floats a block at a
time, and a block like Llama's answers for one token by one native call (decoding.py): the same integers, and logits
within some 1e-4 of the largest, since a CPU holds inputs in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from quantailor.kernels import decode, ops
from quantailor.models import decoding
from quantailor.models.encoding import encoding, why_not_encoded
from quantailor.models.structure import modules_of
from quantailor.nn.packed import QuantLinear


@dataclass(frozen=True)
class Choice:
    """Layers of one kind, what few rows take there ("packed kernel", "float blocks", "integer product",
    "encoder block"), and why."""

    scheme: str
    layers: int
    few_rows: str
    why: str


@contextmanager
def serving(model: nn.Module) -> Iterator[list[Choice]]:
    """Products by shape while it lasts; yields what few rows take, a line a kind of layer. Within another: nothing
    more."""
    layers = [m for _, m in modules_of(model, QuantLinear)]
    if any(layer.serves for layer in layers):
        yield choices(model)
        return
    for layer in layers:
        stored = layer.packed.stored()
        layer.serves, layer.held = True, None if stored is None else stored.with_half_scale()
        if layer.scheme.input is None:
            layer.rows_compiled = decode.most_rows_compiled(stored, layer.packed.scales().device.type)
    try:
        decoding.install(model)
        with encoding(model) as encoded:
            yield choices(model, encoded)
    finally:
        decoding.remove(model)
        for layer in layers:
            layer.serves, layer.held, layer.rows_compiled = False, None, 0


def choices(model: nn.Module, encoded: dict[int, str] | None = None) -> list[Choice]:
    """What one row would take in each kind of packed linear layer. `encoded`: as models/encoding.py found it."""
    encoded = why_not_encoded(model) if encoded is None else encoded
    found: dict[tuple[str, str, str], int] = {}
    for _, layer in modules_of(model, QuantLinear):
        device = layer.packed.scales().device.type
        if layer.scheme.input is not None:
            reason = encoded.get(id(layer), "it stands in no block")
            few = "integer product" if reason else "encoder block"
            how = f"its inputs are integers as well, by {ops.product_here(device)}"
            key = (str(layer.scheme), few, how + (f"; floats between products: {reason}" if reason else ""))
        else:
            reason = decode.why_not(layer.packed.stored(), 1, device)
            few = "float blocks" if reason else "packed kernel"
            key = (str(layer.scheme), few, reason or f"up to {decode.most_rows(device)} rows; more take float blocks")
        found[key] = found.get(key, 0) + 1
    return [Choice(scheme, count, few, why) for (scheme, few, why), count in found.items()]
