"""Progressive schedules: each stage of QAT starts from the float weights that the one before it trained.

A stage puts those weights back into the float model, finds the next grid's scales and integers for them by PTQ (its
range search and solver), and trains. A finished stage's weights and report are a step of the work folder, so a killed
run goes on in the stage, and at the checkpoint, where it was.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from quantailor.errors import QuantailorError
from quantailor.models.prepare import FAKE_QUANT, PACKED
from quantailor.models.structure import modules_of
from quantailor.progress import Progress
from quantailor.qat import distributed
from quantailor.qat.checkpoint import words
from quantailor.qat.stages import Stage
from quantailor.qat.train import TrainReport
from quantailor.store.header import read_header
from quantailor.store.lock import locked
from quantailor.store.publish import DiskFull, is_disk_full
from quantailor.store.tensors import read_tensor
from quantailor.store.work import PASSING, Work
from quantailor.verbs.model import Model

One = Callable[[Model, Stage, Path | None], Model]  # trains one stage, with its checkpoints in a folder


def run_stages(
    source: Model,
    stages: Sequence[Stage],
    one: One,
    *,
    config: dict[str, Any],
    work: Path | None,
    progress: Progress | None = None,
) -> Model:
    """The last stage's model; `details["stages"]` has a report of each. `config`: what the run is, its stages aside.

    Raises: QuantailorError where a stage's model has parameters that the float model lacks (a PTQ method made them).
    """
    config = {**config, "stages": [[str(s.parsed), s.steps, s.learning_rate, s.gradient] for s in stages]}
    trained: Model | None = None
    current, reports = source, list[dict[str, Any]]()
    with _working(work, config, progress) as kept:
        done = distributed.from_rank(_finished(kept))
        if done is not None:
            reports, weights = done
            current = with_weights(source, weights)
        for number, stage in list(enumerate(stages))[len(reports) :]:
            if progress is not None:
                progress.say(f"stage {number + 1} of {len(stages)}: {stage.parsed}")
            trained = one(current, stage, None if work is None else work / f"stage-{number + 1}")
            assert trained.training is not None
            reports.append(_report(stage, trained.training))
            if number + 1 < len(stages):
                weights = float_weights(trained, source)
                _keep(kept, number, reports[-1], weights)
                current = with_weights(source, weights)
    assert trained is not None  # the last stage is no step of the work folder
    notes = [f"stage {i}, {r['scheme']}: {note}" for i, r in enumerate(reports[:-1], 1) for note in r["notes"]]
    assert trained.state is not None
    trained.state.notes += notes
    return dataclasses.replace(trained, notes=[*trained.notes, *notes], details={"stages": reports})


def float_weights(trained: Model, source: Model) -> dict[str, Tensor]:
    """The trained float parameters and buffers, under the names and in the shapes of the float model `source`."""
    theirs = {**dict(trained.model.named_parameters()), **_persistent(trained)}
    ours = {**dict(source.model.named_parameters()), **_persistent(source)}
    if extra := [name for name in theirs if name not in ours and "_quantizer." not in name]:
        raise QuantailorError(
            f"PTQ gave the model {extra[0]}, which its float parent has no place for; use another --method for stages"
        )
    if lost := [name for name in ours if name not in theirs]:
        raise QuantailorError(
            f"PTQ took {lost[0]} out of the model (a folded norm), and a stage cannot put it back; train one scheme"
        )
    turned = {n for n, m in source.model.named_modules() if type(m).__name__ == "Conv1D"}  # [N, O]; its twin has [O, N]
    turned &= {name for name, _ in modules_of(trained.model, FAKE_QUANT)}
    found = {}
    for name in ours:
        new, module = theirs[name].detach(), name.removesuffix(".weight")
        found[name] = (new.t() if module in turned else new).contiguous().clone()
    return found


def with_weights(source: Model, weights: dict[str, Tensor]) -> Model:
    """A copy of the float model with these parameters and buffers."""
    model = copy.deepcopy(source.model)
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, value in weights.items():
            places[name].copy_(value)
    return dataclasses.replace(source, model=model)


def _persistent(model: Model) -> dict[str, Tensor]:
    """Buffers of the model's state, without those of quantizers."""
    assert not any(True for _ in modules_of(model.model, PACKED))
    passing = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return {n: b for n, b in model.model.named_buffers() if n not in passing and "_quantizer." not in n}


def _report(stage: Stage, report: TrainReport) -> dict[str, Any]:
    """What a stage has to say, as JSON data."""
    return {
        "scheme": str(stage.parsed),
        "steps": report.steps,
        "learning_rate": report.learning_rate,
        "start": words(report.start),
        "best": words(report.best),
        "best_step": report.best_step,
        "notes": report.notes,
    }


@contextmanager
def _working(folder: Path | None, config: dict[str, Any], progress: Progress | None) -> Iterator[Work | None]:
    """The finished stages of this very run; they go when it is done, or failed with nothing worth keeping."""
    if folder is None or distributed.rank():
        yield None
        return
    with locked(folder):
        work = Work(folder, config)
        if work.fresh_because and progress is not None:
            progress.say(f"the unfinished stages in {folder} are not continued: {work.fresh_because}; starting afresh")
        try:
            yield work
        except BaseException as error:
            nothing = not work.records and not any(path.is_dir() for path in folder.iterdir())
            if nothing or isinstance(error, DiskFull) or is_disk_full(error):
                work.remove()
            raise
        work.remove()


def _keep(work: Work | None, number: int, report: dict[str, Any], weights: dict[str, Tensor]) -> None:
    if work is None:
        return
    path = work.path(_file(number))
    save_file(weights, path)
    work.finish(report, [path])


def _finished(work: Work | None) -> tuple[list[dict[str, Any]], dict[str, Tensor]] | None:
    """(reports, weights of the last one) of the stages that are done, which only process 0 has; None without any."""
    if work is None or not work.records:
        return None
    facts = read_header(work.path(_file(len(work.records) - 1)))
    return work.records, {name: read_tensor(fact) for name, fact in facts.items()}


def _file(number: int) -> str:
    return f"{PASSING}stage-{number + 1}.safetensors"
