"""`retask`: a model for another task, by two routes of the same length, measured on the same data.

A float model:      `tune then QAT`  float fine-tune on the task, PTQ, QAT     against  `QAT at once`   PTQ, QAT
A quantized model:  `restore`        dequantize, float fine-tune, PTQ, QAT     against  `tune quantized`

Both routes see the task for `steps` steps. The first spends `float_share` of them in float, and then has its own tuned
float model as teacher; the second knows no float model of this task, so the task's own loss is all it has.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantailor.data.examples import Examples
from quantailor.data.loading import Data, split
from quantailor.errors import UsageError
from quantailor.evaluate.result import Result, difference
from quantailor.evaluate.run import evaluate as measure
from quantailor.models.dequantize import dequantize_model
from quantailor.progress import Progress
from quantailor.qat.settings import Settings, resolved
from quantailor.spec import Scheme
from quantailor.verbs.model import Model, examples_for
from quantailor.verbs.quantizing import quantize
from quantailor.verbs.training import train
from quantailor.verbs.training_inputs import for_training


@dataclass(frozen=True)
class Route:
    """One way, start to end. `stages`: (what was done, its steps, what it measured)."""

    name: str
    model: Model
    result: Result
    stages: tuple[tuple[str, int, float], ...]
    seconds: float


@dataclass(frozen=True)
class Retasked:
    """Both routes. `change`: second minus first in the metric, with its 95 % interval, paired row by row."""

    start: str  # float or quantized
    first: Route
    second: Route
    change: tuple[float, tuple[float, float]]
    notes: tuple[str, ...] = ()

    @property
    def better(self) -> Route:
        """The route with the better figure, certain or not."""
        gain = self.change[0] if self.first.result.higher_is_better else -self.change[0]
        return self.second if gain > 0 else self.first

    @property
    def is_certain(self) -> bool:
        """Whether the interval of the difference leaves 0 out."""
        low, high = self.change[1]
        return low > 0 or high < 0

    def to_json(self) -> dict[str, Any]:
        return {
            "start": self.start,
            "metric": self.first.result.metric,
            "routes": [
                {
                    "name": route.name,
                    "value": route.result.value,
                    "interval": list(route.result.interval),
                    "seconds": round(route.seconds, 2),
                    "stages": [{"what": w, "steps": n, "value": v} for w, n, v in route.stages],
                }
                for route in (self.first, self.second)
            ],
            "change": self.change[0],
            "change_interval": list(self.change[1]),
            "better": self.better.name,
            "certain": self.is_certain,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = []
        for route in (self.first, self.second):
            stages = ", ".join(f"{what} ({steps} steps) {value:.4f}" for what, steps, value in route.stages)
            lines.append(f"{route.name:<16}{route.result}\n{'':<16}{stages}; {route.seconds:.0f} s")
        low, high = self.change[1]
        sure = "a difference that this data can show" if self.is_certain else "no difference that this data can show"
        lines.append(
            f"{self.second.name} - {self.first.name}: {self.change[0]:+.4f} ({low:+.4f} to {high:+.4f}), {sure}"
        )
        return "\n".join(lines)


def retask(
    model: str | Path | Model,
    data: Data | Examples,
    *,
    scheme: str | Scheme | None = None,
    eval_data: Data | Examples | None = None,
    settings: Settings | None = None,
    float_share: float = 0.5,
    method: str | None = None,
    samples: int = 128,
    context: int = 256,
    progress: Progress | None = None,
) -> Retasked:
    """Bring `model` to the task of `data` by both routes; which two they are, the model itself says.

    `scheme`: what a float model is quantized to; a quantized one keeps its own. `settings.steps`: of each route in all.
    Without `eval_data` a fifth of `data` is held out to measure on; a tenth of the rest chooses iterates.
    Raises: UsageError, UntrustedInput as the parts do.
    """
    settings = settings or Settings()
    if not 0 < float_share < 1:
        raise UsageError(
            f"float_share={float_share} is the part of the steps in float; use more than 0 and less than 1"
        )
    source, rows, new_head = for_training(model, data, context, settings.seed)
    if (source.state is None) == (scheme is None):
        raise UsageError(
            "a float model needs a scheme to go to"
            if scheme is None
            else f"the model is quantized already ({source.state and source.state.scheme}) and keeps its scheme"
        )
    if eval_data is None:
        rows, judged = split(rows, 0.2, settings.seed)
    else:
        judged = examples_for(source, eval_data, context=context)
    rows, held = split(rows, 0.1, settings.seed + 1)
    target = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    if target is None:
        assert source.state is not None
        target = source.state.scheme
    bits = target.weight.grid.bits if target.weight is not None else 0
    total = resolved(settings, bits, len(rows)).steps
    assert total is not None
    in_float = max(1, round(float_share * total))
    if total - in_float < 1:
        raise UsageError(f"steps={total} leaves none for QAT behind {in_float} in float; use more")
    common: dict[str, Any] = {"eval_data": held, "context": context, "progress": progress}
    ptq: dict[str, Any] = {"method": method, "samples": samples}

    def of(steps: int, **more: Any) -> Settings:
        return dataclasses.replace(settings, steps=steps, epochs=None, **more)

    task_only = {"kl_weight": 0.0, "task_weight": settings.task_weight or 1.0}
    began = time.monotonic()
    base, stages = source, []
    if source.state is not None:
        base = dataclasses.replace(source, model=copy.deepcopy(source.model))
        dequantize_model(base.model)
        stages.append(("dequantized", 0, measure(base.model, judged).value))
    tuned = train(base, rows, scheme="float", settings=of(in_float), **common)
    stages.append(("float", in_float, measure(tuned.model, judged).value))
    rounded = quantize(tuned, target, data=rows, seed=settings.seed, context=context, progress=progress, **ptq)
    stages.append(("PTQ", 0, measure(rounded.model, judged).value))
    trained = train(rounded, rows, teacher=tuned, settings=of(total - in_float), **common)
    result = measure(trained.model, judged)
    stages.append(("QAT", total - in_float, result.value))
    names = ("tune then QAT", "QAT at once") if source.state is None else ("restore", "tune quantized")
    first = Route(names[0], trained, result, tuple(stages), time.monotonic() - began)

    began = time.monotonic()
    whole = of(total, **task_only)
    if source.state is None:
        direct = train(source, rows, scheme=target, teacher=None, settings=whole, **common, **ptq)
    else:
        direct = train(source, rows, teacher=None, settings=whole, **common)
    result = measure(direct.model, judged)
    second = Route(names[1], direct, result, ((names[1], total, result.value),), time.monotonic() - began)
    notes = [*source.notes] + (["both routes start from the same new head"] if new_head else [])
    kind = "float" if source.state is None else "quantized"
    return Retasked(kind, first, second, difference(first.result, second.result), tuple(notes))
