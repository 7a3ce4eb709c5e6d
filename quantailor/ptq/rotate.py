"""Rotation: turn the residual stream and each head's values by random Hadamard matrices, folded into the weights.

A large channel becomes a little of every channel, so that weights and activations need less range; the model computes
the same, layer shapes stay, and a saved folder is an ordinary one of its architecture. With row vectors, Q orthogonal:

    R1   h -> h Q        norm gains are folded into the Linears that read them (an RMSNorm without gain commutes with Q)
         reader          W -> W diag(gain) Q              gain -> 1
         writer          W -> Q^T W,   b -> b Q           embedding rows e -> e Q
    R2   v -> v R        of each head: v_proj's rows W -> R^T W, b -> b R;  o_proj's columns W -> W R

Both are the rotations that need nothing at run time; the online ones (before down_proj, of queries and keys) are not
done. Which module reads and writes the stream is found by watching one run (residual_stream.py). A model that this does
not fit (LayerNorm, norms on what is added, fused experts), or whose logits on random tokens would change, is put back
bit by bit. Sources: Ashkboos et al. 2024, arXiv:2404.00456, section 4 (QuaRot); Liu et al. 2024, arXiv:2405.16406,
section 3.1 (SpinQuant, R1 and R2, here random instead of learned).

The work on one block (`plan_block`, `rotate_block`) needs only that block and a run of it, the ends (`rotate_ends`)
only themselves, so that a model may also be rotated while it passes by block by block: with `Rotate(seed).residual(n)`
throughout, `block(h Q)` of a rotated block is `block(h) Q` of the old one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.models.loading import device_of
from quantailor.models.prepare import State, state_of
from quantailor.models.structure import blocks
from quantailor.numerics.hadamard import Rotation, rotation
from quantailor.ptq.method import Report
from quantailor.ptq.residual_stream import (
    BlockPlan,
    Ends,
    Unfit,
    difference,
    gain_offset,
    is_tensor,
    plan_model,
    value_pairs,
)
from quantailor.recipe import Inventory

# How far logits may move, of the largest: in half precision the turned weights are rounded anew. In float64 as in
# float32, since transformers' norms compute in that.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_CHUNK = 1 << 22  # elements turned at once, in float64


@dataclass(frozen=True)
class Rotate:
    """A part for `method=`: `rotate+gptq`. `seed` decides all signs."""

    seed: int = 0
    heads: bool = True  # R2

    def residual(self, size: int) -> Rotation:
        """R1, for a residual stream of this width."""
        return rotation(size, self.seed)

    def values(self, size: int, index: int) -> Rotation:
        """R2 of block number `index`, for heads of this many elements."""
        return rotation(size, self.seed + 1 + index)

    @torch.no_grad()
    def on_model(self, model: nn.Module, layers: Mapping[str, Any]) -> dict[str, Report]:
        """Turn the whole model, or leave it as it was and say why. Returns {layer: {"rotate": what and how exact}}."""
        notes: list[str] = []
        lines: dict[str, dict[str, Any]] = {name: {} for name in layers}
        try:
            probe = _probe(model, self.seed)
            before = _logits(model, probe)
        except Unfit as reason:
            return _skipped(model, layers, str(reason))
        for turn in (self._turn_stream, self._turn_heads) if self.heads else (self._turn_stream,):
            undo = _Undo()
            try:
                what, names, said = turn(model, probe, undo)
                moved = difference(before, _logits(model, probe))
                if not moved <= TOLERANCE[before.dtype]:
                    raise Unfit(
                        f"logits on random tokens would move by {moved:.2g} of the largest "
                        f"(limit {TOLERANCE[before.dtype]:.0e}); the weights were put back"
                    )
            except Unfit as reason:
                undo.everything()
                which = "residual stream" if turn == self._turn_stream else "heads"
                for line in lines.values():
                    line.setdefault("skipped", []).append(f"{which}: {reason}")
                notes.append(f"rotate: {which} not rotated: {reason}")
                continue
            notes += said
            for name in layers:
                if name in names:
                    lines[name] |= {what: names[name], "difference": moved}
        _note(model, notes)
        seeded = {"seed": self.seed}
        return {name: {"rotate": (seeded if "difference" in line else {}) | line} for name, line in lines.items()}

    def _turn_stream(
        self, model: nn.Module, probe: dict[str, Tensor], undo: _Undo
    ) -> tuple[str, dict[str, int], list[str]]:
        """R1. Returns ("residual", {Linear: width of the stream}, notes). Raises: Unfit."""
        chain = blocks(model)
        plans, ends, width = plan_model(model, lambda: model(**probe))
        q = self.residual(width)
        notes = _untie(model, ends, undo)
        for (_, block), plan in zip(chain, plans):
            undo.keep_all(block, (*plan.norms, *plan.stream))
            rotate_stream(block, plan, q)
        undo.keep_all(model, (*ends.embeddings, ends.norm, *ends.readers))
        rotate_ends(model, ends, q)
        inside = [f"{prefix}.{name}" for (prefix, _), plan in zip(chain, plans) for name in plan.stream]
        if not q.is_hadamard:
            notes.append(f"rotate: no Hadamard matrix of size {width} is at hand; its odd part is a random rotation")
        return "residual", dict.fromkeys((*inside, *ends.embeddings, *ends.readers), width), notes

    def _turn_heads(
        self, model: nn.Module, probe: dict[str, Tensor], undo: _Undo
    ) -> tuple[str, dict[str, int], list[str]]:
        """R2. Returns ("heads", {Linear: elements a head}, notes). Raises: Unfit."""
        found: dict[str, int] = {}
        for index, (prefix, block) in enumerate(blocks(model)):
            for value, output, size in value_pairs(block):
                undo.keep_all(block, (value, output))
                rotate_values(block, (value, output, size), self.values(size, index))
                found |= {f"{prefix}.{name}": size for name in (value, output)}
        if not found:
            raise Unfit("no attention with a v_proj, an o_proj and a known size of its heads")
        return "heads", found, []


@torch.no_grad()
def rotate_block(block: nn.Module, plan: BlockPlan, residual: Rotation, values: Callable[[int], Rotation]) -> None:
    """R1 and R2 of one block, in place; `values(size)` gives R2 for heads of this many elements."""
    rotate_stream(block, plan, residual)
    for pair in plan.values:
        rotate_values(block, pair, values(pair[2]))


@torch.no_grad()
def rotate_stream(block: nn.Module, plan: BlockPlan, q: Rotation) -> None:
    """R1 of one block, in place."""
    for norm, readers in plan.norms.items():
        gain = _take_gain(block.get_submodule(norm))
        for name in readers:
            _turn_inputs(block.get_submodule(name), q, gain)
    for name in plan.writers:
        _turn_outputs(block.get_submodule(name), q)


@torch.no_grad()
def rotate_values(block: nn.Module, pair: tuple[str, str, int], r: Rotation) -> None:
    """R2 of one attention, in place: one rotation for all its heads, so that query heads may share a value head."""
    value, output = (block.get_submodule(name) for name in pair[:2])
    _turn_outputs(value, r)
    _turn_inputs(output, r)


@torch.no_grad()
def rotate_ends(model: nn.Module, ends: Ends, q: Rotation) -> None:
    """Embedding rows, and what reads the last norm, in place. A weight that embedding and head share is turned once;
    that is exact only where the last norm's gain is 1, so untie them first."""
    gain = _take_gain(model.get_submodule(ends.norm))
    embeddings = [model.get_submodule(name) for name in ends.embeddings]
    for embedding in embeddings:
        _turn_inputs(embedding, q)
    for name in ends.readers:
        reader = model.get_submodule(name)
        if all(reader.weight is not embedding.weight for embedding in embeddings):
            _turn_inputs(reader, q, gain)


def _take_gain(norm: Any) -> Tensor:
    """The gain a norm multiplies by, float64; the norm is left without."""
    offset = gain_offset(norm)
    assert offset is not None, "planned only with an RMSNorm"
    gain: Tensor = offset + norm.weight.detach().double()
    norm.weight.fill_(1.0 - offset)
    return gain


def _turn_inputs(module: Any, q: Rotation, gain: Tensor | None = None) -> None:
    """W diag(gain) Q, on each run of q.size columns: of a Linear's inputs, or of a table's rows."""
    weight = module.weight.detach()
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].double()
        rows = rows if gain is None else rows * gain
        weight[start : start + step] = q.rotated(rows.unflatten(1, (-1, q.size))).flatten(1).to(weight.dtype)


def _turn_outputs(module: Any, q: Rotation) -> None:
    """Q^T W and b Q, on each run of q.size rows of a Linear."""
    weight = module.weight.detach()
    step = max(1, _CHUNK // weight.shape[0])
    for start in range(0, weight.shape[1], step):
        columns = weight[:, start : start + step].t().double().unflatten(1, (-1, q.size))
        weight[:, start : start + step] = q.rotated(columns).flatten(1).t().to(weight.dtype)
    if module.bias is not None:
        bias = module.bias.detach()
        bias.copy_(q.rotated(bias.double().unflatten(0, (-1, q.size))).flatten())


def _untie(model: Any, ends: Ends, undo: _Undo) -> list[str]:
    """Give a head that shares the embedding's weight its own, unless the last norm has no gain to fold into it.

    Raises: Unfit where the two are quantized together.
    """
    norm: Any = model.get_submodule(ends.norm)
    offset = gain_offset(norm)
    assert offset is not None
    if bool((norm.weight == 1.0 - offset).all()):
        return []
    notes = []
    for name in ends.readers:
        reader: Any = model.get_submodule(name)
        twin = next((e for e in ends.embeddings if model.get_submodule(e).weight is reader.weight), None)
        if twin is None:
            continue
        if getattr(reader, "weight_quantizer", None) is not None:
            raise Unfit(f"{twin} and {name} share one quantized weight, which the last norm's gain splits; keep both")
        undo.keep_tie(model, reader, name)
        reader.weight = nn.Parameter(reader.weight.detach().clone(), requires_grad=reader.weight.requires_grad)
        if getattr(model.config, "tie_word_embeddings", False):
            model.config.tie_word_embeddings = False
        tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
        model.all_tied_weights_keys = {k: v for k, v in tied.items() if k != f"{name}.weight"}
        state = state_of(model)
        if state is not None:
            state.inventory = _apart(state, name, twin, undo)
        notes.append(
            f"rotate: {twin} and {name} shared one weight; they are two now (the last norm's gain went into the head)"
        )
    return notes


def _apart(state: State, name: str, twin: str, undo: _Undo) -> Inventory:
    """The inventory without the tie between the two."""
    old = state.inventory
    undo.steps.append(lambda: setattr(state, "inventory", old))
    both = {name, twin}
    return Inventory(
        tuple(dataclasses.replace(e, tied_to=None) if {e.name, e.tied_to} == both else e for e in old.entries)
    )


class _Undo:
    """How to put a model back, bit by bit."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], Any]] = []

    def keep_all(self, root: nn.Module, names: Sequence[str]) -> None:
        """Remember the parameters of the modules of these names."""
        for name in names:
            for parameter in root.get_submodule(name).parameters(recurse=False):
                old = parameter.detach().clone()
                self.steps.append(partial(parameter.detach().copy_, old))

    def keep_tie(self, model: Any, reader: Any, name: str) -> None:
        """Remember that this head shares its weight, and what says so."""
        shared, tie = reader.weight, getattr(model.config, "tie_word_embeddings", None)
        keys = getattr(model, "all_tied_weights_keys", None)

        def back() -> None:
            reader.weight = shared
            if tie is not None:
                model.config.tie_word_embeddings = tie
            if keys is not None:
                model.all_tied_weights_keys = keys

        self.steps.append(back)

    def everything(self) -> None:
        for step in reversed(self.steps):
            step()


def _probe(model: Any, seed: int) -> dict[str, Tensor]:
    """Two rows of random tokens. Raises: Unfit for a model that takes none."""
    table = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(table, nn.Embedding) or not hasattr(model, "config"):
        raise Unfit("it is no transformers model with an embedding of tokens")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, table.num_embeddings, (2, 24), generator=generator).to(device_of(model))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _logits(model: nn.Module, probe: dict[str, Tensor]) -> Tensor:
    """Raises: Unfit if the model does not run on tokens alone."""
    try:
        result = model(**probe)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise Unfit(f"it does not run on input_ids alone ({str(error).splitlines()[0][:120]})") from error
    logits = getattr(result, "logits", None)
    if not is_tensor(logits):
        raise Unfit("its output has no logits")
    assert isinstance(logits, Tensor)
    return logits.detach()


def _skipped(model: nn.Module, layers: Mapping[str, Any], reason: str) -> dict[str, Report]:
    _note(model, [f"rotate: nothing rotated: {reason}"])
    return {name: {"rotate": {"skipped": [reason]}} for name in layers}


def _note(model: nn.Module, notes: Sequence[str]) -> None:
    state = state_of(model)
    if state is not None:
        state.notes += notes
