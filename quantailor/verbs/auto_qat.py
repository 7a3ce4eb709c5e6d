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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quantailor.data.examples import Examples
from quantailor.data.loading import Data, overlap, split
from quantailor.environment import environment
from quantailor.errors import QualityGateFailed, UsageError
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
from quantailor.searching.auto_qat import Clock, Found, Search
from quantailor.searching.front import Limits
from quantailor.searching.ladder import relative_loss
from quantailor.searching.latency import Latency
from quantailor.searching.qat_runs import Runs
from quantailor.searching.shared_study import SharedStudy, Tried
from quantailor.searching.space import Space
from quantailor.store.jsonio import write_json
from quantailor.store.manifest import NAME as MANIFEST
from quantailor.store.manifest import write_manifest
from quantailor.store.publish import new_folder
from quantailor.verbs.judging import check
from quantailor.verbs.model import Model, Result, as_model, examples_for, fill, probe_of

SEARCH = "search.json"
_CHOOSING = {"lm": 64, "classification": 256}  # rows that recipes are compared on


@dataclass(frozen=True)
class Searched:
    """What `search` found. `verdict`: feasible, infeasible, or `trials` where no winner was to be trained.

    `data` is search.json: every trial, the front, the winner measured again, and what the search itself cost.
    """

    verdict: str
    data: dict[str, Any]
    out: Path | None

    @property
    def meets(self) -> bool:
        return self.verdict != "infeasible"

    def to_json(self) -> dict[str, Any]:
        return self.data

    def text(self) -> str:
        """Lines for people: the front, the winner, the cost."""
        data = self.data
        unit = data["cost_unit"]
        lines = [f"Pareto front of {len(data['trials'])} trials (loss relative to float, {unit}):"]
        by_number = {t["number"]: t for t in data["trials"]}
        for number in sorted(data["front"], key=lambda n: by_number[n]["cost"]):
            t = by_number[number]
            mark = "  <- winner" if data["winner"] and number == data["winner"]["number"] else ""
            lines.append(f"  {_cost(t['cost'], unit):>14}  {t['loss']:+8.2%}  trial {number:<3} {t['recipe']}{mark}")
        if data["latency_how"]:
            lines.append(f"latency: {data['latency_how']}")
        lines.append(_cost_line(data["cost"]))
        lines.append(data["sentence"])
        return "\n".join([*lines, *(f"note: {note}" for note in data["notes"])])


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
        train_data, choosing, judging = _data(source, data, eval_data, context, settings.seed, notes)
        latency = None if latency_ms is None else Latency(_batch(choosing, latency_tokens), bandwidth)
        looking = time.monotonic()
        reference = reference_for(source.model, judging)
        float_result: Result = getattr(reference, "result", reference)
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
            document = _document(found, space, limits, accuracy, latency, latency_ms, size_bytes, minutes, float_result)
            if folder is None or found.winner is None:
                return _only_trials(document, found, notes, began, place)
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
        document["sentence"] = _sentence(document, excess)
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


def _data(
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


def _document(
    found: Found,
    space: Space,
    limits: Limits,
    accuracy: str | float,
    latency: Latency | None,
    latency_ms: float | None,
    size_bytes: int | None,
    minutes: float,
    float_result: Result,
) -> dict[str, Any]:
    return {
        "verdict": "trials",
        "metric": float_result.metric,
        "float": {"value": float_result.value},
        "budgets": {
            "accuracy": str(accuracy),
            "loss": limits.loss,
            "latency_ms": latency_ms,
            "size_bytes": size_bytes,
            "minutes": minutes,
        },
        "cost_unit": "ms" if latency else "bytes",
        "latency_how": latency.how if latency else None,
        "winner": None if found.winner is None else _trial(found.winner),
        "front": found.front,
        "trials": [_trial(t) for t in found.tried],
        "cost": {
            "search_seconds": found.seconds,
            "processor_seconds": found.processor_seconds,
            "trial_seconds": found.trial_seconds,
            "trials": len(found.tried),
            "workers": len({t.facts.get("worker") for t in found.tried}),
            "budget_seconds": 60 * minutes,
        },
        "stopped": found.stopped,
        "space": space.to_json(),
        "environment": environment(),
    }


def _trial(tried: Tried) -> dict[str, Any]:
    facts = {n: v for n, v in tried.facts.items() if not n.startswith("look ") and n not in ("pid", "seconds_per_step")}
    looks = [v[:2] for n, v in sorted(tried.facts.items()) if n.startswith("look ")]
    point = tried.point.to_json()
    return {
        "number": tried.number,
        "recipe": str(tried.point),
        "point": point,
        "loss": tried.loss,
        "cost": tried.cost,
        **facts,
        "looks": looks,
    }


def _only_trials(document: dict[str, Any], found: Found, notes: list[str], began: float, place: Path) -> Searched:
    """A worker's answer: the front so far."""
    document |= {"notes": [*notes, *found.notes], "study": str(place)}
    document["cost"] |= {"seconds": time.monotonic() - began}
    document["sentence"] = f"{found.stopped}; no model was trained beyond its trial: that is what --out is for"
    return Searched("trials", jsonable(document), None)


def _sentence(document: dict[str, Any], excess: float) -> str:
    """The verdict in words, with every budget beside what was measured."""
    final, budgets = document["final"], document["budgets"]
    metric, unit = document["metric"], document["cost_unit"]
    limit = budgets["latency_ms"] if unit == "ms" else budgets["size_bytes"]
    cost = final["latency_ms"] if unit == "ms" else final["size_bytes"]
    parts = [f"{metric} {final['value']:.4g} ({final['loss']:+.2%} of float, at most {budgets['loss']:+.2%})"]
    parts.append(_cost(cost, unit) + (f" (at most {_cost(limit, unit)})" if limit is not None else ""))
    parts.append(f"{document['cost']['seconds'] / 60:.2f} of {budgets['minutes']:g} minutes")
    if excess <= 0:
        return f"feasible: {document['winner']['recipe']}: {', '.join(parts)}"
    return (
        f"infeasible, closest is {document['winner']['recipe']}: {', '.join(parts)}; "
        f"the worse of the two is {excess:.1%} over its budget"
    )


def _cost(value: float, unit: str) -> str:
    return f"{value:.3f} ms" if unit == "ms" else f"{int(value):,} bytes"


def _cost_line(cost: dict[str, Any]) -> str:
    winner = f", training the winner {cost['winner_seconds']:.0f} s" if "winner_seconds" in cost else ""
    return (
        f"the search cost {cost['trial_seconds']:.0f} s of {cost['trials']} trials by {cost['workers']} worker(s)"
        f"{winner}; {cost['seconds']:.0f} s in all of {cost['budget_seconds']:.0f} s"
    )
