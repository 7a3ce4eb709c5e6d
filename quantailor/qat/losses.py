"""What QAT minimizes: the divergence from the float teacher, the task's own loss, or a mix of both.

    KL = mean over scored positions of sum_v p_T(v) (log p_T(v) - log p_S(v)),  p = softmax(logits / T), times T^2

Source: Hinton et al. 2015, arXiv:1503.02531, section 2 (T and its square); used alone at T = 1 in NVIDIA's
quantization-aware distillation, arXiv:2601.20088. B rows, T tokens, V vocabulary, C classes.
"""

from __future__ import annotations

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
