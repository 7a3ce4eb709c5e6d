"""A run that is killed and begun again ends with the bytes of a run that was not."""

import copy
import dataclasses
import json
import os
import random
import signal
import time
import traceback

import pytest
import torch
from torch import nn

from quantailor.data.batching import LengthGrouped
from quantailor.evaluate.run import evaluate
from quantailor.qat import checkpoint, trainer
from quantailor.qat.settings import Settings
from quantailor.qat.train import train
from quantailor.qat.watch import Watch
from quantailor.store.work import Work

OPTIONS = {"batch_size": 4, "evaluations": 3, "checkpoint_every": 2, "learning_rate": 3e-3}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Only a power failure can tell."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


class Killed(BaseException):
    """What stands for a kill in a test that goes on in the same process."""


@pytest.fixture
def run(lm, simulated_at, train_data, held_out):
    """run(folder, scheme, ...) -> (sha256 of the trained model, report, work)."""

    def go(folder=None, scheme="w8a8-static", *, config="one", scores=None, change=None, **settings):
        model = copy.deepcopy(simulated_at(scheme).model)
        if change is not None:
            change(model)
        work = None if folder is None else Work(folder, {"config": config}, states=checkpoint.KEPT)
        score = scores or (lambda m: (evaluate(m, held_out).nats_per_token,))
        options = Settings(**{"steps": 12, **OPTIONS, **settings})
        report = train(model, train_data, score, options, teacher=lm.model, work=work)
        return checkpoint.fingerprint(model), report, work

    return go


def dying_at(monkeypatch, step, act):
    """`act` is called in the middle of step `step`, before its optimizer's step."""
    real = Watch.on_pre_optimizer_step

    def dies(self, args, state, control, **more):
        real(self, args, state, control, **more)
        if state.global_step + 1 == step:
            act()

    monkeypatch.setattr(Watch, "on_pre_optimizer_step", dies)


def in_child(work):
    """`work()` in a forked process; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def without_note(report):
    notes = [note for note in report.notes if not note.startswith("training went on from step")]
    return {**vars(report), "notes": notes, "optimizer_bytes": 0}


# ------------------------------------------------------------------------------------------------ kill -9


def test_kill_9_at_ten_random_steps_and_still_the_same_bytes(run, tmp_path):
    """Killed at a random step, again and again until it has run through: weights, scales and report are those of
    the run that nobody disturbed. 40 rows in batches of 4 by 2: epochs end in the middle."""
    options = {"steps": 24, "accumulate": 2, "average": 0.2, "evaluations": 4}
    expected, report, _ = run(**options)
    draw = random.Random(7)
    steps = sorted(draw.sample(range(2, 25), 10))
    for step in steps:

        def child(step=step):
            patch = pytest.MonkeyPatch()
            dying_at(patch, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
            run(tmp_path / "work", **options)

        assert in_child(child) == -signal.SIGKILL, "it was to be killed there"
    found, resumed, work = run(tmp_path / "work", **options)

    assert found == expected and without_note(resumed) == without_note(report)
    assert any(note.startswith("training went on from step") for note in resumed.notes)
    assert work.records[-1]["step"] == 24


def test_killed_at_a_random_moment(run, tmp_path):
    """At any instant, in the middle of a write included."""
    expected, report, _ = run(steps=30)
    draw = random.Random(3)
    kills = 0
    for _ in range(6):
        pid = os.fork()
        if pid == 0:
            try:
                run(tmp_path / "work", steps=30, checkpoint_every=1)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0.1, 0.8))
        os.kill(pid, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    found, resumed, _ = run(tmp_path / "work", steps=30, checkpoint_every=1)
    assert kills >= 2 and found == expected and without_note(resumed) == without_note(report)


@pytest.mark.parametrize(
    "settings",
    [
        {"trains": "scales", "scheme": "w4a16-g32"},
        {"gradient": "lsq+", "scheme": "w4a16-g32-asym"},
        {"gradient": "pact"},
        {"cage": 10.0, "freeze_oscillating": 0.01, "scheme": "w2a16-g32", "learning_rate": 2e-2},
        {"precision": "bfloat16", "gradient_checkpointing": True},
        {"layer_decay": 0.5, "freeze_lower": 0.5, "freeze_ranges": 0.5},
        {"scheme": "w2a16-g32-balanced", "average": 0.5},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
@pytest.mark.parametrize("step", [4, 9])
def test_every_setting_goes_on_to_the_same_bytes(run, tmp_path, monkeypatch, settings, step):
    expected, report, _ = run(**settings)
    with monkeypatch.context() as patch:

        def kill():
            raise Killed

        dying_at(patch, step, kill)
        with pytest.raises(Killed):
            run(tmp_path / "work", **settings)
    found, resumed, _ = run(tmp_path / "work", **settings)
    assert found == expected and without_note(resumed) == without_note(report)


@pytest.mark.parametrize("step", [5, 17])
def test_rows_grouped_by_length_go_on_with_the_same_batches(
    classifier, rows, simulated_at, tmp_path, monkeypatch, step
):
    """48 rows in batches of 4: the second kill is in the second pass, whose order is another."""
    seen = []

    def go(folder=None):
        model = copy.deepcopy(simulated_at("w8a8", "classification").model)
        work = None if folder is None else Work(folder, {"config": "one"}, states=checkpoint.KEPT)
        settings = Settings(
            **{
                **OPTIONS,
                "learning_rate": 3e-4,
                "steps": 24,
                "group_by_length": True,
                "task_weight": 1.0,
                "kl_weight": 0.0,
            }
        )
        report = train(model, rows, lambda m: (evaluate(m, rows).mean_loss,), settings, work=work)
        assert report.improved
        return checkpoint.fingerprint(model)

    real = trainer.QATTrainer.training_step

    def watched(self, model, inputs, *more, **others):
        seen.append(inputs["input_ids"])
        return real(self, model, inputs, *more, **others)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.QATTrainer, "training_step", watched)
        expected = go()
    lengths = [len(row["input_ids"]) for row in rows.dataset.rows]
    for epoch in (0, 1):
        sampler = LengthGrouped(lengths, 4, seed=0)
        sampler.set_epoch(epoch)
        order = list(sampler)
        for batch, number in zip(seen[12 * epoch :], range(0, 48, 4)):
            wanted = rows.collator([rows.dataset[row] for row in order[number : number + 4]])["input_ids"]
            assert torch.equal(batch, wanted)
    with monkeypatch.context() as patch:

        def kill():
            raise Killed

        dying_at(patch, step, kill)
        with pytest.raises(Killed):
            go(tmp_path / "work")
    assert go(tmp_path / "work") == expected


def test_dropout_and_batch_norm_go_on_too(run, tmp_path, monkeypatch):
    """Random generators and running averages are part of the state."""

    class Noisy(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.norm = inner, nn.BatchNorm1d(64)

        def forward(self, x, *args, **kwargs):
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
            return self.inner(nn.functional.dropout(x, 0.3, self.training), *args, **kwargs)

    def noisy(model):
        model.model.layers[0].mlp = Noisy(model.model.layers[0].mlp)

    expected, _, _ = run(change=noisy)
    with monkeypatch.context() as patch:

        def kill():
            raise Killed

        dying_at(patch, 8, kill)
        with pytest.raises(Killed):
            run(tmp_path / "work", change=noisy)
    assert run(tmp_path / "work", change=noisy)[0] == expected


# ------------------------------------------------------------------------------------------------ damage


def interrupted(run, folder, monkeypatch, step=11, **settings):
    with monkeypatch.context() as patch:

        def kill():
            raise Killed

        dying_at(patch, step, kill)
        with pytest.raises(Killed):
            run(folder, **settings)


@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "record"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(run, tmp_path, monkeypatch, harm):
    expected, _, _ = run()
    folder = tmp_path / "work"
    interrupted(run, folder, monkeypatch)
    states = sorted(folder.glob("state-*"))
    records = sorted(folder.glob("step-*.json"))
    assert [int(path.stem.partition("-")[2]) for path in states] == [8, 10]
    if harm == "flip":
        raw = bytearray(states[-1].read_bytes())
        raw[len(raw) // 2] ^= 1
        states[-1].write_bytes(raw)
    elif harm == "cut":
        os.truncate(states[-1], states[-1].stat().st_size // 2)
    elif harm == "gone":
        states[-1].unlink()
    else:
        value = json.loads(records[-1].read_text())
        value["record"]["step"] = 11
        records[-1].write_text(json.dumps(value))
    found, report, _ = run(folder)
    assert found == expected and "training went on from step 8, where it had been interrupted" in report.notes


def test_other_work_is_not_continued(run, tmp_path, monkeypatch):
    expected, _, _ = run()
    interrupted(run, tmp_path / "work", monkeypatch, config="other")
    found, report, work = run(tmp_path / "work")
    assert found == expected and work.fresh_because == "it was begun with another config"
    assert not any("went on" in note for note in report.notes)


def test_nothing_in_the_folder_is_a_pickle(run, tmp_path, monkeypatch):
    interrupted(run, tmp_path / "work", monkeypatch)
    for path in (tmp_path / "work").iterdir():
        assert path.suffix in (".json", ".safetensors")
        assert path.suffix != ".json" or json.loads(path.read_text())


def test_finished_work_is_not_trained_again(run, tmp_path, monkeypatch):
    expected, report, _ = run(tmp_path / "work")
    monkeypatch.setattr(trainer.QATTrainer, "training_step", lambda *_: pytest.fail("it had all its steps"))
    found, again, _ = run(tmp_path / "work")
    assert found == expected and without_note(again) == without_note(report)


def test_scores_that_json_has_no_word_for(run, tmp_path, monkeypatch):
    """Infinite and undefined scores survive, exactly."""
    values = [5.0, float("nan"), float("inf"), 0.1 + 0.2, 7.0]

    def scores():
        left = iter(values)
        return lambda m: (next(left),)

    expected, report, _ = run(scores=scores())
    seen = scores()
    with monkeypatch.context() as patch:

        def kill():
            raise Killed

        dying_at(patch, 11, kill)
        with pytest.raises(Killed):
            run(tmp_path / "work", scores=seen)
    found, again, _ = run(tmp_path / "work", scores=seen)
    assert found == expected and repr(again.curve) == repr(report.curve) and again.best == (0.1 + 0.2,)


def test_a_fingerprint_is_of_every_bit():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = checkpoint.fingerprint(model)
    assert checkpoint.fingerprint(copy.deepcopy(model)) == before
    with torch.no_grad():
        model[0].weight.view(torch.int32)[0, 0] ^= 1
    changed = checkpoint.fingerprint(model)
    model[1].running_mean += 1
    assert len({before, changed, checkpoint.fingerprint(model)}) == 3


def test_settings_are_json():
    assert json.loads(json.dumps(dataclasses.asdict(Settings(average=0.1))))["average"] == 0.1
