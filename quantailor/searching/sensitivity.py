"""How much each unit of a model hurts at few bits: KL from the float model, measured or from its second order.

measured   put one unit at a time on the grid, run the blocks from there on, compare the logits with the float ones
fisher     the same to second order from gradients at the layers' outputs (searching/fisher.py): a few passes in all,
           where measuring takes one a unit and choice
Whole types (all norms, every q/k/v) are tried together as well: that is what a recommendation by type rests on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from quantailor.evaluate.divergence import kl_divergence
from quantailor.models.roles import Roles, Unit
from quantailor.progress import Progress
from quantailor.ptq.chain import Chain
from quantailor.searching.fisher import products, second_order
from quantailor.searching.suffix import Suffix
from quantailor.searching.variants import Variants
from quantailor.spec import Scheme

Batch = Mapping[str, Tensor]
How = Literal["measured", "fisher"]
MEASURED_UNITS = 160  # up to so many, and
MEASURED_WEIGHTS = 50_000_000  # up to so many weights in them, measuring takes minutes on two cores
SOLVED_BYTES = 2 << 30  # integers of all choices that are held at once while gradients are taken


class Divergence:
    """Mean KL(float || now) in nats a position, on fixed batches: over positions that the mask has, or over rows."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.suffix = Suffix(model, batches)
        self.masks = [batch.get("attention_mask") for batch in batches]
        self.reference = [logits.float().log_softmax(-1) for logits in self.suffix.logits_now]
        self.passes = 0

    @property
    def positions(self) -> int:
        return sum(int(kept.numel()) for kept in map(self._kept, range(len(self.masks))))

    def start(self, units: Iterable[Unit]) -> int:
        """The first block that a change of these units can move."""
        starts = [self.suffix.start_of.get(layer, 0) for unit in units for layer in unit.layers]
        return min(starts, default=0)

    def __call__(self, start: int = 0) -> float:
        """Of the model as it is now, where the blocks before `start` are as at the last `refresh`."""
        total = count = 0.0
        self.passes += 1
        for index in range(len(self.reference)):
            logits = self.suffix.logits(index, start)
            kl = kl_divergence(self.reference[index], logits.float().log_softmax(-1)).double()
            kept = self._kept(index)
            total += float(kl.flatten()[kept].sum())
            count += kept.numel()
        return max(0.0, total / count)

    def _kept(self, index: int) -> Tensor:
        reference, mask = self.reference[index], self.masks[index]
        flat = (
            torch.ones(reference.shape[:-1], dtype=torch.bool) if mask is None or reference.dim() == 2 else mask.bool()
        )
        return flat.flatten().nonzero().squeeze(1)


@dataclass
class Study:
    """A float model, its units solved under every choice, and the data to try them on. In eval mode throughout.

    `calibration` is what layers are solved on, `held` what divergence is measured on.
    """

    model: nn.Module
    units: Sequence[Unit]
    schemes: Sequence[Scheme]
    method: Chain
    calibration: Sequence[Batch]
    held: Sequence[Batch]
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.solving = Suffix(self.model, self.calibration)
        self.masks = [batch.get("attention_mask") for batch in self.calibration]
        self.divergence = Divergence(self.model, self.held)
        self.variants = Variants(self.model, self.method)
        self.alone: dict[tuple[Unit, Scheme], float] = {}  # what `measure` has found

    @property
    def notes(self) -> list[str]:
        return list(dict.fromkeys([*self.solving.notes, *self.divergence.suffix.notes, *self.variants.notes]))

    def solve(self, units: Sequence[Unit] | None = None) -> None:
        """Solve the units (all by default) under every choice."""
        units = [u for u in (self.units if units is None else units) if u.role != "scores"]
        units = [u for u in units if any((n, s) not in self.variants.solved for n in u.layers for s in self.schemes)]
        if not units:
            return
        with self.progress.task("solving layers", len(units)) as advance:
            self.variants.solve(units, self.schemes, self.solving, self.masks, advance)

    @torch.no_grad()
    def measured(self, choices: Mapping[Unit, Scheme]) -> float:
        """KL with these units on their grids, the others in float."""
        with self.variants.applied(choices):
            return self.divergence(self.divergence.start(choices))

    def measure(self) -> dict[tuple[Unit, Scheme], float]:
        """Each unit alone under each choice."""
        with self.progress.task("measuring", len(self.units) * len(self.schemes)) as advance:
            for unit in self.units:
                for scheme in self.schemes:
                    if (unit, scheme) not in self.alone:
                        self.alone[unit, scheme] = self.measured({unit: scheme})
                    advance(1)
        return self.alone

    def estimate(self, draws: int = 4, seed: int = 0) -> tuple[Tensor, float, list[Unit]]:
        """(`products` of the units that have weights, positions, those units), a part of them in memory at a time."""
        units = [u for u in self.units if u.role != "scores"]
        parts, positions = [], 0.0
        in_parts = _parts(units, SOLVED_BYTES // len(self.schemes))
        for part in in_parts:
            self.solve(part)
            with self.progress.task("gradients", len(self.held)) as advance:
                a, positions = products(
                    self.model, self.held, self.variants, part, self.schemes, draws=draws, seed=seed, advance=advance
                )
            parts.append(a)
            if len(in_parts) > 1:
                self.variants.solved.clear()
        return torch.cat(parts, dim=1), positions, units


def _parts(units: Sequence[Unit], most: int) -> list[list[Unit]]:
    parts: list[list[Unit]] = []
    size = 0
    for unit in units:
        if not parts or size + unit.num_weights > most:
            parts.append([])
            size = 0
        parts[-1].append(unit)
        size += unit.num_weights
    return parts


@dataclass(frozen=True)
class Scores:
    """`units[unit, scheme]` and `types[role, scheme]` in nats; what `how` could not say is left out of both."""

    how: How
    units: dict[tuple[Unit, Scheme], float]
    types: dict[tuple[str, Scheme], float]
    notes: tuple[str, ...] = ()


def choose_how(units: Sequence[Unit]) -> How:
    """Measured where that takes minutes, else from gradients."""
    weights = sum(u.num_weights for u in units)
    return "measured" if len(units) <= MEASURED_UNITS and weights <= MEASURED_WEIGHTS else "fisher"


def score(study: Study, how: How, *, draws: int = 4, seed: int = 0) -> Scores:
    """Every unit and every type under every choice of the study."""
    roles = list(dict.fromkeys(u.role for u in study.units))
    if how == "measured":
        study.solve()
        alone = study.measure()
        types = {}
        with study.progress.task("measuring types", len(roles) * len(study.schemes)) as advance:
            for role in roles:
                together = Roles(tuple(study.units)).of(role)
                for scheme in study.schemes:
                    types[role, scheme] = (
                        alone[together[0], scheme]
                        if len(together) == 1
                        else study.measured(dict.fromkeys(together, scheme))
                    )
                    advance(1)
        return Scores(how, alone, types, tuple(study.notes))
    a, positions, units = study.estimate(draws, seed)
    kl = second_order(a, positions)
    alone = {(u, s): float(kl[i, j]) for i, u in enumerate(units) for j, s in enumerate(study.schemes)}
    types = {}
    for role in roles:
        members = [i for i, u in enumerate(units) if u.role == role]
        if members:
            joint = second_order(a[:, members].sum(1), positions)
            types |= {(role, s): float(joint[j]) for j, s in enumerate(study.schemes)}
    notes = list(study.notes)
    if "scores" in roles:
        notes.append("attention scores have no weights: gradients say nothing of them, measuring would")
    return Scores(how, alone, types, tuple(notes))
