"""One study that any number of workers share: a folder with optuna's journal, which is lines of JSON.

    question.json   what is searched, of which model and data, by which versions: another question is refused
    journal.log     every trial as it goes
    beats/          who is at work (beats.py)

A worker that is killed loses the trial it was at. The next one to ask finds it, marks it as failed, and puts its point
in the queue again. Source of the sampler: Ozaki et al. 2020, multi-objective TPE (GECCO '20), as optuna has it.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantailor.errors import UntrustedInput, UsageError
from quantailor.searching.beats import Beats
from quantailor.searching.front import Limits, Look
from quantailor.searching.space import Point, Range, Space, point_of
from quantailor.store.jsonio import read_json, write_json
from quantailor.store.lock import Busy, locked
from quantailor.store.paths import shown

_NAME, _QUESTION, _JOURNAL = "quantailor", "question.json", "journal.log"
_WORST = 1e9  # the loss of a model that diverged: a journal holds no infinity
_DUPLICATES = 3  # proposals of the sampler that are known already, before a point is drawn at random


@dataclass(frozen=True)
class Tried:
    """A finished trial. `loss` relative to float; `facts` are plain values that came with it; `same_as`: not run, since
    that trial has the same point."""

    number: int
    point: Point
    loss: float
    cost: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def same_as(self) -> int | None:
        return self.facts.get("same_as")


class SharedStudy:
    """Ask for a point, tell what came of it. Use as a context: inside it this process is one of the workers."""

    def __init__(
        self,
        folder: Path,
        question: dict[str, Any],
        space: Space,
        limits: Limits,
        *,
        seed: int = 0,
        lease: float = 60.0,
    ) -> None:
        self.folder, self.space, self.limits = folder, space, limits
        self.again: list[int] = []  # trials of dead workers that this one has put in the queue again
        optuna = _optuna()
        with _alone(folder):
            fresh = self._check_question({**question, "space": space.to_json()})
            _mend(folder / _JOURNAL)
            self._journal = optuna.storages.JournalStorage(
                optuna.storages.journal.JournalFileBackend(str(folder / _JOURNAL))
            )
            sampler = optuna.samplers.TPESampler(
                multivariate=True, n_startup_trials=8, seed=seed if fresh else random.SystemRandom().randrange(2**31)
            )
            self._study = optuna.create_study(
                storage=self._journal,
                study_name=_NAME,
                directions=["minimize", "minimize"],
                load_if_exists=True,
                sampler=sampler,
            )
            if fresh:
                for point in space.first_points():
                    self._study.enqueue_trial(point.to_json())
        self._states = optuna.trial.TrialState
        self._random = random.Random(seed)
        self._asked: dict[int, Any] = {}  # the trials of this worker
        self.beats = Beats(folder / "beats", lease)

    def __enter__(self) -> SharedStudy:
        self.beats.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.beats.__exit__(*error)

    def ask(self) -> tuple[int, Point] | None:
        """The number and the point of a trial to run; None where every point of the space has been tried."""
        self.queue_lost()
        for _ in range(_DUPLICATES):
            trial = self._study.ask()
            if self._taken(trial):
                return trial.number, self._suggested(trial)
        left = self._untried()
        if not left:
            return None
        self._study.enqueue_trial(self._random.choice(left).to_json())
        trial = self._study.ask()
        return (trial.number, self._suggested(trial)) if self._taken(trial) else self.ask()

    def look(self, number: int, look: Look) -> None:
        """Tell how far a trial has come."""
        key = f"look {look.share:.4f}"
        self._asked[number].set_user_attr(key, [look.share, min(look.loss, _WORST), look.cost, look.steps])

    def looks(self, without: int) -> list[Look]:
        """Every look of every other trial, running ones included."""
        return [
            Look(*value)
            for trial in self._all()
            if trial.number != without
            for name, value in trial.user_attrs.items()
            if name.startswith("look ")
        ]

    def finish(self, number: int, loss: float, cost: float, **facts: Any) -> None:
        """Tell what a trial came to. `facts`: plain values."""
        trial = self._asked[number]
        for name, value in facts.items():
            trial.set_user_attr(name, value)
        loss = min(loss, _WORST)
        trial.set_constraint("loss", loss - self.limits.loss)
        if self.limits.cost is not None:
            trial.set_constraint("cost", cost / self.limits.cost - 1)
        self._study.tell(number, [loss, cost], skip_if_finished=True)  # finished: this worker was taken for dead

    def fail(self, number: int, reason: str, *, for_good: bool = False) -> None:
        """Tell that a trial came to nothing; `for_good`: so would every other one at its point."""
        self._asked[number].set_user_attr("reason", reason)
        self._asked[number].set_user_attr("for_good", for_good)
        self._study.tell(number, state=self._states.FAIL, skip_if_finished=True)

    def queue_lost(self) -> None:
        """Put the points of workers that have died in the queue again; each once, whoever sees it first."""
        for trial in self._all():
            if trial.state != self._states.RUNNING or self.beats.is_alive(str(trial.user_attrs.get("worker", ""))):
                continue
            if "worker" not in trial.user_attrs and _age(trial) < self.beats.lease:
                continue  # asked for a moment ago, and not yet signed
            try:
                self._journal.set_trial_state_values(trial._trial_id, self._states.FAIL)
            except Exception as error:
                if type(error).__name__ != "UpdateFinishedTrialError":
                    raise
                continue  # another worker was faster
            self.again.append(trial.number)
            if "fixed_params" in trial.system_attrs or trial.params:
                params = trial.params or trial.system_attrs["fixed_params"]
                self._study.enqueue_trial(params, user_attrs={"again": trial.number})

    @property
    def tried(self) -> list[Tried]:
        """Trials that came to something, by number. Raises: UntrustedInput for a strange journal."""
        found = []
        for trial in self._all():
            if trial.state == self._states.COMPLETE:
                loss, cost = trial.values
                found.append(Tried(trial.number, self._point(trial), loss, cost, dict(trial.user_attrs)))
        return found

    @property
    def counts(self) -> dict[str, int]:
        """Trials by state: complete, fail, running, waiting."""
        found: dict[str, int] = {}
        for trial in self._all():
            found[trial.state.name.lower()] = found.get(trial.state.name.lower(), 0) + 1
        return found

    # ------------------------------------------------------------------------------------------------ parts

    def _all(self) -> Sequence[Any]:
        trials: Sequence[Any] = self._study.get_trials(deepcopy=False)
        return trials

    def _taken(self, trial: Any) -> bool:
        """Sign a trial; False if its point is known or being tried, which is told at once."""
        trial.set_user_attr("worker", self.beats.name)
        self._asked[trial.number] = trial
        point = self._suggested(trial)
        for other in self._all():
            if other.number >= trial.number or not self._is_known(other) or self._point(other) != point:
                continue
            if other.state == self._states.COMPLETE:
                self.finish(trial.number, *other.values, same_as=other.number)
            else:
                self.fail(trial.number, f"the same point as trial {other.number}")
            return False
        return True

    def _is_known(self, trial: Any) -> bool:
        """Whether its point need not be tried: it is running, has come to something, or never will."""
        state, whole = trial.state, len(trial.params) == len(self.space.items())
        known = state in (self._states.COMPLETE, self._states.RUNNING) or trial.user_attrs.get("for_good", False)
        return bool(whole and known)

    def _suggested(self, trial: Any) -> Point:
        for name, values in self.space.items():
            if isinstance(values, Range):
                trial.suggest_float(name, values.low, values.high, log=True)
            else:
                trial.suggest_categorical(name, list(values))
        return self._point(trial)

    def _point(self, trial: Any) -> Point:
        try:
            point = point_of(trial.params)
        except (KeyError, TypeError, ValueError) as error:
            strange = f"{self.folder}: trial {trial.number} is of no such search; use another --study"
            raise UntrustedInput(strange) from error
        if point not in self.space:
            raise UntrustedInput(f"{self.folder}: trial {trial.number} lies outside the space; use another --study")
        return point

    def _untried(self) -> list[Point]:
        if self.space.size is None:
            return self.space.first_points()
        known = {self._point(trial) for trial in self._all() if self._is_known(trial)}
        return [point for point in self.space.points() if point not in known]

    def _check_question(self, question: dict[str, Any]) -> bool:
        """Whether the folder is new. Raises: UsageError where it holds another study, or something else."""
        place = self.folder / _QUESTION
        if not place.exists():
            if any(path.name != "beats" for path in self.folder.iterdir()):
                raise UsageError(f"{shown(self.folder)} is there and holds no study; name another place with --study")
            write_json(place, question)
            return True
        held = read_json(place)
        if held != question:
            other = [name for name in question if not isinstance(held, dict) or held.get(name) != question[name]]
            raise UsageError(
                f"{shown(self.folder)} holds a study of another question ({', '.join(other) or 'more'} differ); "
                "name another place with --study, or remove it"
            )
        return False


def _age(trial: Any) -> float:
    started = trial.datetime_start
    return time.time() - started.timestamp() if started is not None else float("inf")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder, made if need be, while no other process opens it as well. Raises: Busy after half a minute."""
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 30
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(folder))
                break
            except Busy:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        yield


def _mend(journal: Path) -> None:
    """Cut off a last line that a full disk or a crash has left unfinished: no later line would be read behind it."""
    if not journal.exists():
        return
    lock = _optuna().storages.journal.JournalFileSymlinkLock(str(journal))
    lock.acquire()
    try:
        data = journal.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(journal, data.rfind(b"\n") + 1)
    finally:
        lock.release()


def _optuna() -> Any:
    """Optuna, an extra, silent. Raises: UsageError where it is not installed."""
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise UsageError("a search needs optuna; install it: pip install 'quantailor[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
