"""The cheapest way within the tolerance and the time; what comes back is the best that was found.

Most tests run a scripted world: models are numbers, measuring reads them, training sets them, and a clock that only
moves when something is done. A few at the end are real.
"""

import copy
import dataclasses
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from quantailor import api
from quantailor.errors import QuantailorError, UsageError
from quantailor.evaluate.run import evaluate
from quantailor.models.prepare import State
from quantailor.progress import Progress
from quantailor.qat.settings import Settings
from quantailor.qat.train import TrainReport
from quantailor.recipe import Inventory, Recipe
from quantailor.searching import ladder as ladder_module
from quantailor.searching.ladder import Goal, Ladder, relative_loss
from quantailor.spec import Scheme
from tests.formats.making import records, texts, trained


class World:
    """What each rung will measure, and how long things take. Perplexity: lower is better."""

    def __init__(self, monkeypatch, float_value=10.0, *, higher=False, step_seconds=1.0, **values):
        self.values, self.higher, self.step_seconds = {"float": float_value, **values}, higher, step_seconds
        self.now, self.calls, self.settings = 0.0, [], []
        self.measures_kl = False
        self.model = self.twin(float_value)
        for name in ("calibrate", "prepare", "train", "evaluate", "reference_for", "difference"):
            monkeypatch.setattr(ladder_module, name, getattr(self, name))

    def twin(self, value):
        model = nn.Linear(1, 1)
        model.value = value
        return model

    def result(self, model):
        return SimpleNamespace(
            metric="accuracy" if self.higher else "perplexity",
            value=model.value,
            higher_is_better=self.higher,
            nats_per_token=model.value,
            kl=model.value / 100 if self.measures_kl else None,
            mean_loss=1.0,
            to_json=dict,
        )

    def reference_for(self, model, data, progress=None):
        self.now += 1
        return self.result(model)

    def evaluate(self, model, data, reference=None, limit=None, progress=None):
        self.now += 1 if limit is None else 0
        return self.result(model)

    def difference(self, before, after):
        return after.value - before.value, (-1.0, 1.0)

    def prepare(self, model, recipe):
        model.quantailor_state = State(recipe.scheme, Inventory(()))
        return model.quantailor_state

    def calibrate(self, model, batches, methods, progress):
        name = methods("layer").name
        self.calls.append(name)
        self.now += 5
        model.value = self.values[name]

    def train(self, model, data, validate, settings, *, teacher=None, progress=None):
        start = validate(model)
        with (progress or Progress()).task("training", settings.steps) as advance:
            for _ in range(settings.steps):
                self.now += self.step_seconds
                advance(1)
        self.settings.append(settings)
        kind = "trial" if isinstance(progress, ladder_module._Pace) else self.rung(model, teacher)
        self.calls.append((kind, settings.steps))
        value = self.values.get(kind, model.value)
        if isinstance(value, Exception):
            raise value
        better = validate(self.twin(value)) < start
        model.value = value if better else model.value
        return TrainReport(
            settings.steps, settings.steps if better else 0, start, min(start, validate(model)), [(0, start)]
        )

    def rung(self, model, teacher):
        if teacher is None:
            return "float+"
        return "qat" if any(call[0] == "hybrid" for call in self.calls) else "hybrid"

    def climb(self, **goal):
        options = {
            "tolerance": 0.05,
            "minutes": 1e6,
            "short_steps": 10,
            "long_steps": 40,
            "methods": ("rtn", "gptq"),
            **goal,
        }
        data = SimpleNamespace(calibration_batches=lambda *a, **k: ([{}], []), task="lm", __len__=lambda: 1)
        held = type("Data", (), {"__len__": lambda self: 9, "task": "classification" if self.higher else "lm"})()
        recipe = Recipe(Scheme.parse("w4a16"))
        return Ladder(self.model, recipe, data, held, Goal(**options), clock=lambda: self.now).climb()


def names(outcome):
    return [step.name for step in outcome.steps]


# ------------------------------------------------------------------------------------------------ rungs


def test_it_stops_at_the_first_ptq_within_tolerance(monkeypatch):
    world = World(monkeypatch, rtn=10.4, gptq=10.1)
    outcome = world.climb()

    assert outcome.verdict == "ptq" and names(outcome) == ["float", "rtn"] and world.calls == ["rtn"]
    assert outcome.final.loss == pytest.approx(0.04) and outcome.model.value == 10.4
    assert outcome.recovery is None and outcome.notes == []


def test_the_tolerance_itself_is_within(monkeypatch):
    assert World(monkeypatch, rtn=10.5).climb(tolerance=0.05).verdict == "ptq"
    assert World(monkeypatch, rtn=10.0).climb(tolerance=0.0).verdict == "ptq"
    assert World(monkeypatch, rtn=9.0).climb(tolerance=0.0).final.loss == pytest.approx(-0.1)


def test_a_better_solver_comes_before_training(monkeypatch):
    world = World(monkeypatch, rtn=11.0, gptq=10.2)
    outcome = world.climb()

    assert outcome.verdict == "ptq" and names(outcome) == ["float", "rtn", "gptq"]
    assert "rtn lost 10.00%, over 5.00%" in outcome.steps[2].reason


def test_a_short_qat_comes_before_a_long_one(monkeypatch):
    world = World(monkeypatch, rtn=12.0, gptq=11.5, hybrid=10.3)
    outcome = world.climb()

    assert outcome.verdict == "hybrid" and names(outcome) == ["float", "rtn", "gptq", "hybrid"]
    assert world.calls[-1] == ("hybrid", 10) and outcome.model.quantailor_state.method == "gptq+qat"


def test_a_long_qat_is_the_last_resort(monkeypatch):
    world = World(monkeypatch, rtn=12.0, gptq=11.5, hybrid=11.0, qat=10.4)
    outcome = world.climb()

    assert outcome.verdict == "qat" and names(outcome)[-2:] == ["hybrid", "qat"]
    assert world.calls[-2:] == [("hybrid", 10), ("qat", 40)]
    assert outcome.model.quantailor_state.method == "gptq+qat", "once, however many rungs"
    assert outcome.steps[-1].reason == (
        "hybrid lost 10.00%, over 5.00%: 40 steps of QAT from there; the data's own loss counts 1"
    )


@pytest.mark.parametrize(
    ("hybrid", "asked", "own", "weight"),
    [
        (11.0, None, 0.0, 1.0),  # near: what is judged is the data's own
        (15.0, None, 0.0, 1.0),
        (15.1, None, 0.0, 0.0),  # far: the float model has more to teach
        (11.0, 0.0, 0.0, 0.0),
        (15.1, 0.5, 0.0, 0.5),
        (15.1, None, 0.2, 0.2),  # of the settings, which the short one has as well
        (11.0, 2.0, 0.2, 2.0),
    ],
)
def test_a_long_qat_from_nearby_learns_from_the_data_too(monkeypatch, hybrid, asked, own, weight):
    world = World(monkeypatch, 10.0, rtn=16.0, hybrid=hybrid, qat=10.1, **{"float+": 9.0})
    outcome = world.climb(methods=("rtn",), task_weight=asked, settings=Settings(task_weight=own), control=True)
    trial, short, long, control = world.settings

    assert trial.task_weight == short.task_weight == own and short.average == 0.0
    assert (long.task_weight, long.kl_weight, long.average) == (weight, 1.0, 0.25)
    assert (control.task_weight, control.kl_weight, control.average) == (1.0, 0.0, 0.25), "as the run beside it"
    (step,) = (step for step in outcome.steps if step.name == "qat")
    assert step.reason.endswith(f"; the data's own loss counts {weight:g}" if weight else "steps of QAT from there")


@pytest.mark.parametrize(
    ("hybrid", "measured", "said"), [(11.0, True, True), (15.5, True, False), (11.0, False, False)]
)
def test_what_learning_from_the_data_cost_is_said_where_it_was_measured(monkeypatch, hybrid, measured, said):
    world = World(monkeypatch, 10.0, rtn=16.0, hybrid=hybrid, qat=10.1)
    world.measures_kl = measured
    told = "qat learned from the data as well as from the float model: its KL to that went from 0.1100 to 0.1010"
    expected = [f"{told}; task_weight 0 keeps to the float model alone"] if said else []
    assert world.climb(methods=("rtn",)).notes == expected


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(UsageError, match=r"task_weight=.* must be 0 or more"):
        Goal(task_weight=weight)


def test_a_run_without_any_loss_is_refused_before_it_begins():
    with pytest.raises(UsageError, match="one must count"):
        Goal(task_weight=0.0, settings=Settings(kl_weight=0.0, task_weight=1.0))


def test_where_nothing_is_enough_the_best_comes_back(monkeypatch):
    outcome = World(monkeypatch, rtn=14.0, gptq=13.0, hybrid=12.0, qat=11.0).climb()
    assert outcome.verdict == "infeasible" and outcome.final.name == "qat" and outcome.model.value == 11.0


@pytest.mark.parametrize(("rtn", "gptq", "best"), [(12.0, 13.0, "rtn"), (13.0, 12.0, "gptq"), (12.0, math.inf, "rtn")])
def test_it_is_never_worse_than_the_best_ptq(monkeypatch, rtn, gptq, best):
    """A solver that does worse, and training that finds nothing or worse on all of the data."""
    world = World(monkeypatch, rtn=rtn, gptq=gptq, hybrid=20.0, qat=30.0)
    outcome = world.climb()

    assert outcome.verdict == "infeasible" and outcome.final.name == best and outcome.model.value == 12.0
    assert outcome.notes == [f"{rung}: training kept the start; {best} stands" for rung in ("hybrid", "qat")]


def test_training_that_only_looks_better_on_a_part_is_not_taken(monkeypatch):
    world = World(monkeypatch, rtn=12.0, gptq=11.5, hybrid=11.0)
    real = world.evaluate

    def overall(model, data, reference=None, limit=None, progress=None):
        result = real(model, data, reference, limit, progress)
        result.value = 13.0 if limit is None and model.value == 11.0 else result.value
        return result

    monkeypatch.setattr(ladder_module, "evaluate", overall)
    outcome = world.climb()

    assert outcome.final.name == "gptq" and outcome.verdict == "infeasible"
    assert outcome.notes[0] == "hybrid: training 13.0000 is no better than 11.5000 on all of the data; gptq stands"


def test_training_that_diverges_costs_nothing_that_was_found(monkeypatch):
    world = World(monkeypatch, rtn=12.0, gptq=11.5, hybrid=QuantailorError("training diverged twice"), qat=10.1)
    outcome = world.climb()
    assert outcome.verdict == "qat" and outcome.notes == ["hybrid failed: training diverged twice; gptq stands"]

    world = World(monkeypatch, rtn=12.0, gptq=11.5, **dict.fromkeys(("hybrid", "qat"), QuantailorError("diverged")))
    outcome = world.climb()
    assert outcome.verdict == "infeasible" and outcome.final.name == "gptq"


def test_a_higher_figure_can_be_the_better_one(monkeypatch):
    outcome = World(monkeypatch, 0.9, higher=True, rtn=0.5, gptq=0.8, hybrid=0.88).climb()

    assert outcome.verdict == "hybrid" and outcome.final.loss == pytest.approx(0.02 / 0.9)
    assert outcome.recovery == pytest.approx((0.8 - 0.88) / (0.8 - 0.9)) == pytest.approx(0.8)


def test_a_model_that_breaks_is_infinitely_worse(monkeypatch):
    outcome = World(monkeypatch, rtn=math.inf, gptq=math.nan, hybrid=10.2).climb()

    assert [step.loss for step in outcome.steps[1:3]] == [math.inf, math.inf] and outcome.verdict == "hybrid"
    assert outcome.recovery is None and outcome.steps[1].change is None


@pytest.mark.parametrize(
    ("value", "base", "higher", "loss"),
    [
        (10.2, 10.0, False, 0.02),
        (9.0, 10.0, False, -0.1),
        (0.45, 0.5, True, 0.1),
        (0.55, 0.5, True, -0.1),
        (-0.2, -0.1, True, 1.0),
        (0.0, 0.0, True, 0.0),
        (0.1, 0.0, False, math.inf),
        (math.nan, 10.0, False, math.inf),
        (math.inf, 10.0, False, math.inf),
    ],
)
def test_relative_loss(value, base, higher, loss):
    assert relative_loss(value, base, higher) == pytest.approx(loss)


# ------------------------------------------------------------------------------------------------ recovery


def test_recovery_is_the_share_of_what_ptq_lost(monkeypatch):
    outcome = World(monkeypatch, 10.0, rtn=15.0, gptq=14.0, hybrid=12.0, qat=11.0).climb()
    assert outcome.recovery == pytest.approx((14.0 - 11.0) / (14.0 - 10.0)) == 0.75
    assert outcome.recovery_control is None


def test_the_control_is_the_float_model_trained_as_long(monkeypatch):
    world = World(monkeypatch, 10.0, rtn=15.0, gptq=14.0, hybrid=12.0, qat=11.0, **{"float+": 8.0})
    outcome = world.climb(control=True)

    assert world.calls[-1] == ("float+", 50), "as many steps as both rungs took"
    assert outcome.recovery_control == pytest.approx((14.0 - 11.0) / (14.0 - 8.0)) == 0.5
    assert outcome.recovery == 0.75 and outcome.final.name == "qat" and outcome.model.value == 11.0
    assert names(outcome)[-1] == "float+" and "for the same 50 steps" in outcome.steps[-1].reason


def test_no_control_where_nothing_was_trained(monkeypatch):
    world = World(monkeypatch, rtn=10.0)
    assert world.climb(control=True).recovery_control is None and world.calls == ["rtn"]


# ------------------------------------------------------------------------------------------------ time


def test_the_first_training_run_is_shortened_by_what_a_trial_showed(monkeypatch):
    """Ten seconds a step, two minutes in all: 100 steps would take sixteen."""
    world = World(monkeypatch, rtn=15.0, gptq=14.0, hybrid=12.0, qat=11.0, step_seconds=10.0)
    outcome = world.climb(minutes=2, short_steps=100)
    (hybrid,) = (call[1] for call in world.calls if call[0] == "hybrid")

    assert ("trial", 3) in world.calls and 1 <= hybrid < 12 and world.now <= 120 + 10
    assert f"hybrid runs {hybrid} steps instead of 100: what 2 minutes leave" in outcome.notes
    assert outcome.final.value <= 14.0


def test_the_second_one_goes_by_the_pace_of_the_first(monkeypatch):
    world = World(monkeypatch, rtn=15.0, gptq=14.0, hybrid=12.0, qat=11.0, step_seconds=2.0)
    outcome = world.climb(minutes=2, short_steps=10, long_steps=1000)
    steps = dict(call for call in world.calls if isinstance(call, tuple))

    assert steps["hybrid"] == 10 and 20 < steps["qat"] < 60 and world.now <= 120
    assert outcome.notes == [f"qat runs {steps['qat']} steps instead of 1000: what 2 minutes leave"]


def test_what_there_is_no_time_for_is_left_out_and_said(monkeypatch):
    world = World(monkeypatch, rtn=15.0, gptq=14.0, hybrid=12.0)
    outcome = world.climb(minutes=0.05)  # three seconds: measuring and RTN take seven
    assert world.calls == ["rtn"] and outcome.verdict == "infeasible" and outcome.final.name == "rtn"
    assert outcome.notes == [
        "gptq left out: 0.05 minutes are over",
        "hybrid left out: -4 s are left of 0.05 minutes",
    ]

    world = World(monkeypatch, rtn=15.0, gptq=14.0, hybrid=12.0, step_seconds=100.0)
    outcome = world.climb(minutes=1)
    assert [call for call in world.calls if call[0] == "hybrid"] == [] and outcome.final.name == "gptq"
    assert outcome.notes[-1].startswith("hybrid left out: ")


def test_at_least_one_ptq_is_tried_however_short_the_time(monkeypatch):
    assert World(monkeypatch, rtn=10.1).climb(minutes=1e-9).verdict == "ptq"


def test_each_step_says_how_long_it_took(monkeypatch):
    outcome = World(monkeypatch, rtn=15.0, gptq=14.0, hybrid=10.0).climb()
    assert [step.seconds for step in outcome.steps] == [1.0, 6.0, 6.0, 11.0]


# ------------------------------------------------------------------------------------------------ what is passed on


def test_steps_become_json(monkeypatch):
    outcome = World(monkeypatch, rtn=15.0, gptq=14.0, hybrid=10.0).climb()
    float_step, *_, hybrid = (step.to_json() for step in outcome.steps)

    assert {"name", "value", "reason", "seconds", "loss", "change_interval", "result"} == float_step.keys()
    assert hybrid["training"]["steps"] == 10 and hybrid["change_interval"] == (-1.0, 1.0)


def test_the_person_watching_hears_of_each_rung(monkeypatch):
    lines = []

    class Watching(Progress):
        def say(self, line):
            lines.append(line)

    world = World(monkeypatch, rtn=15.0, qronos=10.1)
    held = type("Data", (), {"__len__": lambda self: 9, "task": "lm"})()
    data = SimpleNamespace(calibration_batches=lambda *a, **k: ([{}], []), task="lm")
    Ladder(world.model, Recipe(Scheme.parse("w4a16")), data, held, Goal(), Watching(), clock=lambda: world.now).climb()

    assert [line.split()[0] for line in lines] == ["float", "rtn", "qronos"]
    assert "perplexity 15.0000  +50.00%" in lines[1]


@pytest.mark.parametrize("bad", [{"methods": ("rtn", "nothing")}, {"methods": ()}])
def test_methods_must_be_known(bad):
    with pytest.raises(UsageError, match="method"):
        Goal(**bad)


# ------------------------------------------------------------------------------------------------ for real


@pytest.fixture(scope="module")
def lm(tmp_path_factory, tiny_lm) -> api.Model:
    return api.load(trained(tiny_lm, tmp_path_factory.mktemp("trained") / "model"))


@pytest.fixture
def climb(lm):
    def run(scheme, **goal):
        train_data, held_out = (api.examples_for(lm, texts(n, seed=s), context=32) for n, s in ((40, 31), (12, 32)))
        settings = Settings(batch_size=8, evaluations=2, learning_rate=2e-3)
        options = {"calibration": 8, "short_steps": 8, "long_steps": 24, "settings": settings, **goal}
        return Ladder(lm.model, Recipe(Scheme.parse(scheme)), train_data, held_out, Goal(**options)).climb(), held_out

    return run


def parameters(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_eight_bits_need_no_training(climb, lm):
    before = parameters(lm.model)
    outcome, held_out = climb("w8a8")

    assert outcome.verdict == "ptq" and names(outcome) == ["float", "rtn"]
    assert evaluate(outcome.model, held_out).value == outcome.final.value
    low, high = outcome.final.change
    assert low <= outcome.final.value - outcome.float.value <= high
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters()))


def test_ternary_weights_do_and_the_control_runs_too(climb, lm):
    before = parameters(lm.model)
    outcome, held_out = climb("w1.58a8", tolerance=0.0, control=True, methods=("rtn", "gptq"))
    values = {step.name: step.value for step in outcome.steps}

    assert list(values) == ["float", "rtn", "gptq", "hybrid", "qat", "float+"]
    assert outcome.final.value == min(values[name] for name in ("rtn", "gptq", "hybrid", "qat")) < values["gptq"]
    assert evaluate(outcome.model, held_out).value == outcome.final.value
    ptq = min(values["rtn"], values["gptq"])
    assert outcome.recovery == pytest.approx((ptq - outcome.final.value) / (ptq - values["float"]))
    assert outcome.recovery_control == pytest.approx((ptq - outcome.final.value) / (ptq - values["float+"]))
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, lm.model.parameters()))


def test_a_real_clock_is_kept_to(climb):
    """A day of steps in some seconds: four times what two steps take here, whatever else this machine does."""
    started = time.monotonic()
    climb("w1.58a8", tolerance=0.0, short_steps=2, methods=("rtn",))
    minutes = max(3.0, 4 * (time.monotonic() - started)) / 60
    outcome, _ = climb("w1.58a8", tolerance=0.0, minutes=minutes, short_steps=1_000_000, methods=("rtn",))

    assert sum(step.seconds for step in outcome.steps) < 3 * 60 * minutes
    assert any("steps instead of 1000000: what" in note for note in outcome.notes)


def test_a_classifier_climbs_too(tiny_bert):
    model = api.load(tiny_bert)
    train_data, held_out = (api.examples_for(model, records(n, seed=s)) for n, s in ((48, 1), (40, 2)))
    goal = Goal(
        tolerance=0.0, calibration=8, short_steps=2, long_steps=3, settings=Settings(batch_size=8, evaluations=1)
    )
    outcome = Ladder(model.model, Recipe(Scheme.parse("w1a1")), train_data, held_out, goal).climb()

    assert outcome.final.result.metric == "accuracy"
    assert outcome.final.value == max(step.value for step in outcome.steps[1:])


def test_the_same_seed_climbs_to_the_same_weights(climb):
    first, again = (climb("w1.58a8", tolerance=0.0, long_steps=8, methods=("rtn",))[0] for _ in range(2))
    assert [dataclasses.replace(s, seconds=0, result=None) for s in first.steps] == [
        dataclasses.replace(s, seconds=0, result=None) for s in again.steps
    ]
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters()))
    assert copy.deepcopy(first.model) is not first.model
