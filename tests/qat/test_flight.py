"""Runs as they are watched: planted faults, stop rules, goals, actions, and going on after a kill."""

import copy
import os
import signal

import pytest
import torch

from quantailor.errors import UsageError
from quantailor.evaluate.run import evaluate
from quantailor.qat import checkpoint, flight
from quantailor.qat.flight import every_of
from quantailor.qat.recording import NAME, read
from quantailor.qat.settings import Settings, learning_rates
from quantailor.qat.train import train, weight_bits
from quantailor.qat.watch import Watch
from quantailor.store.work import Work
from tests.qat.test_checkpoint import dying_at, in_child

RATE = 2e-3
BROKEN_AT = 10


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def run(lm, simulated_at, train_data, held_out):
    """run(scheme, ...) -> (model, report)."""

    def go(scheme="w2a16-g32", *, validate=None, work=None, examples=None, floating=None, **settings):
        model = copy.deepcopy(simulated_at(scheme).model)
        folder = None if work is None else Work(work, {"one": 1}, states=checkpoint.KEPT, others=(NAME,))
        validate = validate or (lambda m: (evaluate(m, held_out).nats_per_token,))
        options = Settings(**{"steps": 60, "batch_size": 4, "evaluations": 4, "learning_rate": RATE, **settings})
        more = {"teacher": lm.model, "work": folder, "floating": floating}
        return model, train(model, examples or train_data, validate, options, **more)

    return go


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


# ------------------------------------------------------------------------------------------------ the recording


@pytest.mark.parametrize("scheme", ["w2a16-g32", "w8a8-static"])
def test_recording_changes_no_bit(run, scheme):
    plain, _ = run(scheme, steps=12)
    recorded, report = run(scheme, steps=12, record=True, record_every=3)
    assert same(plain, recorded)
    found = report.recording
    assert [m.step for m in found.measures] == [1, 3, 6, 9, 12] and [x.step for x in found.looks] == [0, 3, 6, 9, 12]
    assert [x.score for x in found.looks] == [pytest.approx(score, rel=1e-4) for _, score in report.curve]
    assert found.end.step == 12 and found.end.why == "" and found.alarms == []
    measured = {"error", "clip", "flips", "reversals", "drift", "drift_peak", "update", "rms", "peak", "range"}
    static = {"input_clip", "input_drift"} if scheme == "w8a8-static" else set()
    assert set(found.measures[0].layers) == measured | static
    assert found.measures[-1].tokens == 12 * 4 * 32 and found.measures[0].loss > 0 and found.measures[0].gradient > 0
    assert found.measures[0].rate == 0 and max(m.rate for m in found.measures) > 0.5 * RATE, "warm-up, then the rate"


def test_a_run_without_a_recording_has_none(run):
    _, report = run(steps=2)
    assert report.recording is None and report.stopped == ""


@pytest.mark.parametrize(("steps", "asked", "every"), [(100, None, 10), (4000, None, 10), (8000, None, 20), (9, 2, 2)])
def test_how_often_is_measured(steps, asked, every):
    assert every_of(Settings(steps=steps, record=True, record_every=asked)) == every


def test_settings_that_make_no_sense_are_refused():
    for wrong in ({"record_every": 5}, {"on_alarm": "cry"}, {"stop": ("patience=1", "patience=2")}, {"until": "x"},
                  {"stop": ("soon",)}, {"record": True, "record_every": 0}):  # fmt: skip
        with pytest.raises(UsageError):
            Settings(**wrong)
    assert Settings(stop=["patience=1"]).stop == ("patience=1",) and not Settings(stop=("patience=1",)).recording
    assert Settings(on_alarm="act").recording and Settings(stop=("error-stable=1%",)).recording


# ------------------------------------------------------------------------------------------------ planted faults


def dead_norm(model):
    model.model.layers[1].input_layernorm.weight.zero_()


def scale_to_0(model):
    model.model.layers[0].mlp.up_proj.weight_quantizer.log_scale.fill_(-20.0)


def input_scale_to_0(model):
    model.model.layers[0].mlp.up_proj.input_quantizer.log_scale.fill_(-20.0)


def activation_x1000(model):
    weight = model.model.layers[1].post_attention_layernorm.weight
    if weight.abs().max() < 100:
        weight.mul_(1000.0)


def half_scales(model):
    model.model.layers[0].mlp.up_proj.weight_quantizer.log_scale.fill_(-1.0)


FAULTS = {  # name -> (alarm, scheme, what is broken from step 10 on, where it is told)
    "learning rate x100, 2 bits": ("rate", "w2a16-g32", None, ""),
    "learning rate x100, 8 bits": ("rate", "w8a8", None, ""),
    "dead norm": ("norm", "w2a16-g32", dead_norm, "model.layers.1.input_layernorm"),
    "scale -> 0": ("scale", "w2a16-g32", scale_to_0, "model.layers.0.mlp.up_proj"),
    "scale -> 0, 8 bits": ("scale", "w8a8", scale_to_0, "model.layers.0.mlp.up_proj"),
    "input scale -> 0": ("scale", "w8a8-static", input_scale_to_0, "model.layers.0.mlp.up_proj"),
    "activation x1000": ("range", "w8a8", activation_x1000, "model.layers.1.mlp."),
    "half the scales": ("clip", "w4a16-g32", half_scales, "model.layers.0.mlp.up_proj"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_raises_its_own_alarm_within_50_steps(run, simulated_at, monkeypatch, name):
    kind, scheme, broken, where = FAULTS[name]
    real = Watch.on_step_begin

    def breaking(self, args, state, control, **more):
        if broken is not None and state.global_step >= BROKEN_AT:
            with torch.no_grad():
                broken(more["model"])
        real(self, args, state, control, **more)

    monkeypatch.setattr(Watch, "on_step_begin", breaking)
    size = sum(p.numel() for p in simulated_at(scheme).model.parameters())
    rate = learning_rates(Settings(), weight_bits(simulated_at(scheme).model), size)[0]
    rate = 100 * rate if broken is None else rate
    steps = 30 if broken is None else BROKEN_AT + 35
    _, report = run(scheme, record=True, steps=steps, learning_rate=rate, validate=lambda m: (1.0,))
    alarms = report.recording.alarms
    assert [a.alarm for a in alarms] == [kind]
    assert alarms[0].where.startswith(where) and alarms[0].action == "told"
    assert alarms[0].step - (0 if broken is None else BROKEN_AT) <= 50
    assert f"1 alarm raised: {kind} at step {alarms[0].step}; recording.jsonl has more" in report.notes


@pytest.mark.parametrize("scheme", ["w2a16-g32", "w4a16-g32", "w8a8-static", "w1.58a8"])
def test_a_healthy_run_raises_none(run, scheme):
    """bench/healthy_run.py has the long one."""
    _, report = run(scheme, record=True, record_every=5, steps=50, learning_rate=None, validate=lambda m: (1.0,))
    assert report.recording.alarms == [] and report.recording.measures[-1].step == 50


# ------------------------------------------------------------------------------------------------ actions


def test_acting_on_a_rate_that_is_too_high_saves_the_run(run):
    """Fifty times what is usual. Only told, it gets somewhere once its schedule has come down; acted on, further."""
    options = {"record_every": 2, "learning_rate": 100 * RATE, "steps": 80, "evaluations": 8}
    _, told = run("w1.58a8", record=True, **options)
    _, acted = run("w1.58a8", on_alarm="act", **options)
    back = [a.step for a in acted.recording.alarms if a.action == "went back"]
    rates = [[m.rate for m in report.recording.measures if m.step > back[-1]] for report in (told, acted)]
    assert len(back) >= 2 and all(mine < theirs / 3 for theirs, mine in zip(*rates))
    assert acted.best < told.best < told.start


def test_a_symptom_only_lowers_the_rate(run, monkeypatch):
    """No going back: the weights of the step that raised it are those that train on."""
    monkeypatch.setattr(flight, "newest", lambda head, measures, told: None if told else alarm(measures[-1].step))

    def alarm(step):
        return flight.Alarm(step, "loss", "", 0, 2.0, 1.0) if step == 10 else None

    _, usual = run(record=True, steps=30, validate=lambda m: (1.0,))
    _, acted = run(on_alarm="act", steps=30, validate=lambda m: (1.0,))
    assert [(a.step, a.action) for a in acted.recording.alarms] == [(10, "lowered")]
    for mine, theirs in zip(acted.recording.measures, usual.recording.measures):
        share = 1.0 if mine.step <= 10 else 0.5
        assert mine.rate == pytest.approx(share * theirs.rate, rel=1e-3)


def test_an_alarm_can_stop_the_run(run):
    _, report = run(on_alarm="stop", learning_rate=100 * RATE)
    assert report.steps < 60 and report.recording.alarms[-1].action == "stopped"
    assert "learning rate is too high" in report.stopped and report.recording.end.why == report.stopped


# ------------------------------------------------------------------------------------------------ stop rules, for real


def test_patience_stops_a_run_that_gains_nothing(run):
    _, report = run(stop=("patience=3",), learning_rate=0.5, scale_learning_rate=0.5, evaluations=12)
    assert report.steps == 15 and report.stopped == "patience=3: 3 evaluations without gain"
    assert any(note.startswith("stopped after step 15 of 60: patience=3") for note in report.notes)


def test_an_error_that_stands_still_stops_it(run):
    _, report = run(stop=("error-stable=0.1%",), learning_rate=1e-7, scale_learning_rate=1e-7, evaluations=12)
    assert report.steps == 20 and report.stopped.startswith("error-stable=0.1%: the quantization error stands still")
    _, moving = run(stop=("error-stable=0.001%",), steps=20, evaluations=5)
    assert moving.steps == 20


def test_overfitting_stops_it(run, lm, held_out):
    """Six rows learnt by heart."""
    from quantailor import api
    from tests.formats.making import texts

    few = api.examples_for(lm, texts(6, seed=91), context=32)
    _, report = run(
        "w8a16", stop=("overfit=2",), examples=few, steps=300, evaluations=30, learning_rate=5e-3, kl_weight=0.0,
        task_weight=1.0,
    )  # fmt: skip
    assert report.steps < 300 and report.stopped.startswith("overfit=2: the training loss falls")
    (a, b, c), losses = [score[0] for _, score in report.curve[-3:]], [loss for _, loss in report.losses[-3:]]
    assert a < b < c and losses[0] > losses[1] > losses[2] and report.best[0] <= a


@pytest.mark.parametrize(
    ("rule", "steps"), [("steps=7", 7), ("tokens=1000", 8), ("tokens=1024", 8), ("tokens=1025", 9), ("minutes=1e-6", 1)]
)
def test_budgets_stop_it_with_a_last_look(run, rule, steps):
    _, report = run(stop=(rule,))
    assert report.steps == steps and report.curve[-1][0] == steps and "the budget is used up" in report.stopped


def test_a_goal_stops_it(run, lm, held_out):
    floating = (evaluate(lm.model, held_out).nats_per_token,)
    _, report = run("w1.58a8", until="recovery>=0.3", floating=floating, evaluations=12, learning_rate=2e-3)
    won = (report.start[0] - report.best[0]) / (report.start[0] - floating[0])
    assert report.steps < 60 and won >= 0.3 and report.stopped.startswith("recovery>=0.3: reached, recovery is 0.")
    _, met = run(until="perplexity<=1000")
    assert met.steps == 0 and met.curve == [(0, met.start)], "it was met before the first step"


# ------------------------------------------------------------------------------------------------ after a kill


@pytest.mark.parametrize("died_at", [9, 14, 25])
def test_a_killed_run_goes_on_with_its_recording(run, tmp_path, monkeypatch, died_at):
    """An action, which changes the rates, before it or behind it: weights and recording are byte for byte the same."""
    options = {"on_alarm": "act", "record_every": 4, "steps": 28, "learning_rate": 50 * RATE, "checkpoint_every": 3}
    straight, expected = run(**options)
    assert "went back" in {a.action for a in expected.recording.alarms}

    def child():
        patch = pytest.MonkeyPatch()
        dying_at(patch, died_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        run(work=tmp_path / "work", **options)

    assert in_child(child) == -signal.SIGKILL
    left = read(tmp_path / "work" / NAME, finished=False)
    assert left.measures and left.end is None
    again, report = run(work=tmp_path / "work", **options)
    assert same(straight, again) and report.recording.to_bytes() == expected.recording.to_bytes()
    assert (tmp_path / "work" / NAME).read_bytes() == expected.recording.to_bytes()


def test_a_run_killed_behind_its_last_look_stops_there(run, tmp_path, monkeypatch):
    """The rule had ended it, and the checkpoint knows."""
    real = Watch.save

    def dies(self):
        real(self)
        if self.stopped:
            raise KeyboardInterrupt

    options = {"stop": ("patience=2",), "record": True, "validate": lambda m: (1.0,), "evaluations": 12}
    _, expected = run(**options)
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            run(work=tmp_path / "work", **options)
    _, report = run(work=tmp_path / "work", **options)
    assert report.steps == expected.steps == 10 and report.stopped == expected.stopped
    assert report.recording.to_bytes() == expected.recording.to_bytes()


def test_a_lost_recording_is_told_and_the_run_goes_on(run, tmp_path):
    options = {"record": True, "record_every": 4, "steps": 20, "checkpoint_every": 3}
    straight, _ = run(**options)

    def child():
        patch = pytest.MonkeyPatch()
        dying_at(patch, 14, lambda: os.kill(os.getpid(), signal.SIGKILL))
        run(work=tmp_path / "work", **options)

    assert in_child(child) == -signal.SIGKILL
    (tmp_path / "work" / NAME).unlink()
    again, report = run(work=tmp_path / "work", **options)
    assert same(straight, again) and any("damaged or gone" in note for note in report.notes)
    assert report.recording.measures[0].step > 8


def test_sharded_weights_are_not_recorded(run, monkeypatch):
    from quantailor.qat import distributed

    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(UsageError, match="a recording looks at whole weights"):
        run(record=True, parallel="fsdp2")
