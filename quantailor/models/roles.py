"""What each layer of a Transformer is for, and which layers are one unit: found by watching, by names as the fallback.

    embedding   look-up tables, and what stands before the blocks      q/k/v   what attention is made from
    scores      attention probabilities (no weights; the module that computes them)
    o           what mixes the heads again                             ffn in, ffn out   the feed-forward pair
    norm        gains and shifts                                       head    what stands behind the blocks
    other       layers of a model without blocks

How attention is told from the feed-forward part without a table of names: one position's output of a layer is
disturbed. Only keys and values carry that to *other* positions of the block's output. Layers that share their input
with one of them are q/k/v; what the mixing reads is o; of the rest, what reads another layer of the rest directly is
"ffn out", the others are "ffn in". Blocks of one type with the same layers are looked at once. A block that cannot be
run so (no tokens, one position, blocks that branch) is read by the names that transformers uses, and `Roles.notes`
says so.

Layers that are called with the very same tensor and have the same parent ({q, k, v}, {gate, up}) are one unit: serving
engines fuse them, so they take one scheme. Layers that share a parameter are one unit as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.models.structure import blocks

ROLES = ("embedding", "q/k/v", "scores", "o", "ffn in", "ffn out", "norm", "head", "other")
_POSITIONS = 12
_NAMES = {  # the fallback: parts of the last name or two of a layer
    "q/k/v": ("q_proj", "k_proj", "v_proj", "qkv", "query", "key", "value", "c_attn", "in_proj", "q_lin", "k_lin"),
    "o": ("o_proj", "out_proj", "attention.output", "attn.c_proj", "dense_o", "out_lin", "attention.dense", "wo_attn"),
    "ffn out": ("down_proj", "fc2", "mlp.c_proj", "output.dense", "dense_4h_to_h", "lin2", "ffn_output", "w2", "wo"),
    "ffn in": ("gate", "up_proj", "fc1", "c_fc", "intermediate", "dense_h_to_4h", "lin1", "ffn", "w1", "w3", "wi"),
}


@dataclass(frozen=True)
class Unit:
    """Layers that take one scheme. `block`: the number of the repeated block they are in; None outside of them."""

    layers: tuple[str, ...]
    role: str
    block: int | None
    num_weights: int

    @property
    def name(self) -> str:
        """One layer's name; of several the common part and what differs: `model.layers.0.mlp.{gate_proj,up_proj}`."""
        if len(self.layers) == 1:
            return self.layers[0]
        parts = [layer.split(".") for layer in self.layers]
        depth = min(map(len, parts)) - 1
        same = next((i for i in range(depth) if len({p[i] for p in parts}) > 1), depth)
        rests = ",".join(".".join(p[same:]) for p in parts)
        return ".".join([*parts[0][:same], f"{{{rests}}}"])


@dataclass(frozen=True)
class Roles:
    """Every unit of a model in its order; `notes` say what could not be found by watching."""

    units: tuple[Unit, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Unit]:
        return iter(self.units)

    def of(self, *roles: str) -> tuple[Unit, ...]:
        """The units of these roles."""
        return tuple(u for u in self.units if u.role in roles)

    def untied(self, model: nn.Module) -> Roles:
        """The same with every layer of a block alone; what shares a parameter outside of them stays together."""
        alone = [
            Unit((layer,), u.role, u.block, _size(model, layer) if u.num_weights else 0) if u.block is not None else u
            for u in self.units
            for layer in (u.layers if u.block is not None else u.layers[:1])
        ]
        return Roles(tuple(alone), self.notes)


@torch.no_grad()
def find_roles(model: nn.Module, probe: dict[str, Tensor] | None = None) -> Roles:
    """Units of every Linear, Conv1D, Conv2d, Embedding and norm, with what they are for.

    `probe`: keyword arguments of `model.forward`, one row of several unpadded positions; by default tokens spread over
    the vocabulary that `model.config` names. The model is left as it was, in the mode it was in.
    """
    probe = probe if probe is not None else _default_probe(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        seen = _Seen(model, probe) if probe is not None else None
        return _roles(model, seen)
    finally:
        for module, mode in modes:
            module.training = mode


def _default_probe(model: nn.Module) -> dict[str, Tensor] | None:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(size, int) or size < 4:
        return None
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    ids = torch.linspace(1, size - 1, _POSITIONS, device=device).long()[None]
    probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return probe | ({"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {})


class _Seen:
    """One pass of the model: order of calls, inputs by identity, and how each block was called."""

    def __init__(self, model: nn.Module, probe: dict[str, Tensor]) -> None:
        self.order: list[str] = []
        self.inputs: dict[str, Tensor] = {}
        self.calls: dict[str, tuple[Any, Any]] = {}
        self.finished: dict[str, int] = {}  # blocks that had ended when a layer was first called
        self.attention: list[str] = []
        named = [(n, b) for n, b in blocks(model) if n]
        ended = 0
        handles = []

        def on_layer(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if name not in self.finished:
                    self.order.append(name)
                    self.finished[name] = ended
                    value = args[0] if args else next(iter(kwargs.values()), None)
                    if isinstance(value, Tensor):
                        self.inputs[name] = value

            return hook

        def on_block(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.calls.setdefault(name, (args, kwargs))

            return hook

        def on_end(*_: Any) -> None:
            nonlocal ended
            ended += 1

        for name, module in model.named_modules():
            if is_layer(module) or is_norm(module):
                handles.append(module.register_forward_pre_hook(on_layer(name), with_kwargs=True))
        for name, block in named:
            handles.append(block.register_forward_pre_hook(on_block(name), with_kwargs=True))
            handles.append(block.register_forward_hook(on_end))
        cache = bool(getattr(getattr(model, "config", None), "use_cache", False)) and "input_ids" in probe
        try:
            model(**probe, **({"use_cache": False} if cache else {}))
            self.failed: str | None = None
        except Exception as error:  # a probe of ours need not suit every model; the names then decide
            self.failed = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        finally:
            for handle in handles:
                handle.remove()


def is_layer(module: nn.Module) -> bool:
    """A Linear, Conv1D, Conv2d or Embedding, or what stands for one."""
    return isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding) or type(module).__name__ == "Conv1D"


def is_norm(module: nn.Module) -> bool:
    """Owns a vector `weight`, and nothing of two axes."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and not is_layer(module)


def _roles(model: nn.Module, seen: _Seen | None) -> Roles:
    named = [(n, b) for n, b in blocks(model) if n]
    notes: list[str] = []
    if seen is None or seen.failed:
        why = seen.failed if seen is not None and seen.failed else "it takes no tokens"
        notes.append(f"roles are read from names: the model could not be watched ({why})")
        seen = None
    roles: dict[str, str] = {}
    block_of: dict[str, int] = {}
    known: dict[tuple[type, tuple[str, ...]], dict[str, str]] = {}
    for number, (prefix, block) in enumerate(named):
        inside = tuple(n for n, m in block.named_modules() if is_layer(m))
        block_of |= {f"{prefix}.{n}": number for n, m in block.named_modules() if is_layer(m) or is_norm(m)}
        key = (type(block), inside)
        if key not in known:
            found = _watched(block, prefix, inside, seen) if seen is not None else None
            if found is None:
                found = {n: _by_name(f"{prefix}.{n}") for n in inside}
                if seen is not None:
                    notes.append(f"{prefix}: what its layers are for is read from their names")
            known[key] = found
        roles |= {f"{prefix}.{n}": role for n, role in known[key].items()}
    units = list(_units(model, roles, block_of, seen))
    scores = [_attention_of(prefix, block, known[(type(block), _inside(block))]) for prefix, block in named]
    units += [Unit((name,), "scores", number, 0) for number, name in enumerate(scores) if name]
    place = {name: i for i, (name, _) in enumerate(model.named_modules())}
    units.sort(key=lambda u: (place[u.layers[0]], u.role != "scores"))
    return Roles(tuple(units), tuple(notes))


def _size(model: nn.Module, layer: str) -> int:
    weight = model.get_submodule(layer)._parameters["weight"]
    return 0 if weight is None else weight.numel()


def _inside(block: nn.Module) -> tuple[str, ...]:
    return tuple(n for n, m in block.named_modules() if is_layer(m))


def _attention_of(prefix: str, block: nn.Module, roles: dict[str, str]) -> str | None:
    """The block itself stands for its attention probabilities, where it has q/k/v."""
    return prefix if "q/k/v" in roles.values() else None


def _units(model: nn.Module, roles: dict[str, str], block_of: dict[str, int], seen: _Seen | None) -> Iterator[Unit]:
    groups: dict[Any, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=True):
        if is_norm(module):
            roles[name] = "norm"
        elif not is_layer(module):
            continue
        elif isinstance(module, nn.Embedding):
            roles[name] = "embedding"
        elif not block_of:
            roles[name] = "other"
        elif name not in block_of:
            before = seen is not None and seen.finished.get(name) == 0
            roles[name] = "embedding" if before else "head"
        key: Any = id(module._parameters["weight"])
        if seen is not None and name in block_of and name in seen.inputs and roles[name] != "norm":
            key = _key(groups, key, name, seen)
        groups.setdefault(key, []).append(name)
    for names in groups.values():
        weights = {
            id(p): p.numel() for n in names for p in [model.get_submodule(n)._parameters["weight"]] if p is not None
        }
        # a table that is also the head is a table: what it feeds is the whole model
        role = "embedding" if any(roles[n] == "embedding" for n in names) else roles[names[0]]
        yield Unit(tuple(names), role, block_of.get(names[0]), sum(weights.values()))


def _key(groups: dict[Any, list[str]], own: Any, name: str, seen: _Seen) -> Any:
    """The group of a layer: that of one with the same parent and the very same input, or its own."""
    if own in groups:
        return own
    parent = name.rpartition(".")[0]
    for key, names in groups.items():
        first = names[0]
        if first.rpartition(".")[0] == parent and seen.inputs.get(first) is seen.inputs[name]:
            return key
    return own


def _by_name(name: str) -> str:
    parts = name.lower().split(".")
    if parts[-1] in ("q", "k", "v", "o"):
        return "o" if parts[-1] == "o" else "q/k/v"
    tail = ".".join(parts[-3:])
    best = ("ffn in", -1)
    for role, words in _NAMES.items():
        for word in words:
            if word in tail and len(word) > best[1]:
                best = (role, len(word))
    return best[0]


def _watched(block: nn.Module, prefix: str, inside: Sequence[str], seen: _Seen) -> dict[str, str] | None:
    """The roles of a block's layers by disturbing them; None where that says nothing."""
    call = seen.calls.get(prefix)
    if call is None:
        return None
    reached = [n for n in (o.removeprefix(f"{prefix}.") for o in seen.order) if n in inside]
    inputs = {n: seen.inputs[f"{prefix}.{n}"] for n in reached if f"{prefix}.{n}" in seen.inputs}
    before = _inputs_and_output(block, call, reached)
    if before is None or before[1].dim() != 3 or before[1].shape[1] < 3:
        return None
    changed: dict[str, tuple[bool, set[str]]] = {}
    for name in reached:
        with _disturbed(block.get_submodule(name)):
            after = _inputs_and_output(block, call, reached)
        if after is None or after[1].shape != before[1].shape:
            return None
        mixes = _moved(after[1][:, 1:], before[1][:, 1:])
        reads = {n for n in reached if n in after[0] and _moved(after[0][n], before[0][n])}
        changed[name] = (mixes, reads)
    mixing = [n for n in reached if changed[n][0]]
    if not mixing:
        return None
    attention = {n for n in reached if any(inputs.get(n) is inputs.get(m) and _same_parent(n, m) for m in mixing)}
    attention |= set(mixing)
    at = max(reached.index(n) for n in attention)
    o = next((n for n in reached[at + 1 :] if n in changed[mixing[-1]][1]), None)
    rest = [n for n in reached if n not in attention and n != o]
    # Every layer behind the attention reads its output through the residual; the feed-forward pair reads one another.
    outs = {n for r in rest for n in changed[r][1] if n in rest and n != r}
    roles = dict.fromkeys(attention, "q/k/v") | {n: "ffn out" if n in outs else "ffn in" for n in rest}
    if o is not None:
        roles[o] = "o"
    return roles | {n: _by_name(f"{prefix}.{n}") for n in inside if n not in roles}  # experts that no token reached


def _same_parent(a: str, b: str) -> bool:
    return a.rpartition(".")[0] == b.rpartition(".")[0]


def _moved(after: Tensor, before: Tensor) -> bool:
    if after.shape != before.shape:
        return True
    scale = float(before.float().abs().max()) + 1e-12
    return float((after.float() - before.float()).abs().max()) > 1e-5 * scale


@contextmanager
def _disturbed(module: nn.Module) -> Iterator[None]:
    """The first position of a layer's output, made another one of about its size."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        if output.dim() < 2:
            return output
        noise = torch.randn(output.shape[-1], generator=torch.Generator().manual_seed(0)).to(output)
        size = output.detach().float().square().mean().sqrt().to(output)
        output = output.clone()
        (output[:, 0] if output.dim() >= 3 else output[0]).add_(noise * size)
        return output

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _inputs_and_output(
    block: nn.Module, call: tuple[Any, Any], names: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor] | None:
    """What each layer is called with, and the block's output; None where the block does not run by itself."""
    inputs: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                inputs[name] = args[0].detach().clone()

        return hook

    handles = [block.get_submodule(n).register_forward_pre_hook(hook_for(n)) for n in names]
    try:
        result = block(*call[0], **call[1])
    except Exception:  # it needs what only the whole model gives it
        return None
    finally:
        for handle in handles:
            handle.remove()
    output = result[0] if isinstance(result, tuple) else result
    return (inputs, output) if isinstance(output, Tensor) else None
