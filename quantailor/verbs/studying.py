"""What `sensitivity` and `mixed` have in common: a copy to work on, rows to solve on and others to measure on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from quantailor import ptq
from quantailor.data.batching import drawn_rows, length_of
from quantailor.data.examples import Examples
from quantailor.data.loading import Data
from quantailor.errors import UsageError
from quantailor.models.roles import Unit
from quantailor.progress import Progress
from quantailor.searching.sensitivity import Study
from quantailor.searching.variants import check_choices
from quantailor.spec import Scheme
from quantailor.verbs.model import Model, as_model, examples_for, refuse_questions

HELD_ROWS = {"lm": 16, "classification": 96}  # what divergence is measured on, where the caller does not say


def study_for(
    model: Model,
    data: Data | Examples,
    units: Sequence[Unit],
    schemes: Sequence[Scheme],
    *,
    method: str = "gptq",
    samples: int = 128,
    rows: int | None = None,
    context: int = 256,
    seed: int = 0,
) -> Study:
    """What `mixed` searches with, for several searches over the same units and choices."""
    check_choices(schemes)
    source, work = copied(model)
    examples = examples_for(source, data, context=context)
    return make_study(work, examples, units, schemes, method, samples, rows, seed, None)[0]


def make_study(
    work: nn.Module,
    examples: Examples,
    units: Sequence[Unit],
    schemes: Sequence[Scheme],
    method: str,
    samples: int,
    rows: int | None,
    seed: int,
    progress: Progress | None,
) -> tuple[Study, list[str]]:
    """The study, and what has to be said about its data."""
    calibration, held, notes = draw(examples, samples, rows, seed)
    return Study(work, units, schemes, ptq.method(method), calibration, held, progress or Progress()), notes


def copied(model: str | Path | Model) -> tuple[Model, nn.Module]:
    """The model, and a copy of its module to work on, in eval mode."""
    source = as_model(model)
    refuse_questions(source)
    if source.state is not None:
        raise UsageError("the model is quantized already; start from its float parent")
    return source, copy.deepcopy(source.model).eval()


def draw(
    examples: Examples, samples: int, rows: int | None, seed: int
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]], list[str]]:
    """(calibration batches: the rows that `quantize` would draw, held batches: the next ones, notes)."""
    wanted = HELD_ROWS[examples.task] if rows is None else rows
    for name, value in (("samples", samples), ("rows", wanted)):
        if value < 1:
            raise UsageError(f"{name}={value} leaves nothing to do; use 1 or more")
    if not 0 <= seed < 2**31:
        raise UsageError(f"seed={seed} must be 0 or more and below 2^31")
    order = drawn_rows(len(examples), samples + wanted, seed)
    if len(order) < 2:
        raise UsageError(f"{examples.source} has one row; solving layers and measuring them takes two, so add data")
    notes = list(examples.notes)
    if len(order) < samples + wanted:
        wanted = max(1, min(wanted, len(order) // 4))
        notes.append(
            f"{examples.source} has {len(order)} rows: {len(order) - wanted} to solve on, {wanted} to measure on"
        )
    parts = order[: len(order) - wanted], order[len(order) - wanted :]

    def batched(part: list[int], size: int) -> list[dict[str, Tensor]]:
        if examples.task == "classification":  # rows of about one length need little padding
            part = sorted(part, key=lambda row: length_of(examples.dataset[row]))
        chunks = [part[i : i + size] for i in range(0, len(part), size)]
        return [examples.collator([examples.dataset[row] for row in chunk]) for chunk in chunks]

    return batched(parts[0], 4), batched(parts[1], 8 if examples.task == "lm" else 32), notes
