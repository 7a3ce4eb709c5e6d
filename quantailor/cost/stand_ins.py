"""What a trace cannot run as it is: experts, whose work depends on the data, and adapters, which are not there yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.errors import UsageError
from quantailor.models.structure import replace
from quantailor.nn.fake_quant import FakeQuantLinear


class SpreadExperts(nn.Module):
    """Fused experts as if each got the same number of rows. Parameters are the experts' own.

    `gate_up_proj` [E, 2I, H], `down_proj` [E, H, I]; hidden [T, H], choice and weight [T, K] -> [T, H].
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        for name in ("gate_up_proj", "down_proj"):
            self.register_parameter(name, experts.get_parameter(name))

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor, *_: Any, **__: Any) -> Tensor:
        count = self.gate_up_proj.shape[0]
        per_token = chosen.shape[-1]
        flat = hidden.reshape(-1, hidden.shape[-1])
        each = -(-flat.shape[0] * per_token // count)
        rows = flat.repeat_interleave(per_token, dim=0)
        rows = torch.cat((rows, rows.new_zeros(each * count - rows.shape[0], rows.shape[1])))
        gate, up = torch.bmm(rows.view(count, each, -1), self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
        out = torch.bmm(nn.functional.silu(gate) * up, self.down_proj.transpose(1, 2)).reshape(each * count, -1)
        out = out[: flat.shape[0] * per_token].view(flat.shape[0], per_token, -1) * weights.reshape(-1, per_token, 1)
        return out.sum(1).view_as(hidden).to(hidden.dtype)


def spread_experts(model: nn.Module) -> list[str]:
    """Put stand-ins for fused experts. Raises: UsageError where a model's experts have another form."""
    found = 0
    for name, module in list(model.named_modules()):
        own: Mapping[str, nn.Parameter] = dict(module.named_parameters(recurse=False))
        if not any(p.dim() == 3 for p in own.values()):
            continue
        if set(own) != {"gate_up_proj", "down_proj"} or own["gate_up_proj"].shape[1] != 2 * own["down_proj"].shape[2]:
            raise UsageError(
                f"{name} holds fused tensors {', '.join(own)} of a form that cannot be planned yet; "
                "measure a few steps on a smaller model of the kind instead"
            )
        replace(model, name, SpreadExperts(module))
        found += 1
    return [f"{found} sets of experts: as if tokens were spread evenly over them"] if found else []


class AdaptedLinear(FakeQuantLinear):
    """y = x @ Q(W + B A)^T + bias: the adapter inside the rounding, so that merging is exact.

    Source: LR-QAT, arXiv:2406.06385.

    Only A [r, N] and B [O, r] are trained.
    """

    down: nn.Parameter
    up: nn.Parameter

    def fake_weight(self) -> Tensor:
        assert self.weight_quantizer is not None
        return self.weight_quantizer(self.weight_ON + self.up @ self.down)

    def forward(self, x: Tensor) -> Tensor:
        """As a float product also where activations are quantized: an upper end of what is kept for backward."""
        return self._out(nn.functional.linear(self._in(x), self.fake_weight().to(x.dtype), self.bias))


def adapt(model: nn.Module, rank: int) -> None:
    """Freeze everything and give each fake-quantized Linear an adapter."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in list(model.modules()):
        if type(module) is FakeQuantLinear and module.weight_quantizer is not None:
            module.__class__ = AdaptedLinear
            dtype = module.weight.dtype
            module.down = nn.Parameter(torch.zeros(rank, module.in_features, dtype=dtype))
            module.up = nn.Parameter(torch.zeros(module.out_features, rank, dtype=dtype))
