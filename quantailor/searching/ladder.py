"""The ladder of `fit`: the cheapest way that meets the tolerance, each rung tried only if the one before fell short.

    float -> RTN -> Qronos -> Block-AP -> hybrid (best PTQ + short QAT) -> QAT (longer, from the best so far)

The short QAT learns from the float model alone. The longer one learns from the data's own loss as well, where its start
is near: what the float model has to teach is soon taken up there, and the figure that is judged is the data's own. Far
from the float model its whole distribution teaches more in as many steps (docs/LOG.md).

Every rung says why it was taken or left, how long it took and what it measured. What comes back is the best that was
found, even where nothing met the tolerance: then the verdict says so.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from quantailor import ptq
from quantailor.data.examples import Examples
from quantailor.errors import QuantailorError, UsageError
from quantailor.evaluate.result import Result, difference
from quantailor.evaluate.run import evaluate, reference_for
from quantailor.models.prepare import prepare, state_of
from quantailor.progress import Advance, Progress
from quantailor.ptq.defaults import rungs
from quantailor.ptq.driver import calibrate, methods_of
from quantailor.qat.best import Score
from quantailor.qat.settings import Settings
from quantailor.qat.train import TrainReport, train
from quantailor.recipe import Recipe

VERDICTS = ("ptq", "hybrid", "qat", "infeasible")
NEAR = 0.5  # loss of a start from which the data's own loss helps: it did from 0.03, 0.04 and 0.16, not from 1.0
_TASK_WEIGHT, _AVERAGE = 1.0, 0.25  # of the longer QAT, where nothing else is asked for


@dataclass(frozen=True)
class Goal:
    """What is good enough, and what it may cost. `tolerance`: of the float model's own value (0.02 = 2 %).

    `task_weight`: of the data's own loss in the longer QAT, beside the divergence from the float model; 0 keeps to the
    float model alone. None: that of the settings, or 1 where the start is within half of the float model's value. The
    longer QAT also averages its weights over a quarter of the run, unless the settings name another share.
    """

    tolerance: float = 0.02
    minutes: float = 30.0
    calibration: int = 128  # rows
    short_steps: int = 100
    long_steps: int = 400
    settings: Settings = field(default_factory=Settings)
    methods: tuple[str, ...] | None = None  # None: what ptq/defaults.py has for the scheme
    task_weight: float | None = None
    control: bool = False  # also fine-tune the float model for the steps that QAT took

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise UsageError(f"tolerance={self.tolerance} must be 0 or more and below 1; 2% is 0.02")
        if not 0 < self.minutes < math.inf:
            raise UsageError(f"minutes={self.minutes} is no time to work in; use more than 0, such as 30")
        if self.task_weight is not None and not 0 <= self.task_weight < math.inf:
            raise UsageError(f"task_weight={self.task_weight} must be 0 or more, such as 1")
        if self.task_weight is not None:
            dataclasses.replace(self.settings, task_weight=self.task_weight)  # refuses a run without any loss
        for method in self.methods or ():
            ptq.method(method)
        if self.methods is not None and not self.methods:
            raise UsageError("no PTQ method is named; use at least one, such as rtn")


@dataclass(frozen=True)
class Step:
    """One rung: what it measured, why it was taken, and how long it ran."""

    name: str
    value: float
    reason: str
    seconds: float
    result: Result
    loss: float  # relative: 0.02 = 2 % worse than float, negative = better
    change: tuple[float, float] | None = None  # 95 % interval of (value - float), paired
    training: TrainReport | None = None

    def to_json(self) -> dict[str, Any]:
        base = {"name": self.name, "value": self.value, "reason": self.reason, "seconds": round(self.seconds, 2)}
        extra: dict[str, Any] = {"loss": self.loss, "change_interval": self.change, "result": self.result.to_json()}
        if self.training is not None:
            extra["training"] = {
                "steps": self.training.steps,
                "best_step": self.training.best_step,
                "learning_rate": self.training.learning_rate,
                "scale_learning_rate": self.training.scale_learning_rate,
                "curve": [[step, *score] for step, score in self.training.curve],
                "notes": self.training.notes,
            }
        return {**base, **extra}


@dataclass
class Outcome:
    """`model`: the best that was found. `recovery`: share of the best PTQ's loss that training took back, against the
    float model, and (`recovery_control`) against the float model trained as long."""

    verdict: str
    model: nn.Module
    steps: list[Step]
    final: Step
    recovery: float | None = None
    recovery_control: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def float(self) -> Step:
        return self.steps[0]


def relative_loss(value: float, base: float, higher_is_better: bool) -> float:
    """How much worse `value` is than the float `base`, as a share of it; negative where it is better."""
    if not math.isfinite(value):
        return math.inf
    if base == 0:
        return 0.0 if value == base else math.inf
    return (base - value) / abs(base) if higher_is_better else (value - base) / abs(base)


class _Pace(Progress):
    """Notes when each step of a run ended."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.ticks: list[float] = []

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        yield lambda _steps: self.ticks.append(self.clock())


class Ladder:
    """`climb` does the work. The float model is never changed; candidates are copies of it."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        train_data: Examples,
        eval_data: Examples,
        goal: Goal,
        progress: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.recipe, self.train_data, self.eval_data, self.goal = model, recipe, train_data, eval_data, goal
        self.progress, self.clock = progress or Progress(), clock
        self.start = clock()
        self.steps: list[Step] = []
        self.notes: list[str] = []
        self.quick_rows = min(len(eval_data), 64 if eval_data.task == "lm" else 256)

    @property
    def seconds_left(self) -> float:
        return 60 * self.goal.minutes - (self.clock() - self.start)

    def climb(self) -> Outcome:
        """Raises: as `prepare`, `calibrate` and `train` do."""
        began = self.clock()
        with self._bar("float model") as bar:
            self.reference = reference_for(self.model, self.eval_data, progress=bar)
        result = self.reference.result if hasattr(self.reference, "result") else self.reference
        self._note("float", result, "what the tolerance is measured from", began)
        best_model, best = self._ptq()
        if self._meets(best):
            return self._outcome("ptq", best_model, best)
        ptq = best
        verdict = "infeasible"
        for name, steps in (("hybrid", self.goal.short_steps), ("qat", self.goal.long_steps)):
            affordable = self._affordable(steps, best_model)
            if affordable < 1:
                self.notes.append(
                    f"{name} left out: {self.seconds_left:.0f} s are left of {self.goal.minutes:g} minutes"
                )
                break
            if affordable < steps:
                self.notes.append(
                    f"{name} runs {affordable} steps instead of {steps}: what {self.goal.minutes:g} minutes leave"
                )
            # Another seed a rung: one that goes on from a trained model must not see the same batches first again.
            try:
                model, step = self._qat(name, best_model, best, affordable, self.goal.settings.seed + len(self.steps))
            except QuantailorError as error:  # it diverged: what was found before is as good as it was
                self.notes.append(f"{name} failed: {error}; {best.name} stands")
                continue
            if self._better(step, best):
                best_model, best = model, step
            if self._meets(best):
                verdict = name
                break
        outcome = self._outcome(verdict, best_model, best)
        self._recovery(outcome, ptq)
        return outcome

    def _ptq(self) -> tuple[nn.Module, Step]:
        best: tuple[nn.Module, Step] | None = None
        batches, drawn = self.train_data.calibration_batches(self.goal.calibration, seed=self.goal.settings.seed)
        self.notes += [f"calibration data: {note}" for note in drawn]
        for method in self.goal.methods or rungs(self.recipe.scheme):
            if best is not None and self.seconds_left <= 0:
                self.notes.append(f"{method} left out: {self.goal.minutes:g} minutes are over")
                break
            began = self.clock()
            candidate = copy.deepcopy(self.model)
            state = prepare(candidate, self.recipe)
            calibrate(candidate, batches, methods_of(state, method), self.progress)
            state.method = method
            reason = (
                "the cheapest: no solver, seconds"
                if best is None
                else f"{best[1].name} lost {best[1].loss:.2%}, over {self.goal.tolerance:.2%}"
            )
            step = self._measure(method, candidate, reason, began)
            if best is None or self._better(step, best[1]):
                best = candidate, step
            if self._meets(best[1]):
                break
        assert best is not None, "at least one PTQ method"
        return best

    def _qat(self, name: str, start: nn.Module, start_step: Step, num_steps: int, seed: int) -> tuple[nn.Module, Step]:
        began = self.clock()
        candidate = copy.deepcopy(start)
        settings = dataclasses.replace(self._settings(name, start_step), steps=num_steps, seed=seed)
        report = train(candidate, self.train_data, self._quick, settings, teacher=self.model, progress=self.progress)
        state = state_of(candidate)
        assert state is not None
        if report.improved:
            state.method = f"{state.method}+qat" if not state.method.endswith("+qat") else state.method
        state.notes += report.notes
        self.seconds_per_step = (self.clock() - began) / num_steps
        fell_short = f"{start_step.name} lost {start_step.loss:.2%}, over {self.goal.tolerance:.2%}"
        reason = f"{fell_short}: {num_steps} steps of QAT from there"
        if settings.task_weight:
            reason += f"; the data's own loss counts {settings.task_weight:g}"
        step = self._measure(name, candidate, reason, began, report)
        if not self._better(step, start_step):
            why = (
                "kept the start"
                if not report.improved
                else f"{step.value:.4f} is no better than {start_step.value:.4f} on all of the data"
            )
            self.notes.append(f"{name}: training {why}; {start_step.name} stands")
        else:
            before, after = (getattr(s.result, "kl", None) for s in (start_step, step))
            if settings.task_weight and before is not None and after is not None:
                self.notes.append(
                    f"{name} learned from the data as well as from the float model: its KL to that went from "
                    f"{before:.4f} to {after:.4f}; task_weight 0 keeps to the float model alone"
                )
        return candidate, step

    def _settings(self, name: str, start: Step) -> Settings:
        """Of one rung: what was asked for; the longer QAT learns from the data too, where its start is near."""
        settings, weight = self.goal.settings, self.goal.task_weight
        if name != "qat":
            return settings
        if weight is None:
            weight = settings.task_weight or (_TASK_WEIGHT if start.loss <= NEAR else 0.0)
        return dataclasses.replace(settings, task_weight=weight, average=settings.average or _AVERAGE)

    def _quick(self, model: nn.Module) -> Score:
        """The score training is steered by: on a part of the evaluation data, lower is better."""
        result = evaluate(model, self.eval_data, limit=self.quick_rows)
        if result.higher_is_better:
            return (-result.value, getattr(result, "mean_loss", 0.0))
        return (getattr(result, "nats_per_token", result.value),)

    def _affordable(self, steps: int, start: nn.Module) -> int:
        """Steps that the time left pays for, by the pace of the run before, or of a few trial steps."""
        if self.seconds_left > 0 and not hasattr(self, "seconds_per_step"):
            self.seconds_per_step = self._trial(steps, start)
        return min(steps, int(0.9 * self.seconds_left / self.seconds_per_step)) if self.seconds_left > 0 else 0

    def _trial(self, steps: int, start: nn.Module) -> float:
        """Seconds a step of a run of so many, its share of the measuring included; on a copy that is thrown away."""
        pace, looks = _Pace(self.clock), []

        def timed(model: nn.Module) -> Score:
            began = self.clock()
            score = self._quick(model)
            looks.append(self.clock() - began)
            return score

        settings = dataclasses.replace(self.goal.settings, steps=3, evaluations=1)
        train(copy.deepcopy(start), self.train_data, timed, settings, teacher=self.model, progress=pace)
        seconds = (pace.ticks[-1] - pace.ticks[0]) / max(1, len(pace.ticks) - 1)
        return max(1e-6, seconds + min(looks) * (self.goal.settings.evaluations + 1) / steps)

    def _measure(
        self, name: str, model: nn.Module, reason: str, began: float, training: TrainReport | None = None
    ) -> Step:
        with self._bar(f"measuring {name}") as bar:
            result = evaluate(model, self.eval_data, reference=self.reference, progress=bar)
        return self._note(name, result, reason, began, training)

    def _note(self, name: str, result: Result, reason: str, began: float, training: TrainReport | None = None) -> Step:
        base = self.steps[0] if self.steps else None
        loss = relative_loss(result.value, base.value, result.higher_is_better) if base else 0.0
        change = difference(base.result, result)[1] if base and math.isfinite(result.value) else None
        step = Step(name, result.value, reason, self.clock() - began, result, loss, change, training)
        self.steps.append(step)
        self.progress.say(
            f"{name:<8} {result.metric} {result.value:.4f}  {f'{loss:+.2%} ' if base else ''} "
            f"{step.seconds:.0f} s   {reason}"
        )
        return step

    def _bar(self, title: str) -> Any:
        return self.progress.counted(title)

    def _meets(self, step: Step) -> bool:
        return step.loss <= self.goal.tolerance

    def _better(self, step: Step, other: Step) -> bool:
        return step.loss < other.loss

    def _outcome(self, verdict: str, model: nn.Module, final: Step) -> Outcome:
        return Outcome(verdict, model, self.steps, final, notes=self.notes)

    def _recovery(self, outcome: Outcome, ptq: Step) -> None:
        """R = (ptq - final) / (ptq - float), and R* against the float model trained for the same steps."""
        base = self.steps[0]
        outcome.recovery = _share(ptq.value, outcome.final.value, base.value)
        num_steps = sum(s.training.steps for s in self.steps if s.training is not None)
        if not self.goal.control or num_steps == 0:
            return
        if self.seconds_left <= 0:
            self.notes.append(f"the float control was left out: {self.goal.minutes:g} minutes are over")
            return
        began = self.clock()
        twin = copy.deepcopy(self.model)
        # A float model has no distance to itself: it trains on the task alone, at its own rate.
        settings = dataclasses.replace(
            self.goal.settings,
            steps=num_steps,
            kl_weight=0.0,
            task_weight=1.0,
            average=self.goal.settings.average or _AVERAGE,
            learning_rate=None,
        )
        report = train(twin, self.train_data, self._quick, settings, progress=self.progress)
        step = self._measure(
            "float+", twin, f"control: the float model fine-tuned for the same {num_steps} steps", began, report
        )
        outcome.recovery_control = _share(ptq.value, outcome.final.value, step.value)


def _share(ptq: float, final: float, base: float) -> float | None:
    return (ptq - final) / (ptq - base) if math.isfinite(ptq) and ptq != base else None
