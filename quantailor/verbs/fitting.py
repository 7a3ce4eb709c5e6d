"""The main job: `fit`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantailor.cost.size import bits_per_weight, num_weights, weight_file_bytes
from quantailor.data.examples import Examples
from quantailor.data.loading import Data, overlap, split
from quantailor.environment import environment
from quantailor.errors import QualityGateFailed, UsageError
from quantailor.formats import folder as folders
from quantailor.models.prepare import planned
from quantailor.pages.markdown import fit_page
from quantailor.progress import Progress
from quantailor.recipe import Recipe, Rule
from quantailor.searching.ladder import Goal, Ladder
from quantailor.spec import Scheme
from quantailor.store.jsonio import write_json
from quantailor.store.manifest import NAME as MANIFEST
from quantailor.store.manifest import write_manifest
from quantailor.store.publish import new_folder
from quantailor.verbs.judging import adequacy, check
from quantailor.verbs.model import (
    Model,
    as_model,
    examples_for,
    fill,
    probe_of,
    refuse_questions,
)
from quantailor.verbs.quantizing import PointsLike, recipe_for


@dataclass(frozen=True)
class FitResult:
    """What `fit` found and saved. `data` is report.json; `meets` says whether the tolerance was met."""

    verdict: str
    data: dict[str, Any]
    out: Path

    @property
    def meets(self) -> bool:
        return self.verdict != "infeasible"

    def to_json(self) -> dict[str, Any]:
        return self.data


def fit(
    model: str | Path | Model,
    data: Data | Examples,
    scheme: str | Scheme,
    out: str | Path,
    *,
    eval_data: Data | Examples | None = None,
    goal: Goal | None = None,
    rules: Sequence[Rule] = (),
    points: PointsLike = None,
    ragged: bool = True,
    context: int = 256,
    overwrite: bool = False,
    format: str | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """The main job: the cheapest way from a float model to `scheme` that stays within the tolerance; packed, checked,
    saved with its inventory, report.json and report.md.

    Where nothing meets the tolerance in time, the best that was found is saved and the verdict is `infeasible`.
    Raises: UsageError, UntrustedInput as the parts do; QualityGateFailed if the packed model is not the simulated one.
    """
    goal = goal or Goal()
    recipe = recipe_for(scheme, rules, ragged=ragged, points=points)
    if recipe.scheme.is_float and not rules:
        raise UsageError("scheme float is the control, not a goal; name one with fewer bits, such as w4a16-g32")
    inputs = [Path(p) for p in (model, data, eval_data) if isinstance(p, str | Path)]
    with new_folder(Path(out), overwrite=overwrite, inputs=inputs) as folder:
        source = as_model(model)
        refuse_questions(source)
        if source.state is not None:
            raise UsageError("the model is quantized already; start from its float parent")
        planned_for = planned(source.model, recipe).inventory  # the user's mistakes: before anything is measured
        folders.choose_format(planned_for, format)
        train_data, held_out, notes = _data_for_fit(source, data, eval_data, context, goal)
        notes += _on_calibration(source, recipe, train_data, held_out, goal)
        outcome = Ladder(source.model, recipe, train_data, held_out, goal, progress).climb()
        best = dataclasses.replace(source, model=outcome.model, probe=probe_of(held_out))  # type: ignore[arg-type]
        assert best.state is not None
        fill(folder, best, format, {"verdict": outcome.verdict, "seed": goal.settings.seed})
        parity = check(folder)
        weights = num_weights(source.model)
        float_bytes = sum(p.numel() * p.element_size() for p in source.model.parameters())
        report: dict[str, Any] = {
            "verdict": outcome.verdict,
            "metric": outcome.final.result.metric,
            "float": {"value": outcome.float.value},
            "final": {"name": outcome.final.name, "value": outcome.final.value, "loss": outcome.final.loss},
            "tolerance": goal.tolerance,
            "scheme": str(recipe.scheme),
            "method": best.state.method,
            "steps": [step.to_json() for step in outcome.steps],
            "size_bytes": weight_file_bytes(folder),
            "bits_per_weight": bits_per_weight(folder, weights),
            "float_size_bytes": float_bytes,
            "float_bits_per_weight": 8 * float_bytes / weights,
            "num_weights": weights,
            "coverage": best.state.inventory.coverage,
            "recovery": outcome.recovery if outcome.final.training else None,
            "recovery_control": outcome.recovery_control,
            "check": parity.to_json(),
            "notes": [*notes, *outcome.notes, *best.state.notes],
            "inventory": [
                {**e.to_json(), **({"report": r} if (r := best.state.layers.get(e.name)) else {})}
                for e in best.state.inventory
            ],
            "seed": goal.settings.seed,
            "command": _command(),
            "environment": environment(),
            "out": str(out),
        }
        if not parity.equal:
            layer = next(iter(parity.differing), "no single layer")
            raise QualityGateFailed(
                f"the packed model is not the simulated one ({layer}); nothing was saved: report this as a bug"
            )
        write_json(folder / "report.json", _finite(report))
        (folder / "report.md").write_text(fit_page(report), encoding="utf-8")
        (folder / MANIFEST).unlink()
        write_manifest(
            folder, kind="quantized model", details={"scheme": str(recipe.scheme), "verdict": outcome.verdict}
        )
    return FitResult(outcome.verdict, _finite(report), Path(out))


def _on_calibration(source: Model, recipe: Recipe, data: Examples, held_out: Examples, goal: Goal) -> list[str]:
    """What the receipt says of the calibration data, from a quick look."""
    if recipe.scheme.weight is None:
        return []
    try:
        found = adequacy(
            source,
            data,
            eval_data=held_out,
            scheme=recipe.scheme,
            samples=goal.calibration,
            seed=goal.settings.seed,
            at_most=32,
        )
    except UsageError as error:  # such as a model without Linears: `fit` itself may well go on
        return [f"whether the calibration data is enough was not looked at: {error}"]
    return found.for_receipt()


def _data_for_fit(
    source: Model, data: Data | Examples, eval_data: Data | Examples | None, context: int, goal: Goal
) -> tuple[Examples, Examples, list[str]]:
    train_data = examples_for(source, data, context=context)
    notes = [f"training data: {note}" for note in train_data.notes] + list(source.notes)
    if eval_data is None:
        train_data, held_out = split(train_data, 0.1, goal.settings.seed)
        notes.append(f"no evaluation data: measured on {len(held_out)} rows held out of the training data")
        return train_data, held_out, notes
    held_out = examples_for(source, eval_data, context=context)
    notes += [f"evaluation data: {note}" for note in held_out.notes]
    if shared := overlap(train_data, held_out):
        notes.append(f"{shared} rows are in both the training and the evaluation data: figures may flatter")
    return train_data, held_out, notes


def _finite(value: Any) -> Any:
    """JSON knows no infinity: such a number becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _command() -> str:
    if not sys.argv or not sys.argv[0].endswith("quantailor"):
        return "quantailor.fit(...) from Python"
    return shlex.join(["quantailor", *sys.argv[1:]])
