"""The cost-control checklist as a linter of a run's configuration: what is paid for without need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from quantailor.cost.guides import saved_by_speed

Level = Literal["ok", "advice", "warning"]
# Epochs that are usual by bits of the weights: 2-5 at 8, 5-10 at 4, 10-20 at 2 and below (a common guide's rule).
USUAL_EPOCHS = ((8, (2.0, 5.0)), (3, (5.0, 10.0)), (0, (10.0, 20.0)))


@dataclass(frozen=True)
class Run:
    """What a training run is going to do, as far as its cost is concerned."""

    bits: float
    pretrained: bool
    epochs: float | None  # None: not known, such as without a data description
    precision: str = "float32"
    half_is_faster: bool = True  # whether the hardware has a faster bfloat16 product
    batch_size: int = 8
    accumulate: int = 1
    evaluations: int = 8
    coverage: float = 1.0  # share of the weights that is quantized
    small_layers: int = 0  # quantized layers of fewer than 1000 weights
    reuses: bool = True  # starts from a PTQ result, or settings that are known to work


@dataclass(frozen=True)
class Finding:
    """One line of the checklist."""

    item: str
    level: Level
    text: str

    def to_json(self) -> dict[str, Any]:
        return {"item": self.item, "level": self.level, "text": self.text}


def usual_epochs(bits: float) -> tuple[float, float]:
    """(fewest, most) epochs that are usual at these bits."""
    return next(epochs for least, epochs in USUAL_EPOCHS if bits >= least)


def check(run: Run) -> list[Finding]:
    """Every item, also those in order."""
    return [
        _pretrained(run), _precision(run), _epochs(run), _accumulation(run), _partial(run), _early_stop(run),
        _reuse(run),
    ]  # fmt: skip


def _pretrained(run: Run) -> Finding:
    if run.pretrained:
        return Finding("pretrained start", "ok", "starts from trained weights")
    return Finding(
        "pretrained start", "warning",
        "training from scratch: device hours of a fine-tune were 4 to 17 % of that in the cases of docs/PLANNING.md",
    )  # fmt: skip


def _precision(run: Run) -> Finding:
    if run.precision != "float32" or not run.half_is_faster:
        return Finding("mixed precision", "ok", f"computes in {run.precision}")
    return Finding(
        "mixed precision", "advice",
        f"float32; where bfloat16 makes a step 1.4 times as fast it saves {saved_by_speed(1.4):.1%}, not 40 %: measure "
        "one step of each",
    )  # fmt: skip


def _epochs(run: Run) -> Finding:
    low, high = usual_epochs(run.bits)
    if run.epochs is None:
        return Finding("epochs", "advice", "the size of the data is not known, so neither are epochs; give --data")
    if run.epochs > high:
        text = f"{run.epochs:.1f} epochs; {low:g} to {high:g} are usual at {run.bits:g} bits, and more overfits"
        return Finding("epochs", "warning", text)
    text = f"{run.epochs:.2f} epochs, at most the usual {high:g} at {run.bits:g} bits"
    return Finding("epochs", "ok", text)


def _accumulation(run: Run) -> Finding:
    effective = run.batch_size * run.accumulate
    if effective >= 8:
        return Finding("accumulation", "ok", f"{effective} rows an update")
    return Finding(
        "accumulation",
        "advice",
        f"{effective} rows an update; accumulate to 8 or more: no more memory, steadier scales",
    )


def _partial(run: Run) -> Finding:
    if run.small_layers:
        text = (
            f"{run.small_layers} layers of fewer than 1000 weights are quantized; keep them by a rule: nothing is saved"
        )
        return Finding("partial layers", "advice", text)
    return Finding(
        "partial layers", "ok", f"{run.coverage:.1%} of the weights are quantized, no tiny layers among them"
    )


def _early_stop(run: Run) -> Finding:
    if run.evaluations >= 2:
        return Finding("early stop", "ok", f"the best of {run.evaluations} looks is kept")
    return Finding("early stop", "warning", "the run is looked at once, at its end; use 4 or more evaluations")


def _reuse(run: Run) -> Finding:
    if run.reuses:
        return Finding("reuse", "ok", "starts from the best PTQ result, with the table's learning rate")
    return Finding("reuse", "advice", "start from a saved PTQ result instead of solving anew")
