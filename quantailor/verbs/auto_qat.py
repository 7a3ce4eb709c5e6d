"""Auto-QAT: `search`.

found = search("path/to/model", "train.txt", out="out", accuracy="98%", latency_ms=5.0, minutes=30)
print(found.text())
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from quantailor.data.examples import Examples
from quantailor.data.loading import Data, overlap, split
from quantailor.environment import environment
from quantailor.errors import QualityGateFailed, UsageError
from quantailor.evaluate.lm import Reference
from quantailor.evaluate.result import difference, jsonable
from quantailor.evaluate.run import evaluate as measure
from quantailor.evaluate.run import reference_for
from quantailor.formats import folder as folders
from quantailor.models.structure import blocks
from quantailor.progress import Progress
from quantailor.ptq.defaults import one_pass
from quantailor.qat.checkpoint import fingerprint
from quantailor.qat.settings import Settings
from quantailor.recipe import Recipe, Rule
from quantailor.searching.auto_qat import Clock, Search
from quantailor.searching.front import Limits
from quantailor.searching.ladder import relative_loss
from quantailor.searching.latency import Latency
from quantailor.searching.qat_runs import Runs
from quantailor.searching.shared_study import SharedStudy
from quantailor.searching.space import Space
from quantailor.store.jsonio import write_json
from quantailor.store.manifest import NAME as MANIFEST
from quantailor.store.manifest import write_manifest
from quantailor.store.publish import new_folder
from quantailor.verbs.judging import check
from quantailor.verbs.model import Model, Result, as_model, examples_for, fill, probe_of
from quantailor.verbs.searched import Searched, document_of, only_trials, sentence_of

SEARCH = "search.json"
_CHOOSING = {"lm": 64, "classification": 256}  # rows that recipes are compared on


def search(
    model: str | Path | Model,
    data: Data | Examples,
    *,
    out: str | Path | None = None,
    eval_data: Data | Examples | None = None,
    accuracy: str | float = "98%",
    latency_ms: float | None = None,
    size_bytes: int | None = None,
    minutes: float = 60.0,
    space: Space | None = None,
    trials: int | None = None,
    study: str | Path | None = None,
    bandwidth: float | None = None,
    latency_tokens: int = 1,
    settings: Settings | None = None,
    rules: Sequence[Rule] = (),
    samples: int = 128,
    context: int = 256,
    overwrite: bool = False,
    format: str | None = None,
    progress: Progress | None = None,
) -> Searched:
    """The QAT recipe of least loss that is within the budgets: found, trained and saved in `minutes`.

    `accuracy`: "98%" of the float model's figure (perplexity: at most float / 0.98), or the figure itself as a number.
    `latency_ms`: of one pass of the packed model over `latency_tokens` tokens, measured here, or with `bandwidth`
    (GB/s) predicted from bytes. `size_bytes`: of the packed weights, in place of a latency. Recipes are compared on
    rows held out of `data`; the verdict is of `eval_data`, or of other such rows. `study`: a folder that several
    workers share, and that survives a kill; by default hidden beside `out`, and removed when all is done. Without
    `out` nothing is trained but the trials: that is a worker. `settings`: what the space leaves open.
    Raises: UsageError, UntrustedInput as the parts do; Busy.
    """
    began = time.monotonic()
    space, settings, bars = space or Space(), settings or Settings(), progress or Progress()
    if not 0 < minutes < math.inf:
        raise UsageError(f"minutes={minutes} is no time to work in; use more than 0, such as 30")
    if latency_ms is not None and size_bytes is not None:
        raise UsageError("latency_ms and size_bytes are both costs, and a search has one; leave one of the two out")
    for name, value in (("latency_ms", latency_ms), ("size_bytes", size_bytes), ("latency_tokens", latency_tokens)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{name}={value} must be above 0")
    if bandwidth is not None and latency_ms is None:
        raise UsageError("bandwidth is about predicting a latency, and none is asked for; give latency_ms too")
    inputs = [Path(p) for p in (model, data, eval_data) if isinstance(p, str | Path)]
    with ExitStack() as stack:
        folder = None if out is None else stack.enter_context(new_folder(Path(out), overwrite=overwrite, inputs=inputs))
        source = as_model(model)
        if source.state is not None:
            raise UsageError("the model is quantized already; start from its float parent")
        notes = list(source.notes)
        space = _suited(space, source, notes)
        for scheme in {point.scheme for point in space.first_points()}:
            folders.choose_format(Recipe(scheme, tuple(rules), one_pass(scheme)).assign(source.model), format)
        train_data, choosing, judging = data_for_search(source, data, eval_data, context, settings.seed, notes)
        latency = None if latency_ms is None else Latency(_batch(choosing, latency_tokens), bandwidth)
        looking = time.monotonic()
        reference = reference_for(source.model, judging)
        float_result: Result = reference.result if isinstance(reference, Reference) else reference
        looked = time.monotonic() - looking
        runs = Runs(
            source.model, train_data, choosing, rules, settings, samples=samples, latency=latency, progress=bars
        )
        notes += runs.notes
        limits = Limits(_allowed(accuracy, float_result), latency_ms if latency_ms is not None else size_bytes)
        place = _study_folder(study, out, stack)
        question = _question(source, runs, choosing, settings, rules, limits, latency)
        clock = Clock(began, 60 * minutes, finish=2.0 * looked + 0.01 * 60 * minutes if folder is not None else 0.0)
        with SharedStudy(place, question, space, limits, seed=settings.seed) as shared:
            work = Search(runs, shared, limits, clock, trials=trials, trains_winner=folder is not None, progress=bars)
            found = work.search()
            budgets = {
                "accuracy": str(accuracy),
                "loss": limits.loss,
                "latency_ms": latency_ms,
                "size_bytes": size_bytes,
                "minutes": minutes,
            }
            document = document_of(found, space, budgets, latency, float_result)
            if folder is None or found.winner is None:
                return only_trials(document, found, notes, began, place)
            model_, trained = work.train_winner(found.winner)
        winner_seconds = time.monotonic() - began - found.seconds
        final = measure(model_, judging, reference=reference)
        again = runs.latency_of(model_)
        start = runs.start(found.winner.point.scheme)
        loss = relative_loss(final.value, float_result.value, final.higher_is_better)
        cost = again if again is not None else float(start.size_bytes)
        excess = limits.excess(loss, cost)
        best = dataclasses.replace(source, model=model_, probe=probe_of(judging))  # type: ignore[arg-type]
        verdict = "feasible" if excess <= 0 else "infeasible"
        fill(folder, best, format, {"verdict": verdict, "seed": settings.seed})
        parity = check(folder)
        if not parity.equal:
            layer = next(iter(parity.differing), "no single layer")
            raise QualityGateFailed(
                f"the packed model is not the simulated one ({layer}); nothing was saved: report this as a bug"
            )
        document |= {
            "verdict": verdict,
            "final": {
                "value": final.value,
                "loss": loss,
                "change_interval": difference(float_result, final)[1],
                "result": final.to_json(),
                "latency_ms": again,
                "size_bytes": start.size_bytes,
                "steps": trained.steps_done,
            },
            "check": parity.to_json(),
            "notes": [*notes, *found.notes],
            "out": str(out),
        }
        document["cost"] |= {"winner_seconds": winner_seconds, "seconds": time.monotonic() - began}
        document["sentence"] = sentence_of(document, excess)
        document = jsonable(document)
        write_json(folder / SEARCH, document)
        (folder / MANIFEST).unlink()
        write_manifest(folder, kind="quantized model", details={"scheme": found.winner.facts["scheme"]})
    if study is None:
        shutil.rmtree(place, ignore_errors=True)
    return Searched(verdict, document, Path(out) if out is not None else None)


def _suited(space: Space, model: Model, notes: list[str]) -> Space:
    """The space without frozen shares that are less than one block of this model."""
    count = len([name for name, _ in blocks(model.model) if name])
    useless = [share for share in space.frozen if share and math.floor(share * count) < 1]
    if not useless:
        return space
    left = tuple(share for share in space.frozen if share not in useless)
    if not left:
        raise UsageError(f"frozen={useless[0]} of {count} blocks is none; use at least {1 / max(count, 1):.2g}, or 0")
    notes.append(
        f"frozen shares that are less than one of {count} blocks were left out: {', '.join(map(str, useless))}"
    )
    return dataclasses.replace(space, frozen=left)


def data_for_search(
    model: Model, data: Data | Examples, eval_data: Data | Examples | None, context: int, seed: int, notes: list[str]
) -> tuple[Examples, Examples, Examples]:
    """(to train on, to choose on, to judge on)."""
    train_data = examples_for(model, data, context=context)
    notes += [f"training data: {note}" for note in train_data.notes]
    train_data, held_out = split(train_data, 0.1, seed)
    if eval_data is None:
        train_data, judging = split(train_data, 0.1, seed + 1)
        notes.append(f"no evaluation data: the verdict is of {len(judging)} rows held out of the training data")
    else:
        judging = examples_for(model, eval_data, context=context)
        notes += [f"evaluation data: {note}" for note in judging.notes]
        if shared := overlap(train_data, judging):
            notes.append(f"{shared} rows are in both the training and the evaluation data: figures may flatter")
    choosing = held_out.take(_CHOOSING[held_out.task])
    notes.append(f"recipes are compared on {len(choosing)} rows held out of the training data")
    return train_data, choosing, judging


def _batch(examples: Examples, tokens: int) -> dict[str, Tensor]:
    """One row of the data, cut to so many tokens. Raises: UsageError if it has not as many."""
    batch = next(iter(examples.batches(1, limit=1)))
    cut = {name: value[:, :tokens].contiguous() for name, value in batch.items() if name != "labels"}
    if (has := next(iter(cut.values())).shape[1]) < tokens:
        raise UsageError(f"latency_tokens={tokens}, and a row of the data has {has} tokens; use {has} or fewer")
    return cut


def _allowed(accuracy: str | float, base: Result) -> float:
    """The loss that is allowed, relative to float. Raises: UsageError for what is no figure."""
    text = str(accuracy).strip()
    try:
        value = float(text.removesuffix("%"))
    except ValueError as error:
        raise UsageError(
            f"accuracy={text!r} is no figure; write 98% of the float model's, or the figure itself"
        ) from error
    if text.endswith("%"):
        if not 0 < value <= 200:
            raise UsageError(f"accuracy={text} of the float model's figure must be above 0; 98% is usual")
        return 1 - value / 100 if base.higher_is_better else 100 / value - 1
    if not 0 < value < math.inf:
        raise UsageError(
            f"accuracy={text} must be above 0: the {base.metric} that has to be reached, or a share such as 98%"
        )
    return relative_loss(value, base.value, base.higher_is_better)


def _study_folder(study: str | Path | None, out: str | Path | None, stack: ExitStack) -> Path:
    if study is not None:
        return Path(study)
    if out is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quantailor-study-"))) / "study"
    path = Path(out).absolute()
    return path.parent / f".{path.name}.study"


def _question(
    source: Model,
    runs: Runs,
    choosing: Examples,
    settings: Settings,
    rules: Sequence[Rule],
    limits: Limits,
    latency: Latency | None,
) -> dict[str, Any]:
    """What a trial's figures depend on, beside its point. A latency that is measured is of one kind of machine."""
    versions = environment()
    if latency is None or latency.bandwidth is not None:
        versions = {name: value for name, value in versions.items() if name not in ("device", "threads")}
    question = {
        "model": fingerprint(source.model),
        "training data": runs.train_data.fingerprint,
        "choosing data": choosing.fingerprint,
        "settings": dataclasses.asdict(settings),
        "rules": [str(rule) for rule in rules],
        "samples": sum(len(next(iter(batch.values()))) for batch in runs.batches),
        "limits": dataclasses.asdict(limits),
        "latency": latency.how if latency else None,
        "versions": versions,
    }
    return dict(json.loads(json.dumps(question)))
