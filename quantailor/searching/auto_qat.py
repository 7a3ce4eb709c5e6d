"""Auto-QAT: which recipe reaches an accuracy within a latency, found and trained within a given time.

Every trial is PTQ to its scheme, whose cost is known before a step is made, then a short QAT that is looked at four
times and stopped where recipes of no more cost do better (front.stops). What is over the latency is not trained at all.
The time is split: at least `SHARE_OF_WINNER` of it is left to train the winner, longer than its trial was.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from quantailor.errors import QuantailorError, UsageError
from quantailor.progress import Progress
from quantailor.searching.front import Limits, Look, best, pareto, stops
from quantailor.searching.qat_runs import Runs, Start, Trained
from quantailor.searching.shared_study import SharedStudy, Tried
from quantailor.searching.space import Point

SHARE_OF_WINNER = 0.3
_LONGER = 4  # the winner trains for at most so many times the steps of its trial


@dataclass(frozen=True)
class Clock:
    """The time of one process: it began at `began` and has `seconds`; `finish` of them are for what follows training,
    the last measuring and saving."""

    began: float
    seconds: float
    finish: float = 0.0

    @property
    def end(self) -> float:
        """When training has to be over."""
        return self.began + self.seconds - self.finish


@dataclass
class Found:
    """What a search came to. `front`: trial numbers. `seconds`, `processor_seconds`: of this process; `trial_seconds`:
    of every worker's trials. `stopped`: why the search ended."""

    tried: list[Tried]
    front: list[int]
    winner: Tried | None
    stopped: str
    seconds: float
    processor_seconds: float
    trial_seconds: float
    counts: dict[str, int]
    notes: list[str] = field(default_factory=list)


class _Stopped(Exception):
    """A trial was stopped at a look."""


class Search:
    """`search` tries recipes, `train_winner` trains the one that was chosen."""

    def __init__(
        self,
        runs: Runs,
        study: SharedStudy,
        limits: Limits,
        clock: Clock,
        *,
        trials: int | None = None,
        trains_winner: bool = True,
        progress: Progress | None = None,
    ) -> None:
        if trials is not None and trials < 1:
            raise UsageError(f"trials={trials} tries nothing; use 1 or more, or leave it out")
        self.runs, self.study, self.limits, self.clock = runs, study, limits, clock
        self.trials, self.trains_winner = trials, trains_winner
        self.progress = progress or Progress()
        self.began, self.processor = time.monotonic(), time.process_time()
        self.notes: list[str] = []
        self.kept: tuple[int, Trained] | None = None  # the best trial of this process, with its weights
        self._kept_cost = 0.0

    def search(self) -> Found:
        """Try recipes until time, trials or the space are over.

        Raises: as calibration does, where a scheme does not suit the model.
        """
        stopped = self._loop()
        self.notes += [f"trial {n} was lost with its worker, and put in the queue again" for n in self.study.again]
        tried = [t for t in self.study.tried if t.same_as is None]
        pairs = [(t.loss, t.cost) for t in tried]
        return Found(
            tried=tried,
            front=[tried[i].number for i in pareto(pairs)],
            winner=tried[best(pairs, self.limits)] if tried else None,
            stopped=stopped,
            seconds=time.monotonic() - self.began,
            processor_seconds=time.process_time() - self.processor,
            trial_seconds=sum(t.facts.get("seconds", 0.0) for t in tried),
            counts=self.study.counts,
            notes=self.notes,
        )

    def train_winner(self, winner: Tried) -> tuple[nn.Module, Trained]:
        """The winner's model, trained for as long as time allows; never a worse one than its trial's, if that was run
        here. Raises: as `train` does."""
        point = winner.point
        pace = winner.facts.get("seconds_per_step", 0.0)
        left = self.clock.end - self.runs.clock()
        affordable = int(0.9 * left / pace) if pace else point.steps
        steps = max(1, min(affordable, _LONGER * point.steps))
        kept = self.kept[1] if self.kept is not None and self.kept[0] == winner.number else None
        if left <= 0 and kept is None:
            self.notes.append("no time is left to train the winner: it is as PTQ left it")
            start = self.runs.start(point.scheme)
            return start.model, Trained(start.model, start.loss, 0, 0.0)
        if kept is not None and steps < point.steps:
            self.notes.append(
                f"no time is left to train the winner longer: its trial of {kept.steps_done} steps stands"
            )
            return kept.model, kept
        if not winner.facts.get("steps_done"):  # over the latency, or out of time: PTQ is all there is
            steps = min(steps, point.steps)
        self.progress.say(f"training the winner for {steps} steps: {point}")
        trained = self.runs.train(point, until=self.clock.end, steps=steps, looks=8)
        if trained.steps_done < steps:
            self.notes.append(f"time was up after {trained.steps_done} of {steps} steps of the winner's training")
        if kept is not None and kept.loss <= trained.loss:
            self.notes.append(f"{steps} steps of training the winner came to no less loss than its trial, which stands")
            return kept.model, kept
        return trained.model, trained

    # ------------------------------------------------------------------------------------------------ parts

    def _loop(self) -> str:
        done = 0
        while True:
            if self.trials is not None and done >= self.trials:
                return f"{done} trials are done"
            if self._search_end() <= self.runs.clock() and done:
                return "the time for searching is over"
            asked = self.study.ask()
            if asked is None:
                return "every point of the space has been tried"
            number, point = asked
            try:
                if not self._trial(number, point):
                    self.study.fail(number, "time was up")
                    return "the time for searching is over"
            except QuantailorError as error:
                self.study.fail(number, str(error), for_good=True)
                if isinstance(error, UsageError):
                    raise
                self.notes.append(f"trial {number} failed: {error}")
            done += 1

    def _search_end(self) -> float:
        """When no further trial may run: the winner needs the rest."""
        if not self.trains_winner:
            return self.clock.end
        return self.clock.end - SHARE_OF_WINNER * self.clock.seconds

    def _trial(self, number: int, point: Point) -> bool:
        """Run one; False if there was no time for it."""
        began, processor = self.runs.clock(), time.process_time()
        start = self.runs.start(point.scheme)
        cost = self._cost(start)
        facts: dict[str, Any] = {
            "scheme": str(point.scheme),
            "ptq_loss": start.loss,
            "size_bytes": start.size_bytes,
            "latency_ms": start.latency_ms,
            "pid": os.getpid(),
        }
        trained, looked, ready = None, [0.0, start.loss], self.runs.clock()
        if self.limits.cost is not None and cost > self.limits.cost:
            facts["reason"] = "not trained: over the limit before a step was made"
        else:
            pace = self._pace(point)
            if pace is not None and began + 0.5 * pace * point.steps > self._search_end() and self.study.tried:
                return False

            def on_look(share: float, loss: float) -> None:
                looked[:] = [share, loss]
                look = Look(round(4 * share) / 4, loss, cost, point.steps)
                self.study.look(number, look)
                if share < 1 and stops(look, self.study.looks(without=number)):
                    raise _Stopped

            try:
                trained = self.runs.train(point, until=self._search_end(), on_look=on_look)
            except _Stopped:
                facts["reason"] = f"stopped at {looked[0]:.0%}: others that cost no more were better there"
        steps = trained.steps_done if trained is not None else round(looked[0] * point.steps)
        if trained is not None and steps < point.steps:
            facts["reason"] = f"cut short after {steps} steps: the time for searching was over"
        loss = trained.loss if trained is not None else looked[1]
        now = self.runs.clock()
        seconds = now - began
        facts |= {"steps_done": steps, "seconds": seconds, "processor_seconds": time.process_time() - processor}
        if steps:
            facts["seconds_per_step"] = (now - ready) / steps
        self.study.finish(number, loss, cost, **facts)
        self._keep(number, trained, cost)
        self.progress.say(f"trial {number:<3} loss {loss:+.2%}  cost {cost:.4g}  {seconds:.0f} s  {point}")
        return True

    def _keep(self, number: int, trained: Trained | None, cost: float) -> None:
        """Hold on to the weights of this process's best trial."""
        if trained is None:
            return
        pairs = [(trained.loss, cost)]
        if self.kept is not None:
            pairs.append((self.kept[1].loss, self._kept_cost))
        if best(pairs, self.limits) == 0:
            self.kept, self._kept_cost = (number, trained), cost

    def _cost(self, start: Start) -> float:
        """Milliseconds where a latency is asked for, else bytes."""
        return start.latency_ms if start.latency_ms is not None else float(start.size_bytes)

    def _pace(self, point: Point) -> float | None:
        """Seconds a step of this process's trials so far, those of the same scheme first."""
        mine = [t for t in self.study.tried if t.facts.get("pid") == os.getpid() and "seconds_per_step" in t.facts]
        same = [t.facts["seconds_per_step"] for t in mine if t.facts["scheme"] == str(point.scheme)]
        paces = same or [t.facts["seconds_per_step"] for t in mine]
        return sum(paces) / len(paces) if paces else None
