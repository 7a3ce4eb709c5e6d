"""One run as it is watched: what is measured and written down, what raises an alarm, and what ends it early.

The recorder looks, the tape keeps, alarms and stop rules judge what is on the tape: whatever is decided can be decided
again from the same file. Watch (watch.py) calls this at the right moments and does what it is told.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quantailor.errors import UntrustedInput
from quantailor.nn.packed import PackedWeight
from quantailor.qat import distributed
from quantailor.qat.alarms import GOES_BACK, newest, sentence
from quantailor.qat.recorder import Recorder
from quantailor.qat.recording import (
    Alarm,
    End,
    Head,
    Listener,
    Look,
    Measure,
    Recording,
    Tape,
    read,
    rounded,
    rounded_table,
)
from quantailor.qat.settings import Settings
from quantailor.qat.stopping import (
    Evaluated,
    Score,
    Spent,
    check_goal,
    over_budget,
    parse,
    parse_goal,
    reached,
    to_stop,
)

_MOST_RECORDS, _EVERY = 400, 10
_MOST_ACTIONS = 8  # then the run ends: half the rate eight times over has not helped


def every_of(settings: Settings) -> int:
    """Steps between measures: those asked for, or ten, or as many as make four hundred measures."""
    assert settings.steps is not None
    return settings.record_every or max(_EVERY, math.ceil(settings.steps / _MOST_RECORDS))


class Flight:
    """`look_every`: steps between evaluations, whose steps are measured as well. `path`: the file to write, in the
    process that writes; `listeners` hear of each line there; `say` gets each alarm. `floating`: the score of the float
    model, where the goal is about recovery."""

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        look_every: int,
        *,
        path: Path | None = None,
        listeners: Sequence[Listener] = (),
        say: Callable[[str], None] = lambda _line: None,
        floating: Score | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert settings.steps is not None and settings.warmup is not None
        self.settings, self.look_every, self.say, self.floating, self.clock = settings, look_every, say, floating, clock
        self.rules = [parse(text) for text in settings.stop]
        self.goal = None if settings.until is None else parse_goal(settings.until)
        self.every, self.warm = every_of(settings), round(settings.warmup * settings.steps)
        self.recorder: Recorder | None = None
        self.tape: Tape | None = None
        self.tokens, self.seconds, self.began = 0, 0.0, clock()
        self.notes: list[str] = []
        self._since: list[float] = []  # losses since the last measure
        self._looks: list[Evaluated] = []
        self._left = left_by(path)
        if settings.recording and distributed.rank() == 0:  # all processes have the same weights
            self.recorder = Recorder(model)
            head = Head(settings.steps, self.every, tuple(self.recorder.layers), tuple(self.recorder.norms))
            self.tape = Tape(head, path, listeners)
            if any(isinstance(module, PackedWeight) for module in model.modules()):
                self.notes.append("layers on a packed base are not measured: their float weight is never made whole")

    @property
    def recording(self) -> Recording | None:
        return None if self.tape is None else self.tape.recording

    def is_measured(self, step: int) -> bool:
        """The first step, each `every`th, and those before an evaluation."""
        assert self.settings.steps is not None
        return step in (1, self.settings.steps) or step % self.every == 0 or step % self.look_every == 0

    # ------------------------------------------------------------------------------------------------ a step

    def begin(self, step: int) -> None:
        """Before the forward pass of `step`."""
        if self.recorder is not None and self.is_measured(step):
            self.recorder.begin()

    def end(self, step: int, loss: float, gradient: Any, rate: float, tokens: int) -> Alarm | None:
        """After it: an alarm, with the action to take, the same in every process. `tokens`: of this step; `gradient`: a
        number or a tensor, which is waited for only where it is written down."""
        self.tokens += tokens
        self._since.append(loss)
        if not self.settings.recording or not self.is_measured(step):
            return None
        alarm: Alarm | None = None
        if self.recorder is not None and self.tape is not None:
            layers, norms = self.recorder.end()
            mean = rounded(sum(self._since) / len(self._since))
            told = None if gradient is None else rounded(float(gradient))
            tables = rounded_table(layers), rounded_table(norms)
            self.tape.add(Measure(step, mean, told, rounded(rate), self.tokens, *tables))
            recording = self.tape.recording
            alarm = newest(recording.head, recording.measures, recording.alarms)
        self._since = []
        alarm = distributed.from_rank(alarm)
        if alarm is None:
            return None
        alarm = dataclasses.replace(alarm, value=_or_none(alarm.value), limit=float(f"{alarm.limit:.5g}"))
        alarm = dataclasses.replace(alarm, action=distributed.from_rank(self._action(alarm)))
        if self.tape is not None:
            self.tape.add(alarm)
        self.say(sentence(alarm))
        return alarm

    def _action(self, alarm: Alarm) -> str:
        if self.settings.on_alarm != "act" or alarm.alarm == "gradient":  # Watch skips such steps itself
            return "stopped" if self.settings.on_alarm == "stop" else "told"
        recording = self.recording
        acted = sum(a.action != "told" for a in recording.alarms) if recording is not None else 0
        if acted >= _MOST_ACTIONS:
            return "stopped"
        return "went back" if alarm.alarm in GOES_BACK else "lowered"

    def over_budget(self, step: int) -> str:
        """Why the run ends behind this step; "" if it does not."""
        spent = Spent(step, self.tokens, self.seconds + self.clock() - self.began)
        told = over_budget(self.rules, spent)
        clocked = any(rule.name == "minutes" for rule in self.rules)
        return distributed.from_rank(told) if clocked else told

    # ------------------------------------------------------------------------------------------------ an evaluation

    def looked(self, step: int, score: Score, best: Score, start: Score, loss: float | None) -> str:
        """After an evaluation: why the run ends behind it; "" if it does not. `loss`: of training since the last."""
        if self.goal is not None:
            check_goal(self.goal, score)
        error = None
        if self.tape is not None and self.recorder is not None:
            shown = tuple(rounded(value) for value in score)
            levels = tuple(None if v is None else tuple(v) for v in self.recorder.levels())
            self.tape.add(Look(step, shown, None if loss is None else rounded(loss), levels))
            error = _mean_error(self.tape.recording.measures)
        self._looks.append(Evaluated(step, score, loss, distributed.from_rank(error)))
        if self.goal is not None and (told := reached(self.goal, best, start, self.floating)):
            return told
        return to_stop(self.rules, self._looks, self.warm)

    def close(self, step: int, why: str) -> None:
        """The run is over."""
        if self.recorder is not None:
            self.recorder.forget()
        if self.tape is not None:
            self.tape.add(End(step, why))

    # ------------------------------------------------------------------------------------------------ checkpoints

    def record(self) -> dict[str, Any]:
        """What a checkpoint's record keeps."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds + self.clock() - self.began,
            "since": [repr(loss) for loss in self._since],
            "errors": [[look.step, look.error] for look in self._looks],
            "mark": None if self.tape is None else self.tape.mark(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """What its file keeps."""
        return {} if self.recorder is None else self.recorder.tensors()

    def load(
        self,
        record: dict[str, Any],
        tensors: dict[str, Tensor],
        curve: Sequence[tuple[int, Score]],
        losses: Sequence[tuple[int, float]],
    ) -> None:
        """Go on from a checkpoint, and from the file as the dead run left it. `curve` with the start, and `losses`."""
        self.tokens, self.seconds = record["tokens"], record["seconds"]
        self._since = [float(loss) for loss in record["since"]]
        known, loss_at = dict(map(tuple, record["errors"])), dict(losses)
        self._looks = [Evaluated(step, score, loss_at.get(step), known.get(step)) for step, score in curve]
        if self.recorder is not None and self.tape is not None:
            if tensors:
                self.recorder.load(tensors)
            if record["mark"] is not None and not self.tape.go_on(self._left, record["mark"]):
                self.notes.append("what was recorded before the interruption is damaged or gone; the rest is recorded")


def left_by(path: Path | None) -> Recording | None:
    """What a run that was killed had recorded; None if it cannot be read."""
    if path is None or not path.is_file():
        return None
    try:
        return read(path, finished=False)
    except UntrustedInput:
        return None


def _or_none(value: float | None) -> float | None:
    return None if value is None else rounded(value)


def _mean_error(measures: Sequence[Measure]) -> float | None:
    known = [v for v in measures[-1].layers.get("error", []) if v is not None] if measures else []
    return statistics.fmean(known) if known else None
