"""The mix of schemes that a budget buys: `mixed`.

mix = mixed("path/to/model", "calib.txt", average_bits=4.5)
model = quantize("path/to/model", mix.scheme, rules=mix.rules, data="calib.txt")       or train, or fit
"""

from __future__ import annotations

import dataclasses
import glob
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from quantailor.data.examples import Examples
from quantailor.data.loading import Data
from quantailor.errors import UsageError
from quantailor.models.roles import Unit, find_roles
from quantailor.progress import Progress
from quantailor.recipe import QUANTIZABLE, Inventory, Keep, Recipe, Rule
from quantailor.searching.costs import packed_nanoseconds
from quantailor.searching.mixed import ROUNDS, Found, Search
from quantailor.searching.sensitivity import How, choose_how
from quantailor.searching.variants import check_choices, unit_bytes
from quantailor.spec import Scheme
from quantailor.verbs.model import Model, examples_for
from quantailor.verbs.studying import copied, make_study

CHOICES = (
    *("w2a16-g32", "w2a16-g64", "w3a16-g32", "w3a16-g64", "w3a16", "w4a16-g32", "w4a16-g64", "w4a16"),
    *("w5a16-g64", "w6a16-g64", "w8a16"),
)


@dataclass(frozen=True)
class Mixed:
    """A scheme for every unit. `scheme` is the most frequent one; `rules` name every layer, the caller's rules first.

    `kl`: joint, measured on held rows with each layer solved by itself; `uniform_kl` the same for the best uniform
    choice within the budget, None where none fits. `average_bits` counts scales and the padding of rows.
    """

    scheme: Scheme
    rules: tuple[Rule, ...]
    assigned: tuple[tuple[Unit, Scheme], ...]
    size_bytes: int
    average_bits: float
    budget: int
    budget_unit: str
    kl: float
    uniform: str | None
    uniform_kl: float | None
    how: How
    found: Found
    seconds: float
    notes: tuple[str, ...]

    def recipe(self, method: str = "qronos") -> Recipe:
        """What `prepare` takes."""
        return Recipe(self.scheme, self.rules, method)

    def to_json(self) -> dict[str, Any]:
        return {
            "scheme": str(self.scheme),
            "assigned": [{"unit": u.name, "role": u.role, "scheme": str(s)} for u, s in self.assigned],
            "rules": rule_lines(self.rules),
            "size_bytes": self.size_bytes,
            "average_bits": self.average_bits,
            "budget": self.budget,
            "budget_unit": self.budget_unit,
            "kl": self.kl,
            "uniform": self.uniform,
            "uniform_kl": self.uniform_kl,
            "how": self.how,
            "candidates": [
                {"name": c.name, "cost": c.cost, "kl": c.kl, "predicted": c.predicted} for c in self.found.candidates
            ],
            "passes": self.found.passes,
            "seconds": round(self.seconds, 2),
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """Lines for people."""
        by_scheme = Counter({str(s): 0 for _, s in self.assigned})
        for unit, scheme in self.assigned:
            by_scheme[str(scheme)] += unit.num_weights
        weights = sum(by_scheme.values())
        shares = ", ".join(f"{name} {count / weights:.0%}" for name, count in by_scheme.most_common())
        beside = f", {self.uniform} {self.uniform_kl:.5f}" if self.uniform_kl is not None else ""
        lines = [
            f"{self.average_bits:.3f} bits a weight, {self.size_bytes:,} bytes: {shares}",
            f"KL {self.kl:.5f} nats{beside} (layers solved one by one, held rows)",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def mixed(
    model: str | Path | Model,
    data: Data | Examples,
    *,
    average_bits: float | None = None,
    bytes: int | None = None,
    milliseconds: float | None = None,
    choices: Sequence[str | Scheme] = CHOICES,
    also: Sequence[str] = (),
    rules: Sequence[Rule] = (),
    method: str = "gptq",
    how: How | None = None,
    rounds: int = ROUNDS,
    samples: int = 128,
    rows: int | None = None,
    context: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
) -> Mixed:
    """The mix of `choices` of least KL within one budget, as rules that `quantize`, `train` and `fit` take.

    Exactly one budget: `average_bits` a weight or `bytes` of the layers that are searched, both with their scales, or
    `milliseconds` that their packed forms take for one token, measured here. Searched is what a scheme quantizes by
    default (the layers of the blocks, but for those that `rules` name); `also`: "embedding", "head" as well. {q, k, v}
    and {gate, up} get one scheme. `method` solves the layers while searching.
    Raises: UsageError for a budget that no mix meets (it names the least), and as the parts do.
    """
    began = time.monotonic()
    schemes = [c if isinstance(c, Scheme) else Scheme.parse(c) for c in choices]
    check_choices(schemes)
    if sum(b is not None for b in (average_bits, bytes, milliseconds)) != 1:
        raise UsageError("give exactly one budget: average_bits, bytes or milliseconds")
    if rounds < 0:
        raise UsageError(f"rounds={rounds} must be 0 or more; 2 is usual")
    source, work = copied(model)
    found = find_roles(work)
    units = _searched(work, Recipe(schemes[0], tuple(rules)).assign(work), found.units, rules, also)
    weights = sum(u.num_weights for u in units)
    if milliseconds is not None:
        costs, budget, unit = _nanoseconds(work, units, schemes), int(milliseconds * 1e6), "nanoseconds"
    else:
        costs = {(u, s): unit_bytes(work, u, s) for u in units for s in schemes}
        budget = bytes if bytes is not None else int((average_bits or 0.0) * weights / 8)
        unit = "bytes"
    _check_budget(units, schemes, costs, budget, unit, weights)
    examples = examples_for(source, data, context=context)
    study, notes = make_study(work, examples, units, schemes, method, samples, rows, seed, progress)
    chosen: How = how or choose_how(units)
    result = Search(study, costs, budget, how=chosen, seed=seed).run(rounds)
    assigned = tuple((u, schemes[i]) for u, i in zip(units, result.best.chosen))
    uniform = min((c for c in result.candidates if c.name.startswith("uniform ")), key=lambda c: c.kl, default=None)
    size = sum(unit_bytes(work, u, s) for u, s in assigned)
    most = Counter[Scheme]()
    for u, s in assigned:
        most[s] += u.num_weights
    named = [Rule(s, pattern=glob.escape(layer)) for u, s in assigned for layer in u.layers]
    return Mixed(
        scheme=most.most_common(1)[0][0],
        rules=(*rules, *named),
        assigned=assigned,
        size_bytes=size,
        average_bits=8 * size / weights,
        budget=budget,
        budget_unit=unit,
        kl=result.best.kl,
        uniform=uniform.name.removeprefix("uniform ") if uniform else None,
        uniform_kl=uniform.kl if uniform else None,
        how=chosen,
        found=result,
        seconds=time.monotonic() - began,
        notes=(*found.notes, *notes, *study.notes),
    )


def rule_lines(rules: Sequence[Rule]) -> list[str]:
    """Rules as `PATTERN=SCHEME` lines, what `--rule` takes. Raises: UsageError for one that has other conditions."""
    lines = []
    for rule in rules:
        if rule.pattern is None or rule.module_type or rule.more_than is not None or rule.fewer_than is not None:
            raise UsageError(f"a rule on {rule} has no PATTERN=SCHEME form; name its layers by a pattern")
        action = "keep" if isinstance(rule.action, Keep) else str(rule.action)
        lines.append(f"{rule.pattern}={action}" + (f":{rule.method}" if rule.method else ""))
    return lines


def _searched(
    model: nn.Module, inventory: Inventory, units: Sequence[Unit], rules: Sequence[Rule], also: Sequence[str]
) -> list[Unit]:
    """The units to choose for, without the layers that `rules` decide."""
    if unknown := [r for r in also if r not in ("embedding", "head")]:
        raise UsageError(
            f"also={unknown[0]!r} is none of embedding, head; the layers of the blocks are searched anyway"
        )
    free = {e.name for e in inventory if not any(r.matches(e.name, e.kind, e.num_weights) for r in rules)}
    default = {e.name for e in inventory if e.scheme is not None} & free
    extra = {e.name for e in inventory if e.kind in QUANTIZABLE} & free
    found = []
    for unit in units:
        allowed = default if unit.role not in also else extra
        layers = tuple(n for n in unit.layers if n in allowed)
        if unit.role in ("scores", "norm") or not layers:
            continue
        shared = {
            id(p): p.numel() for n in layers for p in [model.get_submodule(n)._parameters["weight"]] if p is not None
        }
        found.append(dataclasses.replace(unit, layers=layers, num_weights=sum(shared.values())))
    if not found:
        raise UsageError("no layer is left to search: the rules decide them all; leave one out")
    return found


def _check_budget(
    units: Sequence[Unit],
    schemes: Sequence[Scheme],
    costs: dict[tuple[Unit, Scheme], int],
    budget: int,
    unit: str,
    weights: int,
) -> None:
    """Before any work. Raises: UsageError naming the least that is possible."""
    least = sum(min(costs[u, s] for s in schemes) for u in units)
    if least <= budget:
        return
    bits = f", {8 * least / weights:.3f} bits a weight" if unit == "bytes" else f", {least / 1e6:.3f} ms"
    asked = f" ({8 * budget / weights:.3f} bits a weight with scales)" if unit == "bytes" else ""
    raise UsageError(
        f"a budget of {budget:,} {unit}{asked} is below the least that these choices can cost, {least:,} {unit}{bits}; "
        "raise it, or add cheaper choices such as w2a16-g64"
    )


def _nanoseconds(model: nn.Module, units: Sequence[Unit], schemes: Sequence[Scheme]) -> dict[tuple[Unit, Scheme], int]:
    """Each unit's packed layers on one token; layers of one shape are timed once."""
    known: dict[tuple[int, int, Scheme], int] = {}
    costs: dict[tuple[Unit, Scheme], int] = {}
    for unit in units:
        for scheme in schemes:
            total = 0
            for name in unit.layers:
                layer = model.get_submodule(name)
                if not isinstance(layer, nn.Linear):
                    raise UsageError(
                        f"{name} is a {type(layer).__name__}: only Linear layers are timed; use average_bits or bytes"
                    )
                key = (layer.out_features, layer.in_features, scheme)
                if key not in known:
                    known[key] = packed_nanoseconds(layer, scheme)
                total += known[key]
            costs[unit, scheme] = total
    return costs
