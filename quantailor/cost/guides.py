"""Figures that common guides to QAT give, computed again: which hold, which do not, and what follows.

Each line is what the guide says, the arithmetic on the guide's own numbers, and a verdict. No figure is copied into a
plan from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantailor.cost.storage import of_parameters


@dataclass(frozen=True)
class Claim:
    """`said` and `computed` in the words of the table; `holds` whether they agree."""

    about: str
    said: str
    computed: str
    holds: bool
    how: str

    def to_json(self) -> dict[str, Any]:
        return {
            "about": self.about, "said": self.said, "computed": self.computed, "holds": self.holds, "how": self.how,
        }  # fmt: skip


def saved_by_speed(speed: float) -> float:
    """The share of the cost that a run `speed` times as fast saves.

    >>> round(saved_by_speed(1.4), 3)
    0.286
    """
    return 1 - 1 / speed


def progressive_saving(stages: list[tuple[float, float]], direct: tuple[float, float]) -> float:
    """(epochs, cost of an epoch) of each stage against a direct run: the share saved; negative where it costs more."""
    return 1 - sum(epochs * cost for epochs, cost in stages) / (direct[0] * direct[1])


def share_of_scratch(fine_tune_hours: float, scratch_hours: float) -> float:
    """A fine-tune's share of the cost of training from scratch at one price: prices cancel, hours are left."""
    return fine_tune_hours / scratch_hours


def price(money: float, devices: int, hours: float) -> float:
    """What a device's hour costs if `money` is all."""
    return money / (devices * hours)


def claims() -> list[Claim]:
    """Every figure that was looked at."""
    found = [
        Claim(
            "mixed precision at 1.4 times the speed", "saves 40 %", _p(saved_by_speed(1.4)), False,
            "1 - 1/1.4: 40 % more speed is not 40 % less cost",
        ),
        Claim(
            "progressive 8 -> 4 against 4 directly", "saves 22 %",
            f"{_p(progressive_saving([(3, 1.22), (5, 1.29)], (8, 1.29)))} at equal epochs", False,
            "8 epochs were compared with 10; at 3 + 5 against 8 only the cheaper 8-bit epochs are left",
        ),
        Claim(
            "INT4 training throughput -29 %", "time x 1.29", f"time x {1.2 / 0.85:.2f}", False,
            "1.2 against 0.85 samples a second is 1 / 0.71; likewise INT8's -21 % is x "
            f"{1.2 / 0.95:.2f}, where the step table of the same guide has x 1.22",
        ),
        Claim(
            "step overhead from 260 to 317 ms", "+22 %", f"+{_p(317 / 260 - 1)}", True,
            "the sum of its own rows; what a step costs here the probe says",
        ),
    ]  # fmt: skip
    scratch = (
        ("MobileNetV2", "17 %", (1, 2), (1, 12), (5, 30)),
        ("BERT-base", "5 %", (8, 8), (16, 96), (150, 3000)),
        ("GPT-2 1.5B", "11 %", (16, 48), (32, 168), (4000, 35000)),
        ("LLaMA-65B", "3.4 %", (128, 72), (256, 504), (72000, 2100000)),
    )
    for model, said, tune, whole, money in scratch:
        share = share_of_scratch(tune[0] * tune[1], whole[0] * whole[1])
        prices = price(money[0], *tune), price(money[1], *whole)
        found.append(
            Claim(
                f"QAT fine-tune of {model} as a share of training from scratch", said, f"{_p(share)} at one price",
                abs(prices[0] / prices[1] - 1) < 0.05,
                f"{tune[0] * tune[1]:,} against {whole[0] * whole[1]:,} device hours; the amounts imply "
                f"${prices[0]:.2f} and ${prices[1]:.2f} an hour",
            )
        )  # fmt: skip
    found += [
        Claim(
            "marginal gain of the first 5 epochs", "0.05 points a dollar", f"{1.9 / 200:.4f}", False,
            "79.5 to 81.4 for $200, from the guide's own table",
        ),
        Claim(
            "marginal gain from 5 to 10 epochs", "0.015 points a dollar", f"{0.3 / 200:.4f}", False,
            "81.4 to 81.7 for $200, same table",
        ),
        Claim(
            "a model of 10^10 parameters in FP32", "400 GB", f"{of_parameters(1e10, 32)[0] / 1e9:.0f} GB", False,
            "4 bytes each; 400, 100 and 50 GB (and scales) belong to 10^11",
        ),
        Claim(
            "LoRA r=64 on q and v of a 7B", "7 M trainable, 0.1 %",
            f"{32 * 2 * 64 * 2 * 4096 / 1e6:.1f} M, {32 * 2 * 64 * 2 * 4096 / 6.738e9:.2%}", False,
            "32 layers x 2 matrices x r (4096 + 4096)",
        ),
        Claim(
            "BERT INT8 for sentiment", "$263", f"${10 + 100 + 133 + 20}", True, "10 + 100 + 133 + 20: the sum holds",
        ),
        Claim(
            "pay-back of $263 at $1,000 a month", "under 10 days", f"{30.4 * 263 / 1000:.1f} days", True,
            "if the saving is as said: 75 % of inference needs a speed-up of 4 times",
        ),
    ]  # fmt: skip
    return found


def _p(share: float) -> str:
    return f"{100 * share:.1f} %"
