"""What few bits would cost, from gradients: the second-order KL of every choice in a handful of backward passes.

    KL(p || p_delta) = 1/2 delta^T F delta + O(delta^3),    F = E_x E_{y ~ p(.|x)} [ g g^T ],   g = d log p(y|x) / dw

F is the Fisher information, labels drawn from the model itself (not the data's: Kunstner et al. 2019,
arXiv:1905.12558, on what that difference does). With a_s = <g_s, delta> the sum is 1/2 mean_s a_s^2, and a_s needs no
gradient of a weight: it is the sum over a sequence's positions of <d log p / d y, (W_hat - W) x>, the gradient at the
layer's *output* times what quantization changes there. So off-diagonal terms, and those between the layers of a unit,
are all in it; a sequence's labels are drawn position by position, so cross terms of positions vanish in the mean.
The diagonal form 1/2 sum_i F_ii delta_i^2 (as in Fisher-weighted pruning, Theis et al. 2018, arXiv:1801.05787) is here
to compare with: it takes rounding errors of a row as independent, which a solver such as GPTQ makes sure they are not.
Axes: S sequences times draws, B rows of a batch, T positions, O out, N in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quantailor.models.roles import Unit
from quantailor.searching.variants import Variants, rows
from quantailor.spec import Scheme

Batch = Mapping[str, Tensor]
_Calls = dict[str, list[tuple[Tensor, Tensor]]]  # layer -> (input, output) of each of its calls


def products(
    model: nn.Module,
    batches: Sequence[Batch],
    variants: Variants,
    units: Sequence[Unit],
    schemes: Sequence[Scheme],
    *,
    draws: int = 4,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Tensor, float]:
    """(a float64 [S, units, schemes], positions): the second-order KL a position is a^2 summed over S / (2 positions).

    `positions` counts draws as well. `variants` holds every unit under every scheme; the model is in eval mode.
    """
    layers = [layer for unit in units for layer in unit.layers]
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    positions = 0.0
    for batch in _single_rows(model, layers, batches):
        with _watching(model, layers) as calls, torch.enable_grad():
            log_probs, mask = _log_probs(model, batch)
        for _ in range(draws):
            gradients = _gradients(calls, log_probs, mask, generator)
            a = torch.zeros(len(log_probs), len(units), len(schemes), dtype=torch.float64)
            for u, unit in enumerate(units):
                for c, scheme in enumerate(schemes):
                    for layer in unit.layers:
                        if layer in gradients:
                            a[:, u, c] += _product(model, variants, layer, scheme, calls[layer], gradients[layer]).cpu()
            found.append(a)
            positions += float(mask.sum())
        del calls
        advance(1)
    return torch.cat(found), positions


def second_order(a: Tensor, positions: float) -> Tensor:
    """KL a position in nats from `products`: [S, ...] -> [...]."""
    return a.square().sum(0) / (2 * positions)


def diagonal(
    model: nn.Module,
    batches: Sequence[Batch],
    variants: Variants,
    units: Sequence[Unit],
    schemes: Sequence[Scheme],
    *,
    draws: int = 4,
    seed: int = 0,
) -> Tensor:
    """1/2 sum_i F_ii delta_i^2 a position, float64 [units, schemes]; units of Linear layers only."""
    layers = [layer for unit in units for layer in unit.layers]
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(len(units), len(schemes), dtype=torch.float64)
    positions = 0.0
    for batch in _single_rows(model, layers, batches, always=True):
        with _watching(model, layers) as calls, torch.enable_grad():
            log_probs, mask = _log_probs(model, batch)
        for _ in range(draws):
            gradients = _gradients(calls, log_probs, mask, generator)
            for u, unit in enumerate(units):
                for layer in unit.layers:
                    module = model.get_submodule(layer)
                    pairs = zip(gradients[layer], calls[layer])
                    fisher = sum(g.flatten(0, -2).t() @ x.flatten(0, -2) for g, (x, _) in pairs).square()  # type: ignore[union-attr]
                    for c, scheme in enumerate(schemes):
                        delta = rows(module).detach() - variants.solved[layer, scheme].quantizer.dequantize(
                            variants.solved[layer, scheme].q
                        )
                        found[u, c] += float((fisher * delta.square()).sum())
            positions += float(mask.sum())
    return found / (2 * positions)


def _product(
    model: nn.Module,
    variants: Variants,
    layer: str,
    scheme: Scheme,
    calls: list[tuple[Tensor, Tensor]],
    gradients: Sequence[Tensor],
) -> Tensor:
    """<gradient, change of the layer's output> of each row of the batch, float64 [B]."""
    module = model.get_submodule(layer)
    weight = variants.solved[layer, scheme].weight(module)
    quantizer = variants.input_quantizer(layer, scheme)
    total: Tensor | None = None
    with torch.no_grad():
        for (x, y), gradient in zip(calls, gradients):
            changed = functional_call(module, {"weight": weight}, (x if quantizer is None else quantizer(x),))
            part = ((changed - y).double() * gradient.double()).flatten(1).sum(1)
            part = part if len(part) == gradients[0].shape[0] else part.sum()[None]
            total = part if total is None else total + part
    assert total is not None
    return total


def _log_probs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(log-probabilities [B, P, V], which of the P positions count [B, P])."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    cache = {"use_cache": False} if bool(getattr(getattr(model, "config", None), "use_cache", False)) else {}
    logits = model(**inputs, **cache).logits.float()
    if logits.dim() == 2:
        return logits.log_softmax(-1)[:, None], torch.ones(len(logits), 1, device=logits.device)
    mask = inputs.get("attention_mask", torch.ones(logits.shape[:2])).to(logits)
    return logits.log_softmax(-1), mask


def _gradients(
    calls: _Calls, log_probs: Tensor, mask: Tensor, generator: torch.Generator
) -> dict[str, tuple[Tensor, ...]]:
    """d log p(y) / d output of every layer's calls, for labels drawn from the model."""
    probs = log_probs.detach().exp().flatten(0, 1)
    drawn = torch.multinomial(probs.cpu(), 1, generator=generator).to(probs.device).view(mask.shape)
    likelihood = (log_probs.gather(-1, drawn[..., None]).squeeze(-1) * mask).sum()
    flat = [(name, y) for name, pairs in calls.items() for _, y in pairs]
    gradients = torch.autograd.grad(likelihood, [y for _, y in flat], retain_graph=True, allow_unused=True)
    found: dict[str, tuple[Tensor, ...]] = {}
    for (name, y), gradient in zip(flat, gradients):
        found[name] = (*found.get(name, ()), torch.zeros_like(y) if gradient is None else gradient)
    return found


@contextmanager
def _watching(model: nn.Module, layers: Sequence[str]) -> Iterator[_Calls]:
    """Notes each layer's inputs and outputs; parameters need no gradient meanwhile, outputs do."""
    calls: _Calls = {}
    wanted = [(p, p.requires_grad) for p in model.parameters()]

    def hook_for(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            calls.setdefault(name, []).append((args[0].detach(), output))
            return output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in dict.fromkeys(layers)]
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for parameter, before in wanted:
            parameter.requires_grad_(before)


def _single_rows(
    model: nn.Module, layers: Sequence[str], batches: Sequence[Batch], always: bool = False
) -> Iterator[Batch]:
    """The batches; row by row where some layer's output has no axis of rows (experts see a flat list of tokens, a
    table of positions one row for all), since products could not be told apart otherwise."""
    if not always and batches:
        size = len(next(iter(batches[0].values())))
        with _watching(model, layers) as calls, torch.no_grad():
            inputs = {k: v for k, v in batches[0].items() if k != "labels"}
            cache = {"use_cache": False} if bool(getattr(getattr(model, "config", None), "use_cache", False)) else {}
            model(**inputs, **cache)
        if size == 1 or all(y.dim() > 1 and len(y) == size for pairs in calls.values() for _, y in pairs):
            yield from batches
            return
    for batch in batches:
        for row in range(len(next(iter(batch.values())))):
            one = {k: v[row : row + 1] for k, v in batch.items()}
            length = int(one["attention_mask"].sum()) if "attention_mask" in one else None
            yield {k: v[:, :length] if v.dim() > 1 else v for k, v in one.items()} if _right_padded(one) else one


def _right_padded(batch: Batch) -> bool:
    mask = batch.get("attention_mask")
    return mask is not None and bool((mask[:, 1:] <= mask[:, :-1]).all())
