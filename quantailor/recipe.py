"""Which module gets which scheme, and why each other one is kept: a default, ordered rules, a full inventory.

A rule matches by name pattern, by type, by size, or by all that it names; the first that matches decides. Modules
that no rule names fall to the defaults: what lies in the model's repeated blocks is quantized, embeddings, heads,
norms and what stands outside the blocks are kept, each with its reason. Nothing is left out: a module that owns a
parameter has its line in the inventory, fused expert tensors included.

Works on anything that looks like an `nn.Module`; it reads names, types and shapes, never a weight's values.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

from quantailor.errors import UsageError
from quantailor.points import PointEntry, Points
from quantailor.spec import PerGroup, Scheme, why_not_convolution

QUANTIZABLE = ("Linear", "Conv1D", "Conv2d", "Embedding")


@dataclass(frozen=True)
class Keep:
    """Leave the module in float, for this reason."""

    reason: str


@dataclass(frozen=True)
class Rule:
    """What to do with the modules that match every condition given (`None` = no condition).

    `pattern` is a shell-style pattern on the whole name (`model.layers.0.*`, `*.down_proj`); sizes count weights.
    `method` is the PTQ method for what it hits, where that is not the recipe's.
    """

    action: Scheme | Keep
    pattern: str | None = None
    module_type: str | None = None
    more_than: int | None = None
    fewer_than: int | None = None
    method: str | None = None

    @property
    def keeps(self) -> bool:
        """Whether it leaves what it hits in float."""
        return isinstance(self.action, Keep) or self.action.is_float

    @property
    def is_by_size(self) -> bool:
        """Whether it asks for nothing but a size: then it is about matrices, not about norms, which are small."""
        return self.pattern is None and self.module_type is None

    def matches(self, name: str, kind: str, num_weights: int) -> bool:
        return (
            (self.pattern is None or fnmatch.fnmatchcase(name, self.pattern))
            and (self.module_type is None or self.module_type == kind)
            and (self.more_than is None or num_weights > self.more_than)
            and (self.fewer_than is None or num_weights < self.fewer_than)
        )

    def __str__(self) -> str:
        conditions = [
            f"name {self.pattern!r}" if self.pattern is not None else "",
            f"type {self.module_type}" if self.module_type is not None else "",
            f"more than {self.more_than} weights" if self.more_than is not None else "",
            f"fewer than {self.fewer_than} weights" if self.fewer_than is not None else "",
        ]
        return " and ".join(filter(None, conditions)) or "every module"


@dataclass(frozen=True)
class Entry:
    """One line of the inventory: `scheme` if the module is quantized, else None; `reason` says why either way."""

    name: str
    kind: str
    shape: tuple[int, ...]
    num_weights: int
    scheme: Scheme | None
    reason: str
    tied_to: str | None = None
    method: str | None = None  # the rule's, where one names it; None: the recipe's

    def to_json(self) -> dict[str, Any]:
        scheme = str(self.scheme) if self.scheme else None
        return {
            "name": self.name,
            "type": self.kind,
            "shape": list(self.shape),
            "num_weights": self.num_weights,
            "scheme": scheme,
            "reason": self.reason,
            "tied_to": self.tied_to,
        } | ({"method": self.method} if self.method else {})


@dataclass(frozen=True)
class Inventory:
    """Every module that owns a parameter, in the model's order, each quantized or kept with its reason.

    `points`: every tensor inside the blocks that could be quantized, where a recipe asks for any of them.
    """

    entries: tuple[Entry, ...]
    points: tuple[PointEntry, ...] = ()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    @property
    def quantized(self) -> dict[str, Scheme]:
        return {e.name: e.scheme for e in self.entries if e.scheme is not None}

    def method_of(self, name: str, default: str) -> str:
        """The PTQ method of a layer: its rule's, or the recipe's."""
        found = next((e.method for e in self.entries if e.name == name), None)
        return found or default

    @property
    def coverage(self) -> float:
        """The share of all weights that is quantized, 0 to 1; a tied weight counts once, a bias is not quantized."""
        own = [e for e in self.entries if e.tied_to is None]
        return sum(prod(e.shape) for e in own if e.scheme is not None) / max(sum(e.num_weights for e in own), 1)

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str], list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault((str(entry.scheme or "float"), entry.kind, entry.reason), []).append(entry)
        lines = [
            f"{len(es):>5} {kind:<18} -> {scheme:<16} {sum(e.num_weights for e in es):>12,} weights   {reason}"
            for (scheme, kind, reason), es in groups.items()
        ]
        asked: dict[tuple[str, str, str], int] = {}
        for point in self.points:
            if point.spec is not None:
                key = (point.kind, point.point, str(point.spec))
                asked[key] = asked.get(key, 0) + 1
        lines += [
            f"{n:>5} {kind:<18} -> {spec:<16} {'':>12} point     {name}" for (kind, name, spec), n in asked.items()
        ]
        return "\n".join([*lines, f"      {self.coverage:.1%} of all weights quantized"])


@dataclass(frozen=True)
class Recipe:
    """A default scheme, rules that come before it, the PTQ method that finds the integers, and the points inside blocks
    that are quantized besides (models/prepare.py finds them: it takes a pass of the model)."""

    scheme: Scheme
    rules: tuple[Rule, ...] = field(default=())
    method: str = "gptq"
    points: Points = field(default=Points())

    def assign(self, model: Any) -> Inventory:
        """Every module of `model` with its scheme or the reason why it is kept.

        Raises: UsageError where a rule matches nothing, a rule asks to quantize what cannot be, a group size does
        not divide and may not be ragged, tied weights get two schemes, or nothing at all would be quantized.
        """
        modules = dict(model.named_modules())
        blocks = block_prefixes(model)
        head = _head_name(model, modules)
        used: set[int] = set()
        beside: dict[int, str] = {}  # rules that hit, so far, only what cannot be quantized
        owner: dict[int, str] = {}  # the first module to hold a parameter: later ones are tied to it
        entries = []
        for name, module in modules.items():
            own = list(module.named_parameters(recurse=False))
            if not own:
                continue
            kind = type(module).__name__
            num_weights = sum(p.numel() for _, p in own)
            shape: tuple[int, ...] = max((tuple(p.shape) for _, p in own), key=len)
            hits = [i for i, rule in enumerate(self.rules) if rule.matches(name, kind, num_weights)]
            cannot = _cannot(module, kind, shape)
            by_name = [i for i in hits if self.rules[i].keeps and not self.rules[i].is_by_size]
            used.update(hits if cannot is None else by_name)
            beside.update((i, f"{name}, a {kind} ({cannot})") for i in hits if i not in used)
            scheme, reason = self._decide(name, module, kind, cannot, blocks, head, hits)
            if scheme is not None:
                _check_ragged(name, scheme, kind, shape)
                if kind == "Conv2d" and (problem := why_not_convolution(scheme)):
                    raise UsageError(f"{name}: {problem}")
            tied_to = owner.setdefault(id(own[0][1]), name)
            method = self.rules[hits[0]].method if hits and scheme is not None else None
            entries.append(
                Entry(name, kind, shape, num_weights, scheme, reason, None if tied_to == name else tied_to, method)
            )
        if unused := [i for i in range(len(self.rules)) if i not in used]:
            if what := beside.get(unused[0]):
                raise UsageError(f"a rule hits only what cannot be quantized, such as {what}: {self.rules[unused[0]]}")
            names = [e.name for e in entries if e.scheme is not None] or list(modules)[1:]
            raise UsageError(f"a rule matches nothing: {self.rules[unused[0]]}; names look like {', '.join(names[:3])}")
        entries = _agree_on_tied(modules, entries)
        if not self.scheme.is_float and not any(e.scheme for e in entries):
            kept = entries[0].reason if entries else "it has no weights"
            raise UsageError(f"scheme {self.scheme} would quantize nothing in this model; its modules are kept: {kept}")
        return Inventory(tuple(entries))

    def _decide(
        self,
        name: str,
        module: Any,
        kind: str,
        cannot: str | None,
        blocks: tuple[str, ...],
        head: str | None,
        hits: list[int],
    ) -> tuple[Scheme | None, str]:
        if hits:
            rule = self.rules[hits[0]]
            if isinstance(rule.action, Keep):
                return None, cannot if cannot and rule.is_by_size else rule.action.reason
            if cannot is None:
                return None if rule.action.is_float else rule.action, f"rule: {rule}"
        if cannot is not None:
            return None, cannot
        if self.scheme.is_float:
            return None, "scheme float"
        if kind == "Embedding":
            return None, "embedding: kept unless a rule names it"
        if name == head:
            return None, "output head: kept unless a rule names it"
        if blocks and not name.startswith(blocks):
            return None, "outside the repeated blocks: kept unless a rule names it"
        if (
            getattr(module, "groups", 1) != 1
            and self.scheme.weight
            and isinstance(self.scheme.weight.granularity, PerGroup)
        ):
            return None, "grouped convolution: too few inputs a channel for groups; kept unless a rule names it"
        return self.scheme, "in a repeated block" if blocks else "default scheme"


def block_prefixes(model: Any) -> tuple[str, ...]:
    """Name prefixes (`model.layers.`) of the repeated blocks: the lists of two or more alike modules with Linears.

    Alike by the name of their class: a point that is quantized inside one of them makes a subclass of that name.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__ not in ("ModuleList", "Sequential") or name.startswith(tuple(found)):
            continue
        children = list(module.children())
        if (
            len({type(c).__name__ for c in children}) == 1
            and children
            and _is_block(children[0], single=len(children) == 1)
        ):
            found.append(f"{name}." if name else "")
    return tuple(found)


def _own_kind(module: Any) -> str:
    """The kind of a layer, or of the one that a fake-quantized, packed or adapted one stands for; blocks stay."""
    return type(module).__name__.removeprefix("Fake").removeprefix("Quant").removeprefix("LoRA")


def _is_block(module: Any, single: bool) -> bool:
    """A block holds at least two matrix products of its own; a list of one is a block only if it says it is a layer."""
    inner = [m for m in module.modules() if _own_kind(m) in QUANTIZABLE and m is not module]
    return len(inner) >= 2 and (not single or type(module).__name__.endswith(("Layer", "Block")))


def _head_name(model: Any, modules: dict[str, Any]) -> str | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if get else None
    except (AttributeError, NotImplementedError):  # models without a head say so in either way
        head = None
    return next((name for name, module in modules.items() if module is head), None) if head is not None else None


def _cannot(module: Any, kind: str, shape: tuple[int, ...]) -> str | None:
    """Why this module cannot be quantized; None if it can."""
    if kind not in QUANTIZABLE:
        if len(shape) >= 3 and not kind.startswith("Conv"):
            return f"fused {len(shape)}-D tensor {list(shape)}, as experts are stored: not quantized in one piece"
        if len(shape) == 2:
            return f"a {kind} is none of {', '.join(QUANTIZABLE)}: kept in float"
        return "not a matrix product: kept in float"
    if kind == "Conv2d" and module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}: only zeros can be packed; kept in float"
    if kind == "Embedding" and module.max_norm is not None:
        return f"max_norm={module.max_norm} rewrites the table at each look-up; kept in float"
    return None


def in_features(kind: str, shape: tuple[int, ...]) -> int:
    """The length of the axis that groups run along. Conv1D stores [N, O]; Conv2d [O, I, H, W]."""
    if kind == "Conv1D":
        return shape[0]
    size = 1
    for axis in shape[1:]:
        size *= axis
    return size


def _check_ragged(name: str, scheme: Scheme, kind: str, shape: tuple[int, ...]) -> None:
    granularity = scheme.weight.granularity if scheme.weight else None
    if not isinstance(granularity, PerGroup) or granularity.ragged:
        return
    n = in_features(kind, shape)
    if n % granularity.size:
        fits = [g for g in (16, 32, 64, 96, 128, 4, 8) if n % g == 0][:3]
        fits_text = ", ".join(map(str, fits)) or str(n)
        raise UsageError(
            f"{name}: group_size={granularity.size} does not divide in_features={n}; "
            f"use {fits_text}, allow a ragged last group, or keep this layer by a rule"
        )


def _agree_on_tied(modules: dict[str, Any], entries: list[Entry]) -> list[Entry]:
    """Two modules that share a weight must share its scheme; where only one is quantized, say which rule is missing."""
    by_weight: dict[int, list[Entry]] = {}
    for entry in entries:
        weight = getattr(modules[entry.name], "weight", None)
        if weight is not None:
            by_weight.setdefault(id(weight), []).append(entry)
    for shared in by_weight.values():
        schemes = {e.scheme.weight if e.scheme else None for e in shared}
        if len(schemes) > 1:
            names = " and ".join(e.name for e in shared)
            raise UsageError(
                f"{names} share one weight but not one scheme; add a rule that gives both the same weight spec"
            )
    return entries
