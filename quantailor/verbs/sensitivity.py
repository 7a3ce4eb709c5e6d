"""Which layers hurt at few bits: `sensitivity`.

found = sensitivity("path/to/model", "calib.txt");  found.recommend()
model = quantize("path/to/model", "w8a16", rules=found.rules(), data="calib.txt")
"""

from __future__ import annotations

import dataclasses
import glob
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantailor.data.examples import Examples
from quantailor.data.loading import Data
from quantailor.errors import UsageError
from quantailor.models.roles import ROLES, Unit, find_roles
from quantailor.progress import Progress
from quantailor.recipe import Keep, Rule
from quantailor.searching.sensitivity import How, choose_how, score
from quantailor.searching.variants import check_choices, unit_bytes
from quantailor.spec import Scheme
from quantailor.verbs.model import Model, examples_for
from quantailor.verbs.studying import copied, make_study


@dataclass(frozen=True)
class Row:
    """One unit: KL in nats a position at each number of bits (None: `how` cannot say), and its bytes there."""

    unit: Unit
    kl: dict[int, float | None]
    size_bytes: dict[int, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.unit.name,
            "layers": list(self.unit.layers),
            "role": self.unit.role,
            "block": self.unit.block,
            "num_weights": self.unit.num_weights,
            "kl": {str(b): v for b, v in self.kl.items()},
            "size_bytes": {str(b): v for b, v in self.size_bytes.items()},
        }


@dataclass(frozen=True)
class Recommendation:
    """The fewest bits that a type of layers can be given; None: float, since none that was tried is good enough."""

    role: str
    bits: int | None
    kl: float
    reason: str


@dataclass(frozen=True)
class Sensitivity:
    """KL from the float model of each unit alone, and of whole types together. `how`: measured, or fisher (from
    gradients, second order). `positions` held positions (rows for a classifier) were compared."""

    how: How
    rows: tuple[Row, ...]
    types: dict[str, dict[int, float]]
    bits: tuple[int, ...]
    group_size: int | None
    method: str
    positions: int
    seconds: float
    fingerprint: str
    notes: tuple[str, ...]

    def ranking(self, bits: int) -> list[Row]:
        """Rows that have a value, the most sensitive first. Raises: UsageError for bits that were not tried."""
        if bits not in self.bits:
            raise UsageError(f"bits={bits} was not tried; {', '.join(map(str, self.bits))} were")
        known = [row for row in self.rows if row.kl[bits] is not None]
        return sorted(known, key=lambda row: -(row.kl[bits] or 0.0))

    def recommend(self, tolerance: float = 0.01) -> list[Recommendation]:
        """For each type the fewest bits at which the whole of it on the grid costs at most `tolerance` nats (0.01:
        about 1 % of perplexity). Raises: UsageError for a tolerance that is not positive."""
        if not tolerance > 0:
            raise UsageError(f"tolerance={tolerance} nats must be positive; 0.01 is about 1 % of perplexity")
        found = []
        for role, by_bits in self.types.items():
            good = [b for b in self.bits if all(by_bits[c] <= tolerance for c in self.bits if c >= b)]
            bits = min(good, default=None)
            most = max(self.bits)
            kl = by_bits[bits] if bits is not None else by_bits[most]
            below = max((b for b in self.bits if bits is not None and b < bits), default=None)
            reason = f"KL {kl:.5f} at {bits if bits is not None else most} bits"
            if bits is None:
                reason += f", over {tolerance:g}"
            elif below is not None:
                reason += f", {by_bits[below]:.5f} at {below}"
            found.append(Recommendation(role, bits, kl, reason))
        return found

    def rules(self, tolerance: float = 0.01) -> list[Rule]:
        """The recommendation as rules, for layers that hold a matrix; scores and norms have no integer layer here."""
        bits_of = {r.role: r.bits for r in self.recommend(tolerance) if r.role not in ("scores", "norm")}
        rules = []
        for row in self.rows:
            if row.unit.role in bits_of:
                bits = bits_of[row.unit.role]
                reason = f"{row.unit.role}: no number of bits that was tried keeps KL within {tolerance:g}"
                action = Keep(reason) if bits is None else _scheme(bits, self.group_size)
                rules += [Rule(action, pattern=glob.escape(layer)) for layer in row.unit.layers]
        return rules

    def to_json(self) -> dict[str, Any]:
        return {
            "how": self.how,
            "metric": "KL from the float model, nats a position",
            "bits": list(self.bits),
            "group_size": self.group_size,
            "method": self.method,
            "positions": self.positions,
            "units": [row.to_json() for row in self.rows],
            "types": {role: {str(b): v for b, v in by.items()} for role, by in self.types.items()},
            "recommendation": [dataclasses.asdict(r) for r in self.recommend()],
            "seconds": round(self.seconds, 2),
            "fingerprint": self.fingerprint,
            "notes": list(self.notes),
        }


def sensitivity(
    model: str | Path | Model,
    data: Data | Examples,
    bits: Sequence[int] = (8, 4, 3, 2),
    *,
    group_size: int | None = 32,
    method: str = "gptq",
    roles: Sequence[str] | None = None,
    tied: bool = True,
    how: How | None = None,
    samples: int = 128,
    rows: int | None = None,
    context: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sensitivity:
    """How much each unit and each type of layer hurts at each number of bits. The model is left as it is.

    Units: {q, k, v} and {gate, up} together; `tied=False` looks at their layers one by one. `roles` limits what is
    looked at. `how`: "measured", "fisher", or None for the one that suits the size. `samples` rows are what layers
    are solved on, `rows` others what divergence is measured on. A unit's norms and attention scores are tried too:
    gains in groups like weights, probabilities on 2^bits levels a row.
    Raises: UsageError, UntrustedInput as the parts do.
    """
    began = time.monotonic()
    bits = tuple(dict.fromkeys(bits))
    schemes = [_scheme(b, group_size) for b in bits]
    check_choices(schemes)
    if unknown := [r for r in roles or () if r not in ROLES]:
        raise UsageError(f"role {unknown[0]!r} is none of {', '.join(ROLES)}")
    source, work = copied(model)
    found = find_roles(work)
    found = found if tied else found.untied(work)
    units = [u for u in found if roles is None or u.role in roles]
    if not units:
        raise UsageError(f"the model has no layer of {', '.join(roles or ROLES)}; leave roles out to see what it has")
    examples = examples_for(source, data, context=context)
    study, notes = make_study(work, examples, units, schemes, method, samples, rows, seed, progress)
    chosen: How = how or choose_how(units)
    scores = score(study, chosen, seed=seed)
    table = tuple(
        Row(
            unit,
            {b: scores.units.get((unit, s)) for b, s in zip(bits, schemes)},
            {b: unit_bytes(work, unit, s) for b, s in zip(bits, schemes)},
        )
        for unit in units
    )
    types = {
        role: {b: scores.types[role, s] for b, s in zip(bits, schemes)}
        for role in ROLES
        if (role, schemes[0]) in scores.types
    }
    return Sensitivity(
        how=chosen,
        rows=table,
        types=types,
        bits=bits,
        group_size=group_size,
        method=method,
        positions=study.divergence.positions,
        seconds=time.monotonic() - began,
        fingerprint=examples.fingerprint,
        notes=(*found.notes, *notes, *scores.notes),
    )


def _scheme(bits: int, group_size: int | None) -> Scheme:
    return Scheme.parse(f"w{bits}a16" + (f"-g{group_size}" if group_size is not None else ""))
