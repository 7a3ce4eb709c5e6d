"""How long, how fast and towards what: the settings of a QAT run, and their defaults by bit width.

Learning rates fall with model size, as published ones do from 10^8 to 10^10 parameters: the table holds the rate at
one million parameters, and rates go with the size to the power -0.65. Measured at 2 and 4 bits, between 0.26
and 3.7 million parameters, one seed (docs/LOG.md); other rows are filled in between, larger models extrapolated.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantailor.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """One QAT run. `None` = the default of the table for the scheme and the model's size."""

    steps: int = 200
    learning_rate: float | None = None
    scale_learning_rate: float | None = None  # of log(scale): relative change a step
    batch_size: int = 8
    accumulate: int = 1
    warmup: float = 0.1  # share of the steps
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    kl_weight: float = 1.0  # KL to the float teacher
    task_weight: float = 0.0  # the task's own loss
    temperature: float = 1.0
    evaluations: int = 8  # how often the best iterate is looked for
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps={self.steps} trains nothing; use 1 or more")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"seed={self.seed} must be 0 or more and below 2^31")
        for name in ("learning_rate", "scale_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 10:
                raise UsageError(f"{name}={value} must lie between 0 and 10; leave it out for the default")
        if self.kl_weight < 0 or self.task_weight < 0 or self.kl_weight + self.task_weight == 0:
            raise UsageError(
                f"kl_weight={self.kl_weight}, task_weight={self.task_weight}: neither may be negative, one must count"
            )


# Weight bits -> learning rate of weights and of log-scales, at 10^6 parameters. 0 stands for float.
LEARNING_RATES: dict[int, tuple[float, float]] = {
    1: (8.5e-4, 1e-3),
    2: (8.5e-4, 1e-3),
    3: (4e-4, 1e-3),
    4: (1.5e-4, 5e-4),
    5: (1e-4, 5e-4),
    6: (1e-4, 3e-4),
    7: (5e-5, 3e-4),
    8: (5e-5, 3e-4),
    0: (2e-4, 0.0),
}


def learning_rates(settings: Settings, weight_bits: int, num_parameters: int) -> tuple[float, float]:
    """(of the weights, of the log-scales), from the settings or the table."""
    size = (num_parameters / 1e6) ** -0.65
    weights, scales = LEARNING_RATES[weight_bits]
    return (
        settings.learning_rate if settings.learning_rate is not None else weights * size,
        settings.scale_learning_rate if settings.scale_learning_rate is not None else scales,
    )
