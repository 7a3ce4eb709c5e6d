"""What training minimizes, against its formula written the slow way."""

import math

import pytest
import torch

from quantailor.qat.losses import kl_to_teacher, scored, task_loss


def kl_by_definition(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student.double().tolist(), teacher.double().tolist()):
        p, q = ([math.exp(v / temperature) for v in logits] for logits in (t, s))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))
    return total / len(student) * temperature**2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_its_formula(temperature):
    student, teacher = torch.randn(5, 7) * 3, torch.randn(5, 7) * 3

    found = kl_to_teacher(student, teacher, temperature)
    assert found.item() == pytest.approx(kl_by_definition(student, teacher, temperature), rel=1e-5)
    assert found.dtype == torch.float32 and found.shape == ()
    assert kl_to_teacher(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)


def test_kl_of_half_precision_is_computed_in_float32():
    student, teacher = (torch.randn(4, 9).bfloat16() for _ in range(2))
    found = kl_to_teacher(student, teacher)
    assert torch.equal(found, kl_to_teacher(student.float(), teacher.float())) and found.dtype == torch.float32


def test_task_loss_is_minus_the_log_of_the_target():
    logits, targets = torch.randn(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    expected = -sum(logits[i].log_softmax(0)[t] for i, t in enumerate(targets)) / 6
    assert task_loss(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_each_position_predicts_the_next_token_and_ignored_ones_do_not_count():
    logits = torch.arange(2 * 4 * 3, dtype=torch.float).view(2, 4, 3)
    labels = torch.tensor([[5, -100, 1, 2], [-100, -100, 0, -100]])
    found, targets = scored(logits, labels, "lm")

    assert targets.tolist() == [1, 2, 0]
    assert torch.equal(found, torch.stack([logits[0, 1], logits[0, 2], logits[1, 1]]))


def test_a_classifier_scores_every_row():
    logits, labels = torch.randn(3, 2), torch.tensor([0, 1, 1])
    found, targets = scored(logits, labels, "classification")
    assert found is logits and targets is labels
