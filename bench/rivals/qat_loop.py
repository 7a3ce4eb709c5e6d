"""The steps that other tools' models take in bench/qat_quality.py: its loss, its batches, its schedule."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def steps(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    task_weight: float,
    max_grad_norm: float | None = None,
) -> None:
    """A step a batch, int64 [rows, tokens]: KL to the teacher and `task_weight` of the text's own loss; the rate warms
    up for a tenth and falls to a twentieth by a cosine."""
    warmup = max(1, len(batches) // 10)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, len(batches) - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for rows in batches:
        with torch.no_grad():
            target = F.log_softmax(teacher(input_ids=rows).logits[:, :-1].flatten(0, 1), dim=-1)
        found = F.log_softmax(model(input_ids=rows).logits[:, :-1].flatten(0, 1), dim=-1)
        loss = F.kl_div(found, target, log_target=True, reduction="batchmean")
        if task_weight:
            loss = loss + task_weight * F.nll_loss(found, rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        schedule.step()
    model.eval()
