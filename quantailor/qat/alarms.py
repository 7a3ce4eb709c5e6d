"""From what was measured to what is wrong: pure functions of a recording, so that a run that goes on decides the same.

Causes come first, and one alarm at a time: whoever breaks a norm also moves ranges, losses and errors behind it. A
symptom is told only where no cause is known, and after an alarm the next one waits for ten measures.

    gradient   a gradient that is not finite
    rate       the learning rate is too high: the layers' quantization error is half as high again as at first (their
               median), or a step changes a tenth of the weights (||dw|| / ||w||, median)
    scale      a layer's scales are four times what they were, or a quarter (geometric mean), or its input's scale is
    norm       a norm is dead: its gain or its output has fallen under a twentieth
    range      what enters a layer is beyond 100, and four times what it was in the first step
    clip       a layer clips 30 % more of its weights than at first
    error      a layer's quantization error is twice what it was at first
    loss       the training loss is half as high again as at first, and half a nat more

The last three in three measures in a row. Why these limits: docs/TRAINING.md, with the figures of healthy runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from quantailor.qat.recording import Alarm, Head, Measure

CAUSES = ("gradient", "rate", "scale", "norm", "range")
SYMPTOMS = ("clip", "error", "loss")
GOES_BACK = ("rate", "scale", "norm", "range")  # acted on by the best iterate at half the rate; others by the rate
ERROR_MEDIAN, UPDATE = 1.5, 0.1
DRIFT = math.log(4)
DEAD = 0.05
RANGE, RANGE_RATIO = 100.0, 4.0
CLIP, ERROR, LOSS, LOSS_NATS = 0.3, 2.0, 1.5, 0.5
IN_A_ROW = 3
QUIET, QUIET_ACTED = 10, 3  # measures after an alarm in which there is no other


class Found(NamedTuple):
    where: str
    value: float | None
    limit: float


def newest(head: Head, measures: Sequence[Measure], told: Sequence[Alarm]) -> Alarm | None:
    """The alarm of the last of `measures`, given those before it; None if all is well, or told already and lasting."""
    step = measures[-1].step
    if told:
        acted = told[-1].action in ("lowered", "went back")
        since = sum(m.step > told[-1].step for m in measures)
        if since <= (QUIET_ACTED if acted else QUIET):
            return None
    for kind in (*CAUSES, *SYMPTOMS):
        found = holding(kind, head, measures)
        if not found:
            continue
        before = [alarm for alarm in told if alarm.alarm == kind]
        # After going back a cause that lasts is a new one; of a lower rate it cannot be asked to undo what is done.
        lasting = before and before[-1].action != "went back" and holding(kind, head, measures[:-1])
        if not lasting:
            return Alarm(step, kind, found[0].where, len(found) - 1, found[0].value, found[0].limit)
        if kind in CAUSES:  # known, and it explains what comes after it in the list
            return None
    return None


def holding(kind: str, head: Head, measures: Sequence[Measure]) -> list[Found]:
    """Where a kind of alarm holds at the last of `measures`, the worst first."""
    if not measures:
        return []
    if kind in SYMPTOMS:
        if len(measures) <= IN_A_ROW:
            return []
        each = [_RULES[kind](head, measures[0], m) for m in measures[-IN_A_ROW:]]
        everywhere = set.intersection(*({f.where for f in found} for found in each))
        return _worst([f for f in each[-1] if f.where in everywhere])
    return _worst(_RULES[kind](head, measures[0], measures[-1]))


def _worst(found: list[Found]) -> list[Found]:
    def excess(f: Found) -> float:
        if f.value is None or f.limit == 0:
            return math.inf
        return f.value / f.limit if f.value >= f.limit else f.limit / max(f.value, 1e-30)

    return sorted(found, key=excess, reverse=True)


# ------------------------------------------------------------------------------------------------ the rules


def _gradient(head: Head, first: Measure, now: Measure) -> list[Found]:
    return [Found("", None, 0.0)] if now.gradient is None or now.loss is None else []


def _rate(head: Head, first: Measure, now: Measure) -> list[Found]:
    error, before, update = (_median(m, name) for m, name in ((now, "error"), (first, "error"), (now, "update")))
    if error is not None and before and error >= ERROR_MEDIAN * before:
        return [Found("", error, ERROR_MEDIAN * before)]
    return [Found("", update, UPDATE)] if update is not None and update >= UPDATE else []


def _scale(head: Head, first: Measure, now: Measure) -> list[Found]:
    found = []
    for measure in ("drift", "input_drift"):
        for name, drift, _ in _layers(head, first, now, measure):
            if abs(drift) >= DRIFT:
                found.append(
                    Found(name, math.exp(max(-700.0, min(drift, 700.0))), math.exp(math.copysign(DRIFT, drift)))
                )
    return found


def _norm(head: Head, first: Measure, now: Measure) -> list[Found]:
    found: dict[str, Found] = {}
    for measure in ("gain", "output"):
        before = first.norms.get(measure)
        for i, (name, value) in enumerate(zip(head.norms, now.norms.get(measure, []))):
            was = before[i] if before else None
            if value is not None and was is not None and (value <= DEAD * was or value == 0):
                found.setdefault(name, Found(name, value, DEAD * was))
    return list(found.values())


def _range(head: Head, first: Measure, now: Measure) -> list[Found]:
    rows = _layers(head, first, now, "range")
    return [Found(n, v, max(RANGE, RANGE_RATIO * was)) for n, v, was in rows if v > max(RANGE, RANGE_RATIO * was)]


def _clip(head: Head, first: Measure, now: Measure) -> list[Found]:
    rows = _layers(head, first, now, "clip")
    return [Found(name, value, was + CLIP) for name, value, was in rows if value >= was + CLIP]


def _error(head: Head, first: Measure, now: Measure) -> list[Found]:
    rows = _layers(head, first, now, "error")
    return [Found(name, value, ERROR * was) for name, value, was in rows if was and value >= ERROR * was]


def _loss(head: Head, first: Measure, now: Measure) -> list[Found]:
    if first.loss is None or now.loss is None:
        return []
    limit = max(LOSS * first.loss, first.loss + LOSS_NATS)
    return [Found("", now.loss, limit)] if now.loss >= limit else []


_RULES: dict[str, Callable[[Head, Measure, Measure], list[Found]]] = {
    "gradient": _gradient,
    "rate": _rate,
    "scale": _scale,
    "norm": _norm,
    "range": _range,
    "clip": _clip,
    "error": _error,
    "loss": _loss,
}


def _layers(head: Head, first: Measure, now: Measure, measure: str) -> Iterator[tuple[str, float, float]]:
    """(layer, now, at first) where both are known."""
    before = first.layers.get(measure)
    for i, (name, value) in enumerate(zip(head.layers, now.layers.get(measure, []))):
        was = before[i] if before else None
        if value is not None and was is not None:
            yield name, value, was


def _median(measure: Measure, name: str) -> float | None:
    known = [v for v in measure.layers.get(name, []) if v is not None]
    return statistics.median(known) if known else None


# ------------------------------------------------------------------------------------------------ in words

_SAYS = {
    "gradient": "the gradient is not finite",
    "rate": "the learning rate is too high for this model: {value}, over {limit}",
    "scale": "the scales of {where} are {value} times what they were",
    "norm": "{where} is dead: {value} is left, under {limit}",
    "range": "what enters {where} reaches {value}, over {limit}",
    "clip": "{where} clips {value} of its weights, over {limit}",
    "error": "the quantization error of {where} is {value}, over {limit}",
    "loss": "the training loss is {value}, over {limit}",
}
ADVICE = {
    "gradient": "lower the learning rate",
    "rate": "lower the learning rate",
    "scale": "lower the learning rate of the scales, or calibrate again",
    "norm": "look at this norm's weight, and at the rate it learns at",
    "range": "look at the norm before this layer",
    "clip": "lower the learning rate, or calibrate again with a wider range",
    "error": "lower the learning rate",
    "loss": "lower the learning rate",
}
_DID = {
    "told": "",
    "lowered": "; the learning rate was halved",
    "went back": "; training went back to its best iterate at half the learning rate",
    "stopped": "; training was stopped",
}


def sentence(alarm: Alarm) -> str:
    """One line for people: what, where, how much, and what was done or is to be done."""
    value = "?" if alarm.value is None else f"{alarm.value:.3g}"
    told = _SAYS[alarm.alarm].format(where=alarm.where, value=value, limit=f"{alarm.limit:.3g}")
    others = f" (and {alarm.others} more)" if alarm.others else ""
    did = _DID[alarm.action] or f"; {ADVICE[alarm.alarm]}"
    return f"step {alarm.step}: {told}{others}{did}"
