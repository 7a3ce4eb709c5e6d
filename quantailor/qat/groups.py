"""Which parameters train, and how fast each of them: kinds and depths become groups of the optimizer.

Kinds: matrices (with weight decay), vectors, scales of weights, ranges (scales of static inputs). With layer-wise
decay d a parameter at depth i of L learns at d^(L - i) of its kind's rate: 0 is the embeddings, 1 the first block,
L the last block and whatever follows it. Source of the decay: Howard and Ruder 2018, arXiv:1801.06146, section 3.2.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from quantailor.errors import UsageError
from quantailor.models.structure import blocks, modules_of
from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.nn.lora import Adapter
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.qat.settings import Settings

KINDS = ("matrices", "vectors", "scales", "ranges")


def kinds_of(model: nn.Module) -> dict[str, str]:
    """Parameter name -> kind, of everything that trains."""
    ranges = {id(p) for _, q in modules_of(model, ActivationQuantizer) for p in q.parameters()}
    scales = {id(p) for _, q in modules_of(model, WeightQuantizer) for p in q.parameters()}
    scales |= {id(adapter.log_scale) for _, adapter in modules_of(model, Adapter)}
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = "ranges" if id(p) in ranges else "scales" if id(p) in scales else ""
            found[name] = kind or ("matrices" if p.dim() >= 2 else "vectors")
    return found


def depths(model: nn.Module) -> tuple[dict[str, int], int]:
    """(parameter name -> depth, the last block's): 0 before the blocks, the last block's also after them.

    A parameter outside the blocks lies before them if its module is registered before the first block.
    """
    prefixes = [name for name, _ in blocks(model) if name]
    found: dict[str, int] = {}
    seen_block = False
    for name, _ in model.named_parameters():
        inside = [i for i, prefix in enumerate(prefixes, start=1) if name.startswith(prefix + ".")]
        seen_block = seen_block or bool(inside)
        found[name] = inside[-1] if inside else len(prefixes) if seen_block else 0
    return found, len(prefixes)


def parameter_groups(model: nn.Module, settings: Settings, rates: tuple[float, float]) -> list[dict[str, Any]]:
    """Groups for an optimizer: `params`, `lr`, `weight_decay`, and `kind`, which the optimizer carries along."""
    weight_rate, scale_rate = rates
    parameters, depth_of = dict(model.named_parameters()), depths(model)
    found: dict[tuple[str, float], dict[str, Any]] = {}
    for kind in KINDS[:3]:
        _group(found, kind, 1.0, settings, weight_rate, scale_rate)
    for name, kind in kinds_of(model).items():
        share = settings.layer_decay ** (depth_of[1] - depth_of[0][name])
        _group(found, kind, share, settings, weight_rate, scale_rate)["params"].append(parameters[name])
    return list(found.values())


def _group(
    found: dict[tuple[str, float], dict[str, Any]],
    kind: str,
    share: float,
    settings: Settings,
    weight_rate: float,
    scale_rate: float,
) -> dict[str, Any]:
    rate = scale_rate if kind in ("scales", "ranges") else weight_rate
    decay = settings.weight_decay if kind == "matrices" else 0.0
    return found.setdefault((kind, share), {"params": [], "lr": rate * share, "weight_decay": decay, "kind": kind})


def freeze_lower(model: nn.Module, share: float) -> list[nn.Parameter]:
    """Stop the lower blocks and what lies before them from training; what was stopped. `share` of the blocks, rounded
    down. Raises: UsageError where that is no block."""
    if not share:
        return []
    depth_of, last = depths(model)
    count = math.floor(share * last)
    if count < 1:
        raise UsageError(f"freeze_lower={share} of {last} blocks is none; use at least {1 / max(last, 1):.2g}")
    stopped = [p for n, p in model.named_parameters() if p.requires_grad and depth_of[n] <= count]
    for parameter in stopped:
        parameter.requires_grad_(False)
    return stopped


def freeze_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Leave only scales and vectors to train; what was stopped. Raises: UsageError where no scale could."""
    kinds = kinds_of(model)
    if not any(kind in ("scales", "ranges") for kind in kinds.values()):
        raise UsageError("trains='scales', and this scheme has no scale that learns (nf4 has none); use trains='all'")
    parameters = dict(model.named_parameters())
    stopped = [parameters[name] for name, kind in kinds.items() if kind == "matrices"]
    for parameter in stopped:
        parameter.requires_grad_(False)
    return stopped
