"""QAT end to end: never worse than its start, whatever happens on the way."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from quantailor.errors import QuantailorError
from quantailor.evaluate.run import evaluate
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.progress import Progress
from quantailor.qat import distill as distill_module
from quantailor.qat import train as train_module
from quantailor.qat.best import Best
from quantailor.qat.distill import Distiller
from quantailor.qat.losses import kl_to_teacher, scored, task_loss
from quantailor.qat.settings import Settings, resolved
from quantailor.qat.train import _arguments, train, weight_bits
from quantailor.qat.trainer import QATTrainer
from quantailor.qat.watch import Watch

TASK_ONLY = {"kl_weight": 0.0, "task_weight": 1.0}


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def falling():
    """A score that falls with each look, so that the last iterate is the best."""
    scores = iter(range(100, 0, -1))
    return lambda model: (float(next(scores)),)


def test_accumulated_batches_are_one_batch(lm, train_data):
    """Two halves a step move the weights as the whole does."""
    ends = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        model = copy.deepcopy(lm.model)
        settings = Settings(steps=3, batch_size=batch_size, accumulate=accumulate, learning_rate=1e-3, **TASK_ONLY)
        train(model, train_data, falling(), settings)
        ends.append(parameters(model))
    start = parameters(lm.model)
    for name, whole in ends[0].items():
        torch.testing.assert_close(whole - start[name], ends[1][name] - start[name], rtol=2e-2, atol=2e-5)


@pytest.fixture
def run(lm, simulated_at, train_data, held_out):
    """run(scheme, ...) -> (trained model, report, start): QAT of a copy, steered by nats per token."""

    def start(scheme="w1.58a8", *, validate=None, progress=None, teacher=lm.model, **settings):
        model = copy.deepcopy(simulated_at(scheme).model)
        before = parameters(model)
        validate = validate or (lambda m: (evaluate(m, held_out).nats_per_token,))
        options = {"steps": 6, "batch_size": 4, "evaluations": 2, **settings}
        report = train(model, train_data, validate, Settings(**options), teacher=teacher, progress=progress)
        return model, report, before

    return start


# ------------------------------------------------------------------------------------------------ never worse


@pytest.mark.parametrize("scheme", ["w8a8", "w2a16-g32", "w1.58a8", "nf4", "w8a8-static"])
def test_a_careless_learning_rate_never_makes_it_worse(run, held_out, simulated_at, scheme):
    model, report, before = run(scheme, learning_rate=0.5, scale_learning_rate=0.5)
    start = evaluate(simulated_at(scheme).model, held_out).nats_per_token

    assert report.start == (start,) and report.best <= report.start
    assert evaluate(model, held_out).nats_per_token == report.best[0] <= start
    if not report.improved:
        assert same(parameters(model), before) and "the start was kept" in report.notes[-1]


def test_where_nothing_better_is_found_the_start_comes_back_bit_for_bit(run):
    model, report, before = run("w8a8", learning_rate=0.5, scale_learning_rate=0.5)

    assert report.best_step == 0 and not report.improved and same(parameters(model), before)
    assert report.notes == ["6 steps found nothing better than the start: the start was kept"]
    assert not model.training


def test_qat_takes_back_most_of_what_few_bits_cost(run, held_out, lm, simulated_at):
    model, report, _ = run("w1.58a8", steps=40, batch_size=8, learning_rate=2e-3)
    floating = evaluate(lm.model, held_out).nats_per_token
    lost = evaluate(simulated_at("w1.58a8").model, held_out).nats_per_token - floating

    assert report.improved and report.best[0] - floating < 0.5 * lost
    assert evaluate(model, held_out).nats_per_token == report.best[0]


def test_the_best_of_the_way_is_what_remains(run):
    """Scores that fall and rise again: the model ends where they were lowest."""
    scores = iter([5.0, 3.0, 1.0, 2.0, 4.0, 6.0, 7.0])
    seen = []

    def validate(model):
        seen.append(parameters(model))
        return (next(scores),)

    model, report, before = run(validate=validate, evaluations=6, learning_rate=1e-2)

    assert report.best_step == 2 and report.best == (1.0,)
    assert same(seen[0], before) and same(parameters(model), seen[2]) and not same(seen[2], seen[3])
    assert report.curve == [(step, (score,)) for step, score in enumerate([5.0, 3.0, 1.0, 2.0, 4.0, 6.0, 7.0])]


@pytest.mark.parametrize(
    ("steps", "evaluations", "looks"), [(8, 4, [0, 2, 4, 6, 8]), (5, 2, [0, 2, 4, 5]), (3, 9, [0, 1, 2, 3])]
)
def test_looks_are_spread_and_the_last_step_is_always_looked_at(run, steps, evaluations, looks):
    _, report, _ = run(validate=lambda m: (1.0,), steps=steps, evaluations=evaluations)
    assert [step for step, _ in report.curve] == looks


# ------------------------------------------------------------------------------------------------ the same again


def test_the_same_seed_gives_identical_weights(run):
    first, again, other = (run(seed=seed, validate=falling())[0] for seed in (3, 3, 4))

    assert same(parameters(first), parameters(again)) and not same(parameters(first), parameters(other))


def test_nothing_is_printed_and_nothing_is_left(run, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run()
    assert capfd.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_progress_hears_of_each_step(run):
    seen = []

    class Hearing(Progress):
        @contextmanager
        def task(self, title, total):
            seen.append((title, total))
            yield seen.append

    run(progress=Hearing())
    assert seen == [("training", 6), 1, 1, 1, 1, 1, 1]


def test_the_teacher_is_left_as_it_was(run, lm):
    before = parameters(lm.model)
    run()
    assert same(parameters(lm.model), before) and all(p.requires_grad for p in lm.model.parameters())
    assert all(p.grad is None for p in lm.model.parameters())


# ------------------------------------------------------------------------------------------------ gradients gone wrong


@pytest.fixture
def broken_at(monkeypatch):
    """broken_at(steps) makes the loss of these steps (from 1) NaN."""

    def breaking(steps, value=math.nan):
        count = [0]

        def loss(*args):
            count[0] += 1
            return kl_to_teacher(*args) * (value if count[0] in steps else 1.0)

        monkeypatch.setattr(distill_module, "kl_to_teacher", loss)

    return breaking


@pytest.fixture
def rates(monkeypatch):
    """The learning rates of every step, as the optimizer saw them."""
    seen: list[list[float]] = []
    real = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        seen.append([group["lr"] for group in self.param_groups])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return seen


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_steps_without_a_finite_gradient_are_skipped(run, broken_at, value):
    broken_at({2, 4, 5}, value)
    model, report, _ = run(learning_rate=1e-3)

    assert "3 steps skipped: their gradient was not finite" in report.notes
    assert not any("diverged" in note for note in report.notes)
    assert all(torch.isfinite(p).all() for p in model.parameters()) and report.best <= report.start


def test_after_three_in_a_row_it_goes_back_to_its_best_at_half_the_rate(run, broken_at, rates, monkeypatch):
    _, _, before = run(steps=9, learning_rate=1e-2, validate=lambda m: (1.0,))
    undisturbed = list(rates)
    rates.clear()
    restored = []
    real = Best.restore
    monkeypatch.setattr(Best, "restore", lambda self: (real(self), restored.append(parameters(self.model)))[0])
    broken_at({3, 4, 5})
    model, report, _ = run(steps=9, learning_rate=1e-2, validate=lambda m: (1.0,))

    assert "training diverged once; it went on from its best iterate at half the learning rate" in report.notes
    assert len(restored) == 2 and same(restored[0], before)
    assert rates[:4] == undisturbed[:4]
    for after, usual in zip(rates[5:], undisturbed[5:]):
        assert after == pytest.approx([0.5 * rate for rate in usual]), "and the schedule does not forget it"
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_second_divergence_ends_it(run, broken_at):
    broken_at({1, 2, 3, 6, 7, 8})
    with pytest.raises(QuantailorError, match=r"training diverged twice .*lower --learning-rate") as error:
        run(steps=10)
    assert error.value.exit_code == 1


def test_a_good_step_in_between_clears_the_count(run, broken_at):
    broken_at({1, 2, 4, 5, 7, 8})
    _, report, _ = run(steps=9)
    assert "6 steps skipped: their gradient was not finite" in report.notes
    assert not any("diverged" in note for note in report.notes)


def test_weights_stay_finite_where_every_gradient_is_huge(run, broken_at):
    broken_at(set(range(1, 7)), 1e30)
    model, report, _ = run(learning_rate=0.5)
    assert all(torch.isfinite(p).all() for p in model.parameters()) and report.best <= report.start


# ------------------------------------------------------------------------------------------------ the optimizer


def made(model, examples, teacher=None, folder="unused", **settings):
    options = resolved(Settings(**{"steps": 2, "batch_size": 4, **settings}), weight_bits(model))
    return QATTrainer(
        model,
        _arguments(str(folder), options, 1e-3),
        task=examples.task,
        distiller=None if teacher is None else Distiller(teacher, options, examples.task),
        settings=options,
        rates=(1e-3, 5e-4),
        train_dataset=examples.dataset,
        data_collator=examples.collator,
    )


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8-static", "w8a8"])
def test_log_scales_are_in_a_group_of_their_own_without_decay(simulated_at, train_data, tmp_path, scheme):
    model = copy.deepcopy(simulated_at(scheme).model)
    groups = made(model, train_data, weight_decay=0.1, folder=tmp_path).create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, vectors, scales, *ranges = ([names[id(p)] for p in group["params"]] for group in groups)

    assert [group["kind"] for group in groups] == ["matrices", "vectors", "scales", "ranges"][: len(groups)]
    assert all(name.endswith("weight_quantizer.log_scale") for name in scales) and len(scales) == 14
    assert len(groups) == (4 if scheme.endswith("static") else 3)
    if ranges:
        assert all(name.endswith("input_quantizer.log_scale") for name in ranges[0]) and len(ranges[0]) == 14
        scales += ranges[0]
    assert not any(name.endswith("log_scale") for name in matrices + vectors)
    assert sorted(matrices + vectors + scales) == sorted(names.values()), "every parameter once"
    assert all("norm" in name or name.endswith("bias") for name in vectors)
    assert [group["lr"] for group in groups] == [1e-3, 1e-3, 5e-4, 5e-4][: len(groups)]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0, 0.0][: len(groups)]


def test_nf4_has_no_scale_to_learn(simulated_at, train_data, tmp_path):
    groups = made(copy.deepcopy(simulated_at("nf4").model), train_data, folder=tmp_path).create_optimizer().param_groups
    assert groups[2]["params"] == []


@pytest.mark.parametrize(("rate", "least", "most"), [(1e-9, 0.0, 1e-7), (1e-2, 1e-3, 0.1)])
def test_scales_move_at_their_own_rate(run, rate, least, most):
    model, _, before = run("w2a16-g32", validate=falling(), scale_learning_rate=rate)
    moved = [
        float((p.detach() - before[n]).abs().max()) for n, p in model.named_parameters() if n.endswith("log_scale")
    ]

    assert len(moved) == 14 and all(least <= distance <= most for distance in moved)


def test_a_layer_that_was_never_calibrated_is_noted(lm, train_data):
    from quantailor.models.prepare import prepare
    from quantailor.recipe import Recipe
    from quantailor.spec import Scheme

    model = copy.deepcopy(lm.model)
    prepare(model, Recipe(Scheme.parse("w8a8-static")))
    report = train(model, train_data, lambda m: (1.0,), Settings(steps=1, batch_size=2), teacher=lm.model)
    assert "14 layers have a static input scale that was never calibrated" in report.notes[0]


def test_weight_bits_are_the_lowest_there_are(lm, simulated_at):
    assert weight_bits(lm.model) == 0
    assert [weight_bits(simulated_at(s).model) for s in ("w8a8", "w2a16-g32", "w1.58a8", "nf4")] == [8, 2, 2, 4]
    assert sum(isinstance(m, WeightQuantizer) for m in simulated_at("w8a8").model.modules()) == 14


# ------------------------------------------------------------------------------------------------ the loss of a batch


def test_the_loss_of_a_batch_is_the_kl_over_scored_positions_only(lm, simulated_at, train_data, tmp_path):
    student = copy.deepcopy(simulated_at("w2a16-g32").model).eval()
    trainer = made(student, train_data, teacher=lm.model, folder=tmp_path)
    ids = torch.randint(3, 200, (3, 10))
    labels = ids.clone()
    labels[0, :6] = -100  # a prompt
    labels[1, 7:] = -100  # padding
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        found = trainer.compute_loss(student, dict(batch))
        logits = [m(input_ids=ids, attention_mask=mask).logits for m in (student, lm.model)]
    pairs = [
        kl_to_teacher(*(part[row, column][None] for part in logits))
        for row in range(3)
        for column in range(9)
        if labels[row, column + 1] != -100
    ]

    assert len(pairs) == 4 + 6 + 9
    assert found.item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)

    changed = ids.clone()
    changed[1, 7:] = 5  # what stands in the padding does not matter
    with torch.no_grad():
        again = trainer.compute_loss(student, {**batch, "input_ids": changed})
    assert again.item() == pytest.approx(found.item(), rel=1e-5)


def test_losses_are_mixed_by_their_weights(lm, simulated_at, train_data, tmp_path):
    student = copy.deepcopy(simulated_at("w2a16-g32").model).eval()
    batch = next(iter(train_data.batches(4)))
    with torch.no_grad():
        logits, targets = scored(
            student(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"], "lm"
        )
        parts = {}
        for kl, task in ((1.0, 0.0), (0.0, 1.0), (0.3, 2.0)):
            trainer = made(student, train_data, teacher=lm.model, folder=tmp_path, kl_weight=kl, task_weight=task)
            parts[kl, task] = trainer.compute_loss(student, dict(batch)).item()

    assert parts[0.0, 1.0] == pytest.approx(task_loss(logits, targets).item(), rel=1e-5)
    assert parts[0.3, 2.0] == pytest.approx(0.3 * parts[1.0, 0.0] + 2.0 * parts[0.0, 1.0], rel=1e-5)


@pytest.mark.parametrize("task", ["lm", "classification"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(
    monkeypatch, request, lm, classifier, train_data, rows, task
):
    model, examples = (lm, train_data) if task == "lm" else (classifier, rows)
    monkeypatch.setattr(torch.utils.data.RandomSampler, "__iter__", lambda self: iter(range(len(self.data_source))))
    gradients = []

    def keep(self, *args, **kwargs):
        gradients.append({n: p.grad.clone() for n, p in twin.named_parameters() if p.grad is not None})

    monkeypatch.setattr(torch.optim.AdamW, "step", keep)
    for batch_size, accumulate in ((8, 1), (2, 4)):
        twin = copy.deepcopy(model.model)
        for module in twin.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        settings = Settings(steps=1, batch_size=batch_size, accumulate=accumulate, max_grad_norm=1e9, **TASK_ONLY)
        train(twin, examples, lambda m: (1.0,), settings)

    whole, parts = gradients
    largest = max(float(g.abs().max()) for g in whole.values())
    assert whole.keys() == parts.keys()
    assert all(torch.allclose(whole[n], parts[n], rtol=1e-3, atol=1e-5 * largest) for n in whole)


# ------------------------------------------------------------------------------------------------ what the settings do


def test_static_ranges_stop_where_they_are_told_to(run, monkeypatch):
    """After half of the run scales of inputs stay, those of weights go on."""
    seen = []
    real = Watch.on_step_end

    def keep(self, args, state, control, model=None, **more):
        seen.append(parameters(model))
        real(self, args, state, control, model=model, **more)

    monkeypatch.setattr(Watch, "on_step_end", keep)
    _, _, before = run("w8a8-static", freeze_ranges=0.5, steps=8, warmup=0.0, validate=falling())
    inputs = [n for n in before if n.endswith("input_quantizer.log_scale")]
    weights = [n for n in before if n.endswith("weight_quantizer.log_scale")]
    assert len(inputs) == 14
    for step, (earlier, later) in enumerate(zip([before, *seen], seen)):
        moved = [n for n in inputs if not torch.equal(earlier[n], later[n])]
        assert len(moved) > 10 if step < 4 else not moved, step
        assert any(not torch.equal(earlier[n], later[n]) for n in weights)


def test_ranges_can_stay_from_the_start(run):
    model, _, before = run("w8a8-static", freeze_ranges=0.0, validate=falling())
    after = parameters(model)
    assert all(torch.equal(after[n], before[n]) for n in before if n.endswith("input_quantizer.log_scale"))


def test_frozen_blocks_do_not_move_and_train_again_later(run):
    model, report, before = run(freeze_lower=0.5, validate=falling())
    after = parameters(model)
    moved = {n for n in before if not torch.equal(after[n], before[n])}
    assert moved and not any(".layers.0." in n or "embed" in n for n in moved)
    assert all(p.requires_grad for p in model.parameters())
    assert report.trainable == sum(v.numel() for n, v in before.items() if ".layers.0." not in n and "embed" not in n)


def test_gradient_checkpointing_changes_no_bit(run):
    plain, saving = (run(gradient_checkpointing=on, validate=falling())[0] for on in (False, True))
    assert same(parameters(plain), parameters(saving))


def test_mixed_precision_is_near_and_leaves_float32(run):
    _, full, _ = run(steps=12, learning_rate=2e-3)
    model, mixed, _ = run(steps=12, learning_rate=2e-3, precision="bfloat16")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert mixed.losses != full.losses
    for (_, one), (_, other) in zip(full.losses, mixed.losses):
        assert other == pytest.approx(one, rel=0.1)


def test_the_average_is_that_of_the_iterates(run, monkeypatch):
    """Weights averaged by hand, each step's with its share; offered at the look, and not trained on."""
    seen = []
    real = Watch.on_step_end

    def keep(self, args, state, control, model=None, **more):
        seen.append(parameters(model))
        real(self, args, state, control, model=model, **more)

    monkeypatch.setattr(Watch, "on_step_end", keep)
    offered = []

    def validate(model):
        offered.append(parameters(model))
        return (float(-len(offered)),)

    plain, _, before = run(steps=6, evaluations=1, validate=falling())
    model, report, _ = run(steps=6, evaluations=1, average=0.5, validate=validate)
    expected = dict(before)
    for step, iterate in enumerate(seen[6:], start=1):
        memory = min(1 - 1 / 3, step / (step + 9))
        expected = {n: memory * value + (1 - memory) * iterate[n] for n, value in expected.items()}
    start, last, averaged = offered
    assert same(start, before) and same(last, parameters(plain)) and same(parameters(model), averaged)
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value)
    assert report.curve[-1] == (6, (-3.0,))


def test_losses_of_training_are_told(run, lm, train_data):
    _, report, _ = run(steps=6, evaluations=3, learning_rate=1e-9, scale_learning_rate=1e-9, average=0.0)
    assert [step for step, _ in report.losses] == [2, 4, 6] and all(loss > 0 for _, loss in report.losses)


def test_optimizer_bytes_are_two_moments_and_a_count(run):
    _, report, before = run()
    assert report.optimizer_bytes == sum(8 * p.numel() + 4 for p in before.values())


@pytest.mark.parametrize(("asked", "fast", "expected"), [
    ("auto", True, True), ("auto", False, False), ("bfloat16", False, True), ("float32", True, False),
])  # fmt: skip
def test_integer_layers_multiply_gradients_in_what_was_asked_for(asked, fast, expected, monkeypatch):
    monkeypatch.setattr(train_module.native, "multiplies_bf16", lambda device: fast)
    found = train_module._backward(Settings(backward=asked), torch.device("cpu"))
    assert (found == torch.bfloat16) == expected
