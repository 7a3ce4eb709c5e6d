"""Distillation beyond the logits' KL, against its formulas written the slow way, and in whole runs."""

import copy
import math

import pytest
import torch

from quantailor.errors import UsageError
from quantailor.evaluate.run import evaluate
from quantailor.models.attention import keeping_scores
from quantailor.qat.distill import Distiller, measure_gamma
from quantailor.qat.losses import cakld, hidden_loss, jsd, kl_to_teacher, score_loss, scored
from quantailor.qat.settings import Settings
from quantailor.qat.train import train


def softmax(logits, temperature=1.0):
    e = [math.exp(v / temperature) for v in logits]
    return [v / sum(e) for v in e]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cakld_is_its_formula(gamma, temperature):
    """BitDistiller, Eq. 6: gamma KL(S || T) + (1 - gamma) KL(T || S)."""
    student, teacher = torch.randn(5, 7) * 2, torch.randn(5, 7) * 2
    total = 0.0
    for s, t in zip(student.double().tolist(), teacher.double().tolist()):
        p_s, p_t = softmax(s, temperature), softmax(t, temperature)
        total += gamma * kl(p_s, p_t) + (1 - gamma) * kl(p_t, p_s)
    found = cakld(student, teacher, gamma, temperature)
    assert found.item() == pytest.approx(total / 5 * temperature**2, rel=1e-5)
    assert cakld(student, teacher, 0.0).item() == pytest.approx(kl_to_teacher(student, teacher).item(), rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_its_formula(beta):
    student, teacher = (torch.randn(4, 6) * 2).requires_grad_(), torch.randn(4, 6) * 2
    total = 0.0
    for s, t in zip(student.double().tolist(), teacher.double().tolist()):
        p_s, p_t = softmax(s), softmax(t)
        mixed = [beta * a + (1 - beta) * b for a, b in zip(p_t, p_s)]
        total += beta * kl(p_t, mixed) + (1 - beta) * kl(p_s, mixed)
    found = jsd(student, teacher, beta)
    assert found.item() == pytest.approx(total / 4, rel=1e-5)
    assert jsd(teacher, student, 1 - beta).item() == pytest.approx(found.item(), rel=1e-5), "symmetric, roles turned"
    assert jsd(teacher, teacher, beta).item() == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(found, student)
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(jsd(torch.tensor([[300.0, 0.0]]), torch.tensor([[0.0, 300.0]])))


def test_hidden_states_and_scores_are_their_formulas():
    """TernaryBERT, Eq. 9: a sum over layers of mean squared differences; here where there is a token."""
    student, teacher = ([torch.randn(2, 4, 3) for _ in range(3)] for _ in range(2))
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    expected = sum(
        sum((s[b, i, d] - t[b, i, d]).item() ** 2 for b in range(2) for i in range(4) if real[b, i] for d in range(3))
        / (6 * 3)
        for s, t in zip(student, teacher)
    )
    assert hidden_loss(student, teacher, real).item() == pytest.approx(expected, rel=1e-5)

    mine, theirs = ([torch.randn(2, 5, 4, 4) for _ in range(2)] for _ in range(2))
    seen = [real[:, None, None, :].expand(2, 1, 4, 4) for _ in range(2)]
    expected = sum(
        sum(
            (a[b, h, i, j] - t[b, h, i, j]).item() ** 2
            for b in range(2) for h in range(5) for i in range(4) for j in range(4) if real[b, j]
        ) / (5 * 4 * 6)
        for a, t in zip(mine, theirs)
    )  # fmt: skip
    assert score_loss(mine, theirs, seen).item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_gamma_is_the_teacher_s_mean_probability_of_the_label(lm, train_data, classifier, rows):
    """Eq. 7: a mean over a row's tokens, then over rows."""
    expected = []
    for batch in train_data.batches(4, limit=6):
        labels = batch["labels"]
        chances = lm.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.softmax(-1)
        for p, target in zip(chances, labels):
            mine = [p[i, target[i + 1]].item() for i in range(len(target) - 1) if target[i + 1] != -100]
            expected.append(sum(mine) / len(mine))
    found = measure_gamma(lm.model, train_data.batches(4, limit=6), "lm")
    assert found == pytest.approx(sum(expected) / 6, rel=1e-5) and 0.1 < found < 1

    chances = []
    for batch in rows.batches(5, limit=10):
        labels = batch.pop("labels")
        chances += [p[y].item() for p, y in zip(classifier.model(**batch).logits.softmax(-1), labels)]
    assert measure_gamma(classifier.model, rows.batches(5, limit=10), "classification") == pytest.approx(
        sum(chances) / 10, rel=1e-5
    )


@pytest.mark.parametrize("task", ["lm", "classification"])
def test_the_loss_is_the_weighted_sum_of_its_parts(lm, classifier, train_data, rows, simulated_at, task):
    teacher, data = (lm.model, train_data) if task == "lm" else (classifier.model, rows)
    student = simulated_at("w2a16-g32", task).model.eval()
    settings = Settings(kl_weight=0.5, hidden_weight=2.0, attention_weight=3.0, temperature=2.0)
    distiller = Distiller(teacher.eval(), settings, task)
    inputs = dict(next(iter(data.batches(3))))
    labels = inputs.pop("labels")
    with distiller.watching(student) as kept:
        outputs = student(**inputs, **distiller.extra)
    logits = scored(outputs.logits, labels, task)[0]
    found = distiller.loss(inputs, labels, logits, outputs, kept)

    with torch.no_grad():
        with keeping_scores(teacher) as theirs:
            taught = teacher(**inputs, output_hidden_states=True)
        real = inputs["attention_mask"].bool()
        expected = 0.5 * kl_to_teacher(logits, scored(taught.logits, labels, task)[0], 2.0)
        expected += 2.0 * hidden_loss(outputs.hidden_states, taught.hidden_states, real)
        expected += 3.0 * score_loss(kept.scores, theirs.scores, kept.seen)
    assert len(outputs.hidden_states) == 3 and len(kept.scores) == 2
    torch.testing.assert_close(found.detach(), expected)
    found.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    student.zero_grad()


@pytest.mark.parametrize(
    "options",
    [{"divergence": "cakld"}, {"divergence": "jsd"}, {"hidden_weight": 1.0, "attention_weight": 1.0}],
    ids=lambda o: "-".join(o),
)
def test_a_run_gains_by_it(lm, simulated_at, train_data, held_out, options):
    model = copy.deepcopy(simulated_at("w1.58a8").model)
    score = lambda m: (evaluate(m, held_out).nats_per_token,)  # noqa: E731
    settings = Settings(steps=8, batch_size=8, evaluations=2, learning_rate=2e-3, **options)
    before = lm.model.config._attn_implementation
    report = train(model, train_data, score, settings, teacher=lm.model)
    assert report.improved and model.config._attn_implementation == before == lm.model.config._attn_implementation
    assert any("CAKLD: gamma = 0." in note for note in report.notes) == (options.get("divergence") == "cakld")


def test_a_teacher_of_another_shape_is_refused_by_name(lm, simulated_at, train_data):
    other = copy.deepcopy(lm.model)
    other.model.layers = other.model.layers[:1]
    model = copy.deepcopy(simulated_at("w2a16-g32").model)
    settings = Settings(steps=1, batch_size=4, hidden_weight=1.0)
    with pytest.raises(UsageError, match=r"the student has 3 hidden states of shape .* the teacher 2 of"):
        train(model, train_data, lambda m: (1.0,), settings, teacher=other)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"hidden_weight": 1.0}, "hidden_weight compares with a teacher, and there is none"),
        ({"attention_weight": 1.0}, "attention_weight compares with a teacher"),
        ({"divergence": "jsd"}, "divergence='jsd' is to a teacher"),
    ],
)
def test_without_a_teacher_there_is_nothing_to_distill(simulated_at, train_data, settings, told):
    model = copy.deepcopy(simulated_at("w2a16-g32").model)
    with pytest.raises(UsageError, match=told):
        train(model, train_data, lambda m: (1.0,), Settings(steps=1, task_weight=1.0, **settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"divergence": "js"}, "divergence='js' is not known; use kl or cakld or jsd"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"hidden_weight": -1.0}, "hidden_weight=-1.0 must be 0 or more"),
    ],
)
def test_mistaken_settings(settings, told):
    with pytest.raises(UsageError, match=told):
        Settings(**settings)
