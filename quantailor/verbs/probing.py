"""`probe`: a short run on few rows, and from it what the full one would reach.

A verb beside `train`, since what it gives is an answer and no model; `--go` then makes the full run by `train` itself.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantailor.data.examples import Examples
from quantailor.data.loading import Data, split
from quantailor.errors import UsageError
from quantailor.evaluate.forecast import Forecast, forecast
from quantailor.evaluate.result import Result
from quantailor.evaluate.run import evaluate as measure
from quantailor.progress import Progress
from quantailor.qat.settings import Settings, resolved
from quantailor.qat.train import weight_bits
from quantailor.verbs.model import Model, as_model, examples_for
from quantailor.verbs.training import train

LOOKS = 12


@dataclass(frozen=True)
class Probe:
    """What a short run found. Scores are lower-is-better: nats a token, or minus the accuracy.

    `before`: of PTQ alone; `reached`: the probe's best; `full`: what `full_steps` on all rows are forecast to reach;
    `original`: the float model's, None where there is none. `seconds`: of the probe; `full_seconds`: forecast.
    """

    metric: str
    rows: int
    steps: int
    before: float
    reached: float
    original: float | None
    full_steps: int
    full: Forecast
    seconds: float
    full_seconds: float
    curve: tuple[tuple[int, float], ...]
    notes: tuple[str, ...] = ()

    @property
    def worthwhile(self) -> bool:
        """Whether all of the interval lies below what PTQ has."""
        return self.full.interval[1] < self.before

    def recovery(self, score: float) -> float | None:
        """The share of PTQ's loss that a score takes back; None where PTQ lost nothing, or nobody knows."""
        if self.original is None or self.before <= self.original:
            return None
        return (self.before - score) / (self.before - self.original)

    def told(self, score: float) -> float:
        """A score in the metric's own terms."""
        return math.exp(score) if self.metric == "perplexity" else -score

    def to_json(self) -> dict[str, Any]:
        ends = sorted(self.told(end) for end in self.full.interval)
        return {
            "metric": self.metric,
            "before": self.told(self.before),
            "reached": self.told(self.reached),
            "float": None if self.original is None else self.told(self.original),
            "forecast": self.told(self.full.value),
            "forecast_interval": ends,
            "level": self.full.level,
            "fits": {name: self.told(value) for name, value in self.full.fits.items()},
            "recovery": self.recovery(self.full.value),
            "recovery_interval": sorted(r for e in self.full.interval if (r := self.recovery(e)) is not None) or None,
            "worthwhile": self.worthwhile,
            "rows": self.rows,
            "steps": self.steps,
            "full_steps": self.full_steps,
            "seconds": self.seconds,
            "full_seconds": self.full_seconds,
            "curve": [list(look) for look in self.curve],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        low, high = sorted(self.told(end) for end in self.full.interval)
        floating = "" if self.original is None else f", float {self.told(self.original):.4f}"
        share = self.recovery(self.full.value)
        taken = "" if share is None else f", {share:.0%} of what PTQ lost"
        verdict = "it gains" if self.worthwhile else "it may gain nothing: the interval reaches what PTQ has"
        return (
            f"{self.metric}: PTQ {self.told(self.before):.4f}{floating}; the probe ({self.rows} rows, {self.steps} "
            f"steps, {self.seconds:.0f} s) reached {self.told(self.reached):.4f}\n"
            f"forecast of {self.full_steps} steps, about {self.full_seconds:.0f} s: {self.told(self.full.value):.4f} "
            f"({self.full.level:.0%}: {low:.4f} to {high:.4f}){taken}; {verdict}"
        )


def probe(
    model: str | Path | Model,
    data: Data | Examples,
    *,
    scheme: str | None = None,
    eval_data: Data | Examples | None = None,
    samples: int = 1000,
    epochs: float = 2.0,
    settings: Settings | None = None,
    context: int = 256,
    progress: Progress | None = None,
    **options: Any,
) -> Probe:
    """Train on `samples` rows for `epochs`, and forecast what the run that `settings` describe would reach.

    `options`: as `train` takes them. The model is left as it is. Raises: as `train`; UsageError where there are too
    few steps to see a curve.
    """
    settings = settings or Settings()
    source = as_model(model)
    rows = examples_for(source, data, context=context)
    if eval_data is None:
        rows, held = split(rows, 0.1, settings.seed)
    else:
        held = examples_for(source, eval_data, context=context)
    few = rows.drawn(samples, settings.seed)
    notes = [f"{samples:,} rows were asked for, there are {len(few):,}"] if len(few) < samples else []
    short = dataclasses.replace(settings, steps=None, epochs=epochs, evaluations=LOOKS)
    began = time.monotonic()
    done = train(
        source, few, scheme=scheme, eval_data=held, settings=short, context=context, progress=progress, **options
    )
    seconds = time.monotonic() - began
    report = done.training
    assert report is not None
    full_steps = resolved(settings, weight_bits(done.model), len(rows)).steps
    assert full_steps is not None
    if full_steps < report.steps:
        raise UsageError(
            f"the full run of {full_steps} steps is shorter than the probe's {report.steps}; just run it, or probe "
            "with fewer samples"
        )
    curve = tuple((step, score[0]) for step, score in report.curve)
    original = _score(measure(source.model, held)) if source.state is None else None
    return Probe(
        metric="perplexity" if held.task == "lm" else "accuracy",
        rows=len(few),
        steps=report.steps,
        before=report.start[0],
        reached=report.best[0],
        original=original,
        full_steps=full_steps,
        full=forecast(curve, full_steps, seed=settings.seed),
        seconds=seconds,
        full_seconds=seconds * full_steps / report.steps,
        curve=curve,
        notes=(*notes, *done.notes),
    )


def _score(result: Result) -> float:
    return -result.value if result.higher_is_better else math.log(result.value)
