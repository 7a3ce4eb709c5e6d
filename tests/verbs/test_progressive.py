"""Progressive schedules: what one stage hands to the next, and that a killed one goes on where it was."""

import os
import signal

import pytest
import torch

from quantailor import api
from quantailor.errors import UsageError
from quantailor.models.prepare import FAKE_QUANT
from quantailor.models.structure import modules_of
from quantailor.qat.checkpoint import fingerprint
from quantailor.qat.stages import Stage
from quantailor.qat.watch import Watch
from quantailor.verbs import progressive
from quantailor.verbs.training import train, train_folder
from tests.formats.making import bytes_of, texts, trained

OPTIONS = {"batch_size": 4, "evaluations": 2, "checkpoint_every": 2, "learning_rate": 3e-3}
STAGES = [Stage(4, steps=5), Stage("w3a16-g32", steps=4, learning_rate=1e-3), Stage(2, steps=5)]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Only a power failure can tell."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_lm):
    return trained(tiny_lm, tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture
def options():
    return {
        "eval_data": texts(6, seed=32),
        "settings": api.Settings(**OPTIONS),
        "context": 32,
        "samples": 8,
        "stages": STAGES,
    }


DATA = texts(20, seed=31)


def test_a_stage_is_a_run_of_its_own_on_the_weights_of_the_one_before(folder, options):
    """Done by hand: train for 4 bits, put the float weights back, train for 3, and so on, with one teacher."""
    made = train(folder, DATA, **options)
    common = {name: value for name, value in options.items() if name not in ("stages", "settings")}
    source = current = api.load(folder)
    for stage in STAGES:
        run = {"steps": stage.steps, "learning_rate": stage.learning_rate or OPTIONS["learning_rate"]}
        settings = api.Settings(**{**OPTIONS, **run})
        by_hand = train(current, DATA, scheme=stage.parsed, teacher=source, settings=settings, **common)
        start = current
        current = api.load(folder)
        weights = dict(by_hand.model.named_parameters())
        with torch.no_grad():
            for name, p in current.model.named_parameters():
                p.copy_(weights[name])
        assert fingerprint(start.model) != fingerprint(current.model), "it learned something"

    assert fingerprint(made.model) == fingerprint(by_hand.model)
    assert {m.weight_quantizer.spec.grid.bits for _, m in modules_of(made.model, FAKE_QUANT)} == {2}
    reports = made.details["stages"]
    assert [r["scheme"] for r in reports] == ["w4a16-g32", "w3a16-g32", "w2a16-g32"]
    assert [r["steps"] for r in reports] == [5, 4, 5] and [r["learning_rate"] for r in reports] == [3e-3, 1e-3, 3e-3]
    assert reports[-1]["best"] == [repr(v) for v in made.training.best]
    assert all(float(r["best"][0]) <= float(r["start"][0]) for r in reports)


def killed(go, stage, step):
    """`go` in a child that dies of SIGKILL in this step of this stage."""
    pid = os.fork()
    if pid == 0:
        try:
            patch = pytest.MonkeyPatch()
            begun = [0]
            real_one, real_step = progressive._report, Watch.on_pre_optimizer_step

            def counted(*args):
                begun[0] += 1
                return real_one(*args)

            def dies(self, args, state, control, **more):
                real_step(self, args, state, control, **more)
                if begun[0] + 1 == stage and state.global_step + 1 == step:
                    os.kill(os.getpid(), signal.SIGKILL)

            patch.setattr(progressive, "_report", counted)
            patch.setattr(Watch, "on_pre_optimizer_step", dies)
            go()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_in_the_second_stage_it_goes_on_there_to_the_same_bytes(folder, options, tmp_path, monkeypatch):
    train_folder(folder, DATA, tmp_path / "whole", **options)
    out = tmp_path / "out"
    assert killed(lambda: train_folder(folder, DATA, out, **options), 2, 4) == -signal.SIGKILL
    (work,) = (path for path in tmp_path.iterdir() if path.name == ".out.work")
    assert (work / "state-stage-1.safetensors").exists() and (work / "stage-2").is_dir()
    assert not out.exists() and not (work / "stage-1").exists()

    trained_again = []
    real = progressive._report
    monkeypatch.setattr(progressive, "_report", lambda *args: trained_again.append(args[0]) or real(*args))
    made = train_folder(folder, DATA, out, **options)

    assert trained_again == STAGES[1:], "the first stage is not trained again"
    (note,) = (n for n in made.notes if "training went on from step 2" in n)
    assert note.startswith("stage 2, w3a16-g32: ")
    names = {name for name in bytes_of(out) if name.endswith(".safetensors") or name == "config.json"}
    whole, again = bytes_of(tmp_path / "whole"), bytes_of(out)
    assert len(names) >= 2 and {n: whole[n] for n in names} == {n: again[n] for n in names}
    assert not work.exists() and api.check(out).equal


def test_killed_at_the_first_step_of_all_nothing_is_kept(folder, options, tmp_path):
    out = tmp_path / "out"
    assert killed(lambda: train_folder(folder, DATA, out, **options), 1, 1) == -signal.SIGKILL
    assert train_folder(folder, DATA, out, **options).details["stages"][0]["steps"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_other_stages_are_other_work(folder, options, tmp_path):
    out = tmp_path / "out"
    assert killed(lambda: train_folder(folder, DATA, out, **options), 2, 1) == -signal.SIGKILL
    other = {**options, "stages": [Stage(4, steps=4), 2]}
    made = train_folder(folder, DATA, out, **{**other, "settings": api.Settings(**{**OPTIONS, "steps": 3})})
    assert [r["steps"] for r in made.details["stages"]] == [4, 3] and not any("went on" in n for n in made.notes)


def test_mistakes(folder, options):
    with pytest.raises(UsageError, match="stages name their schemes; leave the scheme w4a16-g32 out"):
        train(folder, DATA, scheme="w4a16-g32", **options)
    with pytest.raises(UsageError, match="gradient='bitnetz' is not known"):
        train(folder, DATA, **{**options, "stages": ["4", "1.58:bitnetz"]})
    quantized = api.quantize(folder, "w8a16")
    with pytest.raises(UsageError, match="quantized already"):
        train(quantized, DATA, **options)


def test_conv1d_weights_go_back_turned(tmp_path):
    """GPT-2 keeps [N, O]; its twin [O, N]: square ones would not show by their shape."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=303, n_positions=64)
    source = api.Model(GPT2LMHeadModel(config), None, "lm")
    twin = api.quantize(source, "w4a16-g32")
    weights = progressive.float_weights(twin, source)
    back = progressive.with_weights(source, weights).model
    for name, p in source.model.named_parameters():
        assert torch.equal(p, dict(back.named_parameters())[name]), name


@pytest.mark.parametrize("more", [{"stages": [4, 2]}, {"from_scratch": True, "scheme": "w4a16"}])
def test_an_adapter_has_no_stages(folder, more):
    with pytest.raises(UsageError, match=r"an adapter trains on weights that stay, and (stages|from_scratch) is about"):
        train(folder, DATA, lora=2, **more)
