"""`train` as a verb: resumed by the same call, never worse than its start, and what the settings do."""

import copy
import os
import signal
import time

import pytest
import torch

from quantailor import api, progress
from quantailor.errors import UsageError
from quantailor.evaluate.run import evaluate
from quantailor.qat.checkpoint import fingerprint
from quantailor.qat.watch import Watch
from quantailor.verbs.training import train, train_folder
from tests.cli.shell import Process
from tests.formats.making import bytes_of, texts, trained, write_corpus

OPTIONS = {"steps": 9, "batch_size": 4, "evaluations": 3, "checkpoint_every": 2, "learning_rate": 3e-3}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Only a power failure can tell."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_lm):
    return trained(tiny_lm, tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def go(model):
    """go(...) -> (sha256 of the trained weights, the model)."""

    def start(scheme="w4a16-g32", *, data=None, work=None, settings=None, **more):
        made = train(
            model,
            data or texts(20, seed=31),
            scheme=scheme,
            eval_data=texts(6, seed=32),
            settings=api.Settings(**{**OPTIONS, **(settings or {})}),
            context=32,
            samples=8,
            work=work,
            **more,
        )
        return fingerprint(made.model), made

    return start


class Killed(BaseException):
    pass


def killed(monkeypatch, go, step=6, **options):
    with monkeypatch.context() as patch:
        real = Watch.on_pre_optimizer_step

        def dies(self, args, state, control, **more):
            real(self, args, state, control, **more)
            if state.global_step + 1 == step:
                os.kill(os.getpid(), signal.SIGKILL)

        patch.setattr(Watch, "on_pre_optimizer_step", dies)
        pid = os.fork()
        if pid == 0:
            try:
                go(**options)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8-static", "float"])
def test_the_same_call_goes_on_behind_a_kill(go, tmp_path, monkeypatch, scheme):
    expected, _ = go(scheme)
    killed(monkeypatch, go, scheme=scheme, work=tmp_path / "work")
    found, made = go(scheme, work=tmp_path / "work")

    assert found == expected and "training went on from step 4" in " ".join(made.notes)
    assert list(tmp_path.iterdir()) == [], "the work is done and its folder gone"


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"settings": {"seed": 3}}, "settings"),
        ({"settings": {"steps": 8}}, "settings"),
        ({"data": texts(20, seed=77)}, "training data"),
        ({"scheme": "w3a16-g32"}, "start"),
        ({"method": "rtn"}, "start"),
        ({"teacher": None}, "teacher"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_run_is_not_continued_and_that_is_said(go, tmp_path, monkeypatch, other, told):
    killed(monkeypatch, go, work=tmp_path / "work")
    expected, _ = go(**other)
    found, made = go(**other, work=tmp_path / "work")
    (note,) = (note for note in made.notes if "not continued" in note)
    assert found == expected and note.startswith("unfinished work was found and not continued: it was begun with")
    assert told in note


def test_how_often_is_saved_is_no_other_run(go, tmp_path, monkeypatch):
    expected, _ = go()
    killed(monkeypatch, go, work=tmp_path / "work")
    found, made = go(work=tmp_path / "work", settings={"checkpoint_every": 100})
    assert found == expected and any("went on from step" in note for note in made.notes)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "w2a16-g32-balanced"])
def test_a_hundred_times_the_learning_rate_is_not_worse_than_the_start(go, scheme):
    """The whole of it: weights, scales, and what is packed."""
    _, careful = go(scheme, settings={"learning_rate": None})
    _, made = go(scheme, settings={"learning_rate": 100 * careful.training.learning_rate})
    assert made.training.best <= made.training.start == careful.training.start
    scored = evaluate(made.model, api.examples_for(made, texts(6, seed=32), context=32))
    assert scored.nats_per_token == made.training.best[0]


def test_deterministic_is_repeatable_and_undone(go):
    threads = torch.get_num_threads()
    first, again = (go(settings={"deterministic": True})[0] for _ in range(2))
    assert first == again and torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_scales_alone_take_back_most_with_a_fifth_of_the_memory(go):
    """At 3 bits, from plain rounding, so that there is much to take back."""
    options = {"scheme": "w3a16-g32", "method": "rtn"}
    _, full = go(**options, settings={"steps": 60, "batch_size": 8, "learning_rate": None})
    _, scales = go(**options, settings={"steps": 60, "batch_size": 8, "learning_rate": None, "trains": "scales"})
    start = full.training.start[0]
    assert start == scales.training.start[0]
    assert scales.training.best[0] < start and scales.training.optimizer_bytes < full.training.optimizer_bytes / 5


def test_a_setting_without_effect_is_refused(go):
    for settings, told in (
        ({"freeze_ranges": 0.5}, "none is trained here"),
        ({"gradient": "pact"}, "use a scheme with -static"),
        ({"freeze_lower": 0.1}, "of 2 blocks is none"),
    ):
        with pytest.raises(UsageError, match=told):
            go(settings=settings)


def test_a_folder_is_trained_and_saved_and_sound(model, tmp_path, corpus):
    made = train_folder(
        model,
        corpus / "train.txt",
        tmp_path / "out",
        scheme="w4a16-g32",
        context=32,
        samples=8,
        settings=api.Settings(**OPTIONS),
    )
    assert api.check(tmp_path / "out").equal and made.training is not None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, model, corpus, number, status):
    """The step is finished and saved; run again, the folder has the bytes of an undisturbed run."""
    (tmp_path / "results").mkdir()
    fast = ("--data", corpus / "train.txt", "--scheme", "w4a16-g32", "--context", 32, "--samples", 8, "--steps", 300)
    fast += ("--batch-size", 4, "--checkpoint-every", 10)
    out = tmp_path / "results" / "out"
    process = Process(tmp_path, "train", model, *fast, "--out", out)
    end = time.monotonic() + 60
    # Behind the start, whose state is there before signals wait for the end of a step.
    while not any(int(path.stem[6:]) for path in out.parent.glob(".out.work/state-*")):
        assert time.monotonic() < end, process.err
        time.sleep(0.02)
    process.stop(number)
    ran = process.ended()
    assert ran.status == status and "Traceback" not in ran.err, ran.err
    assert "stopping after " in ran.err
    (step, *_) = sorted((int(p.stem[6:]) for p in out.parent.glob(".out.work/state-*")), reverse=True)
    assert step < 300

    again = Process(tmp_path, "train", model, *fast, "--out", out).ended()
    assert again.status == 0 and f"going on behind step {step}\n" in again.err, again.err
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    other = Process(tmp_path, "train", model, *fast, "--out", tmp_path / "other").ended()
    assert other.status == 0
    weights = [name for name in bytes_of(out) if name.endswith(".safetensors")]
    assert weights and all(bytes_of(out)[name] == bytes_of(tmp_path / "other")[name] for name in weights)


def test_a_signal_between_two_steps_waits_for_the_next_and_loses_none(go, tmp_path, monkeypatch):
    begin, told = Watch.on_step_begin, []

    def signalled(self, args, state, control, **rest):
        if state.global_step == 4:
            told.append((progress.stop_with(KeyboardInterrupt()), progress.being_finished()))
        begin(self, args, state, control, **rest)

    monkeypatch.setattr(Watch, "on_step_begin", signalled)
    try:
        with pytest.raises(KeyboardInterrupt):
            go(work=tmp_path / "work")
    finally:
        progress.go_on()
    assert told == [(False, f"step 5 of {OPTIONS['steps']}")]
    assert max(int(path.stem[6:]) for path in (tmp_path / "work").glob("state-*")) == 5


def test_the_given_model_is_left_as_it_was(model):
    loaded = api.load(model)
    before = fingerprint(loaded.model)
    train(loaded, texts(12, seed=3), scheme="w4a16-g32", settings=api.Settings(steps=2, trains="scales"), context=32)
    assert fingerprint(loaded.model) == before == fingerprint(copy.deepcopy(loaded.model))
