"""Two processes under DDP and FSDP2 train as one does."""

import copy

import pytest
import torch

from quantailor import api
from quantailor.errors import UsageError
from quantailor.evaluate.run import evaluate
from quantailor.qat import checkpoint, distributed
from quantailor.qat.settings import Settings
from quantailor.qat.train import train
from quantailor.qat.watch import Watch
from quantailor.store.work import Work
from tests.formats.making import bytes_of, texts
from tests.processes import in_processes

OPTIONS = {"steps": 10, "batch_size": 8, "evaluations": 5, "learning_rate": 2e-3}


@pytest.fixture
def run(lm, simulated_at, train_data, held_out):
    """run(scheme, ...) -> (fingerprint, report, parameters) of a copy trained on."""

    def go(scheme="w4a16-g32", work=None, saves=None, **settings):
        model = copy.deepcopy(simulated_at(scheme).model)
        score = lambda m: (evaluate(m, held_out).nats_per_token,)  # noqa: E731
        options = Settings(**{**OPTIONS, **settings})
        report = train(model, train_data, score, options, teacher=lm.model, work=work, saves=saves)
        return checkpoint.fingerprint(model), report, {n: p.detach() for n, p in model.named_parameters()}

    return go


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("scheme", "more"),
    [
        ("w4a16-g32", {}),
        ("w8a8-static", {"accumulate": 2, "average": 0.3}),
        ("w4a16-g32", {"trains": "scales", "learning_rate": 1e-2, "scale_learning_rate": 1e-2}),
    ],
    ids=["w4", "static-accumulated", "scales"],
)
def test_two_processes_follow_the_curve_of_one(tmp_path, run, parallel, scheme, more):
    """The losses of training and of evaluation, step by step, and the weights at the end."""
    _, alone, weights = run(scheme, **more)
    found = in_processes(tmp_path, lambda _: run(scheme, parallel=parallel, **more))

    prints = {fingerprint for fingerprint, _, _ in found}
    assert len(prints) == 1, "both end with the same bits"
    moved = max(float((weights[n] - w).abs().max()) for n, w in found[0][2].items())
    for _, report, _ in found:
        assert [step for step, _ in report.losses] == [step for step, _ in alone.losses] == [2, 4, 6, 8, 10]
        for (_, one), (_, both) in zip(alone.losses, report.losses):
            assert both == pytest.approx(one, rel=2e-2)
        for (_, (one,)), (_, (both,)) in zip(alone.curve, report.curve):
            assert both == pytest.approx(one, abs=2e-3)
    assert alone.curve[-1] != alone.curve[0], "something was trained"
    assert moved < 5e-3
    if parallel == "fsdp2" and not more:  # each process holds about half of the optimizer's state
        assert found[0][1].optimizer_bytes < 0.6 * alone.optimizer_bytes


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_killed_together_and_begun_again(tmp_path, run, parallel):
    """Two processes that die at a step and are started again end where they would have ended."""
    options = {"parallel": parallel, "checkpoint_every": 2, "average": 0.3, "accumulate": 2}

    def training(rank):
        work = Work(tmp_path / "work", {}, states=checkpoint.KEPT) if rank == 0 else None
        return run(work=work, saves=True, **options)

    def killed(rank):
        class Killed(BaseException):
            pass

        real = Watch.on_pre_optimizer_step

        def dies(self, args, state, control, **more):
            real(self, args, state, control, **more)
            if state.global_step == 6:
                raise Killed

        Watch.on_pre_optimizer_step = dies
        with pytest.raises(Killed):
            training(rank)

    for name in ("undisturbed", "killed", "again"):
        (tmp_path / name).mkdir()
    expected = in_processes(tmp_path / "undisturbed", lambda _: run(**options))
    in_processes(tmp_path / "killed", killed)
    found = in_processes(tmp_path / "again", training)

    assert {f for f, _, _ in found} == {f for f, _, _ in expected}
    assert any("went on from step 6" in note for note in found[0][1].notes)


def test_a_folder_by_two_processes(tmp_path, tiny_lm):
    """The first writes; the folder is sound, and nothing else is left."""
    from quantailor.verbs.training import train_folder

    options = {"scheme": "w4a16-g32", "context": 32, "samples": 8, "settings": Settings(**OPTIONS)}

    def work(_):
        train_folder(tiny_lm, texts(12, seed=5), tmp_path / "out", **options)

    in_processes(tmp_path, work)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out"]
    assert api.check(tmp_path / "out").equal and len(bytes_of(tmp_path / "out")) > 3


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"batch_size": 3}, "batch_size=3 is shared by 2 processes"),
        ({"parallel": "fsdp2", "cage": 1.0}, "look at whole weights"),
        ({"parallel": "fsdp2", "optimizer": "adamw-8bit"}, "does not know sharded weights"),
    ],
)
def test_what_several_processes_cannot_do(tmp_path, run, settings, told):
    def work(_):
        with pytest.raises(UsageError, match=told):
            run(**settings)

    in_processes(tmp_path, work)


def test_one_process_does_not_share_a_model(run):
    with pytest.raises(UsageError, match="this is one; start it by torchrun"):
        run(parallel="fsdp2")


def test_alone_nothing_is_asked_of_others():
    assert (distributed.world(), distributed.rank(), distributed.from_rank("x")) == (1, 0, "x")
    assert distributed.from_all("x") == ["x"]
    assert distributed.anywhere(True, torch.device("cpu")) and not distributed.anywhere(False, torch.device("cpu"))
    assert distributed.mean(torch.tensor(3.0)) == 3
