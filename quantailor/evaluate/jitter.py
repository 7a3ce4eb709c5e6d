"""How far a model moves when nothing moves: its own logits after a change of the last bit.

A model that rounds activations turns last bits into whole steps wherever a value lies halfway between two integers. Two
runtimes that agree in every integer of a weight still differ by about as much as the model differs from itself here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantailor.evaluate.measuring import measuring
from quantailor.models.structure import logits_of
from quantailor.numerics.measures import relative_max_difference


def own_jitter(model: nn.Module, probe: Mapping[str, Tensor], *, draws: int = 3, seed: int = 0) -> float:
    """The largest difference of logits, relative to the largest, when what the token embedding gives is moved by one
    unit in the last place, up or down at random; over `draws` such moves. Padding counts for nothing.

    `model` has `get_input_embeddings`; `probe` int64 [B, T] as its forward takes it.
    """
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)

    def moved(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
        up = torch.randint(0, 2, out.shape, generator=generator).to(out.device, out.dtype) * 2 - 1
        return torch.nextafter(out, out + up * out.abs().clamp(min=1e-30))

    with measuring(model) as device:
        inputs = {name: value.to(device) for name, value in probe.items()}
        there = _there(inputs)
        before = _kept(logits_of(model(**inputs)).float(), there)
        handle = embedding.register_forward_hook(moved)
        try:
            return max(
                relative_max_difference(_kept(logits_of(model(**inputs)).float(), there), before) for _ in range(draws)
            )
        finally:
            handle.remove()


def _there(inputs: Mapping[str, Tensor]) -> Tensor:
    return inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()


def _kept(logits: Tensor, there: Tensor) -> Tensor:
    return logits[there] if logits.dim() == 3 else logits
