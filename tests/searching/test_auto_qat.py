"""The loop of Auto-QAT in a scripted world: what a recipe comes to is written down, a clock moves when it is run."""

from types import SimpleNamespace

import pytest

from quantailor.errors import QuantailorError, UsageError
from quantailor.searching.auto_qat import SHARE_OF_WINNER, Clock, Search
from quantailor.searching.front import Limits
from quantailor.searching.qat_runs import Start, Trained
from quantailor.searching.shared_study import SharedStudy
from quantailor.searching.space import Space

SPACE = Space(
    bits=(4, 3, 2), group=(32,), scales=("learned",), learning_rate=(0.3, 1.0, 3.0), steps=(20,), frozen=(0.0, 0.5)
)


class World:
    """4, 3 and 2 bits lose 1, 5 and 50 % by PTQ, cost 4, 3 and 2 ms; rate 1 takes back most of it, freezing hurts."""

    def __init__(self, step_seconds=1.0):
        self.now, self.step_seconds, self.trained = 0.0, step_seconds, []

    def clock(self):
        return self.now

    def start(self, scheme):
        bits = scheme.weight.grid.bits
        return Start(SimpleNamespace(bits=bits), {4: 0.01, 3: 0.05, 2: 0.5}[bits], bits * 1000, float(bits))

    def loss(self, point, share):
        back = {0.3: 0.5, 1.0: 0.9, 3.0: 0.2}[point.learning_rate] - (0.1 if point.frozen else 0.0)
        return self.start(point.scheme).loss * (1 - back * share)

    def train(self, point, *, until, on_look=None, steps=None, looks=4):
        steps, began = steps or point.steps, self.now
        self.trained.append((point, steps))
        for done in range(1, steps + 1):
            self.now += self.step_seconds
            if on_look is not None and done % max(1, steps // looks) == 0:
                on_look(done / steps, self.loss(point, done / steps))
            if self.now > until:
                break
        return Trained(SimpleNamespace(), self.loss(point, min(1.0, done / point.steps)), done, self.now - began)


def searched(tmp_path, world, limits, seconds=1e6, **options):
    study = SharedStudy(tmp_path / "s", {"world": 1}, SPACE, limits)
    with study:
        work = Search(world, study, limits, Clock(0.0, seconds), **options)
        return work, work.search()


def test_the_winner_is_the_best_within_the_latency_and_the_front_is_right(tmp_path):
    world = World()
    work, found = searched(tmp_path, world, Limits(0.2, 3.5))
    assert found.stopped == "every point of the space has been tried"
    assert (found.winner.point.bits, found.winner.point.learning_rate, found.winner.point.frozen) == (3, 1.0, 0.0)
    assert found.winner.loss == pytest.approx(0.005)
    front = {t.number: t for t in found.tried if t.number in found.front}
    assert sorted(t.point.bits for t in front.values()) == [2, 3] or sorted(t.point.bits for t in front.values()) == [
        2,
        3,
        4,
    ]
    over = [t for t in found.tried if t.point.bits == 4]
    assert len(over) == 6 and all(t.facts["steps_done"] == 0 and t.loss == 0.01 for t in over)
    assert all(point.bits != 4 for point, _ in world.trained), "over the latency: not trained"
    assert sum(steps for _, steps in world.trained) == 12 * 20
    stopped = [t for t in found.tried if str(t.facts.get("reason")).startswith("stopped at")]
    assert stopped and world.now < 12 * 20, "some were stopped early"
    assert all(t.loss >= found.winner.loss for t in stopped if t.point.bits == 3)
    assert found.trial_seconds == pytest.approx(world.now)
    before = world.now
    work.train_winner(found.winner)
    assert world.trained[-1] == (found.winner.point, 80) and world.now - before == 80, "longer than its trial"


def test_no_point_is_run_twice(tmp_path):
    world = World()
    searched(tmp_path, world, Limits(0.2))
    assert len(world.trained) == len({point for point, _ in world.trained}) == 18


def test_time_is_kept_and_shared_with_the_winner(tmp_path):
    world = World()
    seconds = 100.0
    work, found = searched(tmp_path, world, Limits(0.2), seconds=seconds)
    assert found.stopped == "the time for searching is over"
    assert world.now <= seconds * (1 - SHARE_OF_WINNER) + world.step_seconds
    work.train_winner(found.winner)
    assert world.now <= seconds + world.step_seconds


def test_without_time_the_trial_stands(tmp_path):
    world = World()
    work, found = searched(tmp_path, world, Limits(0.2), trials=3)
    world.now = 1e6 - 5
    _, trained = work.train_winner(found.winner)
    assert trained.loss == found.winner.loss and any("stands" in note for note in found.notes)


def test_infeasible_gives_the_closest(tmp_path):
    _, found = searched(tmp_path, World(), Limits(0.0001, 2.5))
    # 4 bits: 4 / 2.5 - 1 = 60 % over; 3 bits: 20 %; 2 bits: (1.05 / 1.0001) - 1 = 5 %
    assert found.winner.point.bits == 2 and found.winner.point.learning_rate == 1.0


def test_a_run_that_fails_is_told_and_a_mistake_ends_the_search(tmp_path):
    world = World()
    plain = world.train

    def train(point, **options):
        if point.learning_rate == 3.0:
            raise QuantailorError("training diverged twice")
        return plain(point, **options)

    world.train = train
    _, found = searched(tmp_path, world, Limits(0.2))
    assert len(found.tried) == 12 and sum("diverged twice" in note for note in found.notes) >= 6

    def mistake(point, **options):
        raise UsageError("nothing is left to train")

    world.train = mistake
    with pytest.raises(UsageError, match="nothing is left"):
        searched(tmp_path / "again", world, Limits(0.2))


def test_no_trials(tmp_path):
    with pytest.raises(UsageError, match="trials=0"):
        searched(tmp_path, World(), Limits(0.2), trials=0)
