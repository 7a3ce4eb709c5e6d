"""What QAT minimizes: the divergence from the float teacher, the task's own loss, or a mix of both.

    KL = mean over scored positions of sum_v p_T(v) (log p_T(v) - log p_S(v)),  p = softmax(logits / T), times T^2
    CAKLD = gamma KL(S || T) + (1 - gamma) KL(T || S),  gamma = the teacher's mean probability of the label
    JSD = beta KL(T || M) + (1 - beta) KL(S || M),  M = beta p_T + (1 - beta) p_S
    hidden = sum over l = 0 .. L of MSE(H_l^S, H_l^T),  scores = sum over l = 1 .. L of MSE(A_l^S, A_l^T)

Sources: Hinton et al. 2015, arXiv:1503.02531, section 2 (T and its square); KL alone at T = 1 in NVIDIA's
quantization-aware distillation, arXiv:2601.20088. CAKLD: BitDistiller, Du et al. 2024, arXiv:2402.10631, Eq. 6-7. JSD:
Agarwal et al. 2024, arXiv:2306.13649, Eq. 1. Hidden states (the embeddings' output is l = 0) and attention scores:
TernaryBERT, Zhang et al. 2020, arXiv:2009.12812, Eq. 9. B rows, T tokens, V vocabulary, C classes, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quantailor.data.columns import Task

IGNORED = -100  # the label of positions that do not count: prompts and padding


def scored(logits: Tensor, labels: Tensor, task: Task | str) -> tuple[Tensor, Tensor]:
    """(logits [n, V], targets [n]) of the positions that count: for a language model each predicts the next token."""
    if task == "classification":
        return logits, labels
    targets = labels[:, 1:]
    keep = targets != IGNORED
    return logits[:, :-1][keep], targets[keep]


def kl_to_teacher(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student), mean over rows, times temperature squared. Shapes: both [n, V]; returns 0-d float32."""
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean") * temperature**2


def task_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, mean over rows. Shapes: [n, V], [n]."""
    return F.cross_entropy(logits.float(), targets)


def cakld(student: Tensor, teacher: Tensor, gamma: float, temperature: float = 1.0) -> Tensor:
    """Confidence-aware KL, mean over rows, times temperature squared. Shapes: [n, V]; returns 0-d float32.

    `gamma` 1 is the mode-seeking KL(S || T), for a teacher sure of its labels; 0 the mean-seeking KL(T || S).
    """
    mode_seeking, mean_seeking = (
        kl_to_teacher(teacher, student, temperature),
        kl_to_teacher(student, teacher, temperature),
    )
    return gamma * mode_seeking + (1 - gamma) * mean_seeking


def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Generalized Jensen-Shannon divergence, mean over rows, times temperature squared. Shapes: [n, V]; 0-d float32."""
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    weights = torch.tensor([beta, 1 - beta], device=student.device).log().view(2, 1, 1)
    log_mixed = torch.logsumexp(torch.stack([log_teacher, log_student]) + weights, dim=0)
    of_teacher = F.kl_div(log_mixed, log_teacher, log_target=True, reduction="batchmean")
    of_student = F.kl_div(log_mixed, log_student, log_target=True, reduction="batchmean")
    return (beta * of_teacher + (1 - beta) * of_student) * temperature**2


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], real: Tensor) -> Tensor:
    """Sum over layers of the mean squared difference at real tokens. Shapes: L + 1 of [B, T, N]; `real` bool [B, T]."""
    return torch.stack(
        [F.mse_loss(s[real].float(), t[real].float()) for s, t in zip(student, teacher, strict=True)]
    ).sum()


def score_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], seen: Sequence[Tensor]) -> Tensor:
    """Sum over layers of the mean squared difference of attention scores before softmax, where a token may look.

    Shapes: L of [B, H, T, T]; `seen` bool, L of [B, 1, T, T]. The paper's code counts hidden positions as equal.
    """
    total = torch.zeros((), device=student[0].device)
    for s, t, where in zip(student, teacher, seen, strict=True):
        where = where.expand_as(s)
        total = total + F.mse_loss(s[where].float(), t[where].float())
    return total
