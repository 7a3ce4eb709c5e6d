"""When a run ends before its last step: rules as data, `name=value` each, and pure functions that apply them.

    patience=3           three evaluations in a row without a new best
    error-stable=0.1%    the mean quantization error of three evaluations after the warm-up lies within this share
    overfit=2            in two evaluations in a row the training loss fell and the held-out score got worse
    minutes=30           of training, those before an interruption included
    tokens=1e6           seen
    steps=500            made; the schedule of the learning rate stays that of the whole run

A goal ends it as well: METRIC>=VALUE or METRIC<=VALUE, of the best iterate so far. `recovery` is the share of what
rounding had lost that training took back: (start - best) / (start - float), on the score that chooses the iterate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from quantailor.errors import UsageError

DEFAULTS = {"patience": 3.0, "error-stable": 0.001, "overfit": 2.0}  # of rules that may stand without a value
RULES = (*DEFAULTS, "minutes", "tokens", "steps")
_COUNTS = ("patience", "overfit", "tokens", "steps")
METRICS = ("recovery", "loss", "perplexity", "accuracy")
_STABLE_LOOKS = 3
Score = tuple[float, ...]


@dataclass(frozen=True)
class Rule:
    name: str
    value: float

    def __str__(self) -> str:
        value = f"{100 * self.value:g}%" if self.name == "error-stable" else f"{self.value:g}"
        return f"{self.name}={value}"


@dataclass(frozen=True)
class Goal:
    """`metric` is to be at least (`at_least`) or at most `value`."""

    metric: str
    at_least: bool
    value: float

    def __str__(self) -> str:
        return f"{self.metric}{'>=' if self.at_least else '<='}{self.value:g}"


@dataclass(frozen=True)
class Evaluated:
    """A look at held-out data. `score`: lower is better. `loss`: of training, mean since the look before; `error`: mean
    quantization error of the layers; None where not known."""

    step: int
    score: Score
    loss: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Spent:
    steps: int
    tokens: int
    seconds: float


def parse(text: str) -> Rule:
    """Raises: UsageError for an unknown rule or a value that it cannot have.

    >>> str(parse("patience")), str(parse("error-stable=0.1%")), str(parse("tokens=1e6"))
    ('patience=3', 'error-stable=0.1%', 'tokens=1e+06')
    """
    name, equals, given = text.partition("=")
    if name not in RULES:
        raise UsageError(f"stop rule {text!r} is not known; use {', '.join(f'{r}=...' for r in RULES)}")
    if not equals and name not in DEFAULTS:
        raise UsageError(f"stop rule {name!r} needs a value, such as {name}=100")
    value = _number(given, text) if equals else DEFAULTS[name]
    if name in _COUNTS and (value < 1 or value != int(value)):
        raise UsageError(f"stop rule {text!r}: {name} is a whole number of 1 or more")
    if value <= 0 or (name == "error-stable" and value >= 1):
        raise UsageError(
            f"stop rule {text!r}: {'a share between 0 and 100%' if value > 0 else 'more than 0'} is needed"
        )
    return Rule(name, value)


def parse_goal(text: str) -> Goal:
    """Raises: UsageError for another form or metric.

    >>> parse_goal("recovery>=0.5")
    Goal(metric='recovery', at_least=True, value=0.5)
    """
    match = re.fullmatch(r"\s*([a-z]+)\s*(>=|<=)\s*(\S+)\s*", text)
    if match is None or match[1] not in METRICS:
        raise UsageError(f"goal {text!r} is not METRIC>=VALUE or METRIC<=VALUE with one of {', '.join(METRICS)}")
    goal = Goal(match[1], match[2] == ">=", _number(match[3], text))
    if goal.at_least != (goal.metric in ("recovery", "accuracy")):
        better = "higher" if goal.metric in ("recovery", "accuracy") else "lower"
        raise UsageError(f"goal {text!r} is met by what gets worse: {better} is better of {goal.metric}")
    return goal


def _number(text: str, whole: str) -> float:
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{whole!r}: {text!r} is no number; write one such as 3, 0.5 or 0.1%")
    return value


# ------------------------------------------------------------------------------------------------ budgets


def over_budget(rules: Sequence[Rule], spent: Spent) -> str:
    """Why the run is to end after this step; "" if it is not."""
    used = {"steps": float(spent.steps), "tokens": float(spent.tokens), "minutes": spent.seconds / 60}
    for rule in rules:
        if rule.name in used and used[rule.name] >= rule.value:
            return f"{rule}: the budget is used up"
    return ""


# ------------------------------------------------------------------------------------------------ evaluations


def to_stop(rules: Sequence[Rule], looks: Sequence[Evaluated], warm: int = 0) -> str:
    """Why the run is to end after the last of `looks`, which begin with the start (step 0); "" if it is not.

    `warm`: the steps of the warm-up, in which nothing moves much and the error stands still for that reason.
    """
    for rule in rules:
        if rule.name == "patience" and (told := _patience(int(rule.value), looks)):
            return f"{rule}: {told}"
        if rule.name == "overfit" and (told := _overfit(int(rule.value), looks)):
            return f"{rule}: {told}"
        if rule.name == "error-stable" and (told := _stable(rule.value, [x for x in looks if x.step > warm])):
            return f"{rule}: {told}"
    return ""


def _patience(count: int, looks: Sequence[Evaluated]) -> str:
    scores = [_ordered(look.score) for look in looks]
    without = len(scores) - 1 - scores.index(min(scores)) if scores else 0
    return f"{count} evaluations without gain" if without >= count else ""


def _ordered(score: Score) -> Score:
    """What is not a number is worst."""
    return tuple(math.inf if math.isnan(value) else value for value in score)


def _overfit(count: int, looks: Sequence[Evaluated]) -> str:
    last = looks[-count - 1 :]
    if len(last) < count + 1:
        return ""
    for before, after in pairwise(last):
        falls = before.loss is not None and after.loss is not None and after.loss < before.loss
        if not falls or _ordered(after.score) <= _ordered(before.score):
            return ""
    return f"the training loss falls and the held-out score gets worse, {count} evaluations in a row"


def _stable(share: float, looks: Sequence[Evaluated]) -> str:
    errors = [look.error for look in looks[-_STABLE_LOOKS:]]
    known = [e for e in errors if e is not None]
    if len(known) < _STABLE_LOOKS or max(known) - min(known) > share * sum(known) / len(known):
        return ""
    return f"the quantization error stands still at {known[-1]:.4g} in {_STABLE_LOOKS} evaluations"


# ------------------------------------------------------------------------------------------------ the goal


def check_goal(goal: Goal, score: Score) -> None:
    """Raises: UsageError if such scores know nothing of the goal's metric."""
    classes = len(score) > 1
    if goal.metric == ("perplexity" if classes else "accuracy"):
        raise UsageError(
            f"goal {goal}: a {'classifier has no perplexity' if classes else 'language model has no accuracy'}; use "
            f"recovery, loss or {'accuracy' if classes else 'perplexity'}"
        )


def value_of(metric: str, best: Score, start: Score, floating: Score | None) -> float:
    """The metric of the best iterate. Scores: (nats a token,) or (-accuracy, mean loss)."""
    if metric == "recovery":
        assert floating is not None
        lost = start[0] - floating[0]
        return (start[0] - best[0]) / lost if lost > 0 else 1.0  # nothing was lost
    if metric == "accuracy":
        return -best[0]
    return math.exp(min(best[-1], 700.0)) if metric == "perplexity" else best[-1]


def reached(goal: Goal, best: Score, start: Score, floating: Score | None) -> str:
    """Why the run may end: the goal is met; "" if it is not."""
    value = value_of(goal.metric, best, start, floating)
    met = value >= goal.value if goal.at_least else value <= goal.value
    return f"{goal}: reached, {goal.metric} is {value:.4g}" if met else ""
