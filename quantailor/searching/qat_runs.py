"""The runs of a search over QAT recipes: PTQ to a scheme once, then training from there under a clock."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from quantailor.data.examples import Examples
from quantailor.evaluate.lm import Reference
from quantailor.evaluate.run import evaluate, reference_for
from quantailor.models.adapt import adapt
from quantailor.models.prepare import pack_model, prepare, state_of
from quantailor.nn.lora import LoRA
from quantailor.progress import Advance, Progress
from quantailor.ptq.defaults import one_pass
from quantailor.ptq.driver import calibrate, methods_of
from quantailor.qat.best import Best, Score
from quantailor.qat.settings import Settings
from quantailor.qat.train import train
from quantailor.recipe import Recipe, Rule
from quantailor.searching.ladder import relative_loss
from quantailor.searching.latency import Latency, size_bytes
from quantailor.searching.space import Point
from quantailor.spec import Scheme

OnLook = Callable[[float, float], None]  # (share of the run, loss of the best iterate so far); may raise to stop it
_STARTS = 4  # calibrated models that are kept


@dataclass(frozen=True)
class Start:
    """A model after PTQ. `loss` relative to float on the rows that choose; `latency_ms` None where nobody asked."""

    model: nn.Module
    loss: float
    size_bytes: int
    latency_ms: float | None


@dataclass(frozen=True)
class Trained:
    """`model` at its best iterate; `loss` relative to float. `steps_done` fewer than asked: time was up."""

    model: nn.Module
    loss: float
    steps_done: int
    seconds: float


class TimeUp(Exception):
    """The clock ran out within a run."""


class Runs:
    """Float model, data and clock of one process. The float model is never changed."""

    def __init__(
        self,
        model: nn.Module,
        train_data: Examples,
        choosing: Examples,
        rules: Sequence[Rule],
        settings: Settings,
        *,
        samples: int = 128,
        latency: Latency | None = None,
        progress: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.train_data, self.choosing, self.rules = model, train_data, choosing, tuple(rules)
        self.settings, self.latency, self.clock = settings, latency, clock
        self.progress = progress or Progress()
        reference = reference_for(model, choosing)
        self.float_result = reference.result if isinstance(reference, Reference) else reference
        self.batches, self.notes = self._drawn(samples)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self._starts: OrderedDict[str, Start] = OrderedDict()

    def start(self, scheme: Scheme) -> Start:
        """PTQ by the default of one pass; a few are remembered."""
        key = str(scheme)
        if key not in self._starts:
            candidate = copy.deepcopy(self.model)
            recipe = Recipe(scheme, self.rules, one_pass(scheme))
            state = prepare(candidate, recipe)
            calibrate(candidate, self.batches, methods_of(state, recipe.method), self.progress)
            state.method = recipe.method
            packed = pack_model(copy.deepcopy(candidate)).eval()
            latency = None if self.latency is None else self.latency(packed)
            self._starts[key] = Start(candidate, self._loss(self._score(candidate)), size_bytes(packed), latency)
            while len(self._starts) > _STARTS:
                self._starts.popitem(last=False)
        self._starts.move_to_end(key)
        return self._starts[key]

    def train(
        self, point: Point, *, until: float, on_look: OnLook | None = None, steps: int | None = None, looks: int = 4
    ) -> Trained:
        """QAT from PTQ, to the best iterate before the clock says `until`. The remembered start stays as it is.

        Raises: QuantailorError if training diverges; what `on_look` raises.
        """
        began = self.clock()
        candidate = copy.deepcopy(self.start(point.scheme).model)
        if point.lora:
            adapt(candidate, LoRA(r=point.lora, scales=point.scales == "learned"), seed=self.settings.seed)
        settings = point.settings(self.settings, self.num_parameters, steps)
        settings = dataclasses.replace(settings, evaluations=looks)
        assert settings.steps is not None
        watched = _Watched(self, candidate, settings.steps, until, on_look)
        try:
            train(candidate, self.train_data, watched.score, settings, teacher=self._teacher(), progress=watched)
        except TimeUp:
            watched.best.restore()
            candidate.eval()
        state = state_of(candidate)
        assert state is not None and watched.best.score is not None
        if watched.best.step > 0 and not state.method.endswith("+qat"):
            state.method += "+lora" if point.lora else "+qat"
        if point.lora:
            candidate = pack_model(candidate).eval()  # adapters merged: the very integers that were trained
        return Trained(candidate, self._loss(watched.best.score), watched.done, self.clock() - began)

    def latency_of(self, model: nn.Module) -> float | None:
        """Measured or predicted anew, of the packed form of a trained model."""
        return None if self.latency is None else self.latency(pack_model(copy.deepcopy(model)).eval())

    def _teacher(self) -> nn.Module | None:
        return self.model if self.settings.kl_weight else None

    def _score(self, model: nn.Module) -> Score:
        result = evaluate(model, self.choosing)
        if result.higher_is_better:
            return (-result.value, getattr(result, "mean_loss", 0.0))
        return (getattr(result, "nats_per_token", result.value),)

    def _loss(self, score: Score) -> float:
        """Relative to float, of a score: perplexity is the exponential of it, accuracy its negative."""
        higher = self.float_result.higher_is_better
        value = -score[0] if higher else math.exp(min(score[0], 700.0))
        return relative_loss(value, self.float_result.value, higher)

    def _drawn(self, samples: int) -> tuple[list[dict[str, Tensor]], list[str]]:
        batches, notes = self.train_data.calibration_batches(samples, seed=self.settings.seed)
        return batches, [f"calibration data: {note}" for note in notes]


class _Watched(Progress):
    """One run: looks at it, counts its steps, and stops it when time is up."""

    def __init__(self, runs: Runs, model: nn.Module, steps: int, until: float, on_look: OnLook | None) -> None:
        self.runs, self.model, self.steps, self.until, self.on_look = runs, model, steps, until, on_look
        self.best = Best(model)
        self.done = 0

    def score(self, model: nn.Module) -> Score:
        """What `train` looks with. Its own best is kept here as well, for a run that time cuts short."""
        score = self.runs._score(model)
        self.best.offer(self.done, score)
        assert self.best.score is not None
        if self.done and self.on_look is not None:
            self.on_look(self.done / self.steps, self.runs._loss(self.best.score))
        return score

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        with self.runs.progress.task(title, total) as advance:

            def counted(steps: int) -> None:
                advance(steps)
                self.done += steps
                if self.runs.clock() > self.until and self.done < self.steps:
                    raise TimeUp

            yield counted
