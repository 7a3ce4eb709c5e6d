"""Fused experts of a mixture-of-experts model, taken apart: a linear layer a projection of each expert.

transformers 5 holds the experts of a block as two 3-D parameters, `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I],
though on disk each expert's projections are layers of their own, `experts.0.gate_proj`. Taken apart, a module is called
as its tensors are on disk, and all that works on layers works on experts: rules, calibration on the tokens that the
router sends there, training, packing. Axes: E experts, H hidden, I inner, T tokens, K choices a token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping

from quantailor.models.structure import replace
from quantailor.numerics.measures import relative_max_difference

PARTS = ("gate_proj", "up_proj", "down_proj")
_ON_DISK = re.compile(r"experts\.(\*|\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_INSIDE = re.compile(r"(.+)\.\d+\.(?:gate_proj|up_proj|down_proj)(?:\.|$)")


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)).   x [T, H] -> [T, H]"""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (_linear(weight) for weight in (gate, up, down))
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return result


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return linear


class SplitExperts(nn.ModuleList):
    """Stands where the fused experts stood: hidden [T, H], the experts chosen and their weights [T, K] -> [T, H]."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return self._all(hidden_states, top_k_index, top_k_weights)
        result = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index >= len(self):  # how a router says: none
                continue
            tokens, choice = torch.where(top_k_index == index)
            made = self[index](hidden_states[tokens]) * top_k_weights[tokens, choice, None]
            result.index_add_(0, tokens, made.to(result.dtype))
        return result

    def _all(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Every expert on every token, weighted by 0 where it was not chosen: a graph that no data changes."""
        result = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            share = torch.where(chosen == index, weights, torch.zeros_like(weights)).sum(-1, keepdim=True)
            result = result + (expert(hidden) * share).to(result.dtype)
        return result


def split_experts(model: nn.Module, only: Iterable[str] | None = None) -> list[str]:
    """Take fused experts apart, in place. Returns the names of those that were; weights on `meta` stay there.

    `only`: names to look at. Left as they are: experts of another form (transposed, with biases, gated in their own
    way), those whose tensors on disk have other names, and those whose parts do not compute the same.
    """
    wanted = None if only is None else set(only)
    fused = [(n, m) for n, m in model.named_modules() if (wanted is None or n in wanted) and _is_fused(m)]
    if not fused or not _has_names_on_disk(model):
        return []
    done = []
    for name, module in fused:
        split = _split(module)
        if module.down_proj.is_meta or _computes_the_same(module, split):
            replace(model, name, split.train(module.training))
            done.append(name)
    return done


def experts_of(names: Iterable[str]) -> set[str]:
    """The names of the experts' modules that layers called `names` lie in: `a.experts.0.up_proj` -> `a.experts`."""
    return {match[1] for name in names if (match := _INSIDE.match(name)) and match[1].endswith("experts")}


def _is_fused(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    if set(own) != {"gate_up_proj", "down_proj"} or any(p.dim() != 3 for p in own.values()):
        return False
    count, hidden, inner = own["down_proj"].shape
    plain = not any(getattr(module, n, False) for n in ("is_transposed", "has_bias", "has_post_expert_norm"))
    gated = getattr(module, "has_gate", True) and getattr(module, "is_concatenated", True)
    own_gate = getattr(type(module), "_apply_gate", None)
    usual = own_gate is None or own_gate.__name__ == "_default_apply_gate"
    fits = tuple(own["gate_up_proj"].shape) == (count, 2 * inner, hidden)
    return plain and gated and usual and fits and hasattr(module, "act_fn") and not list(module.buffers())


def _has_names_on_disk(model: Any) -> bool:
    """Whether transformers itself reads `experts.0.gate_proj.weight` for this model."""
    if not hasattr(model, "config"):
        return False
    patterns = [p for c in get_model_conversion_mapping(model) for p in getattr(c, "source_patterns", [])]
    return sum(bool(_ON_DISK.search(pattern)) for pattern in patterns) >= len(PARTS)


def _split(module: Any) -> SplitExperts:
    inner = module.down_proj.shape[2]
    both, down = module.gate_up_proj, module.down_proj
    return SplitExperts(Expert(w[:inner], w[inner:], d, module.act_fn) for w, d in zip(both, down))


@torch.no_grad()
def _computes_the_same(module: Any, split: SplitExperts) -> bool:
    """On two random tokens an expert, drawn by a generator of their own."""
    down = module.down_proj
    count, hidden = down.shape[0], down.shape[1]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2 * count, hidden, generator=draw).to(down.device, down.dtype)
    chosen = torch.arange(2 * count, device=down.device).remainder(count)[:, None]
    weights = torch.ones(2 * count, 1, device=down.device, dtype=down.dtype)
    one, other = module(x, chosen, weights), split(x, chosen, weights)
    bound = 1e-5 if down.dtype == torch.float32 else 2e-2
    return relative_max_difference(other.float(), one.float()) <= bound
