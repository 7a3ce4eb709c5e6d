"""What an export did, and the proof that it holds the model's own integers: one form for every format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ExportReceipt:
    """`files` were written and read again by the format's own public library.

    `layers`: how many quantized layers they hold; `integers_equal`: all their integers (and zero points) are the
    model's; `differences`: layer -> what is not as in the model, empty where nothing differs;
    `max_scale_difference`: the largest relative difference of a scale, where the format stores them in fewer bits;
    `max_logit_difference`: of the files' outputs on the probe, relative to the largest logit, None if not run;
    `refused`: why nothing was written.
    """

    format: str
    files: tuple[str, ...]
    layers: int
    integers_equal: bool
    max_logit_difference: float | None = None
    notes: tuple[str, ...] = ()
    refused: str | None = None
    differences: Mapping[str, str] = field(default_factory=dict)
    max_scale_difference: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; `differing` lists the layers as `check` does."""
        return {
            "format": self.format,
            "files": list(self.files),
            "layers": self.layers,
            "integers_equal": self.integers_equal,
            "max_scale_difference": self.max_scale_difference,
            "max_logit_difference": self.max_logit_difference,
            "differing": [{"layer": name, "what": what} for name, what in self.differences.items()],
            "notes": list(self.notes),
            "refused": self.refused,
        }


def refusal(format: str, reason: str) -> ExportReceipt:
    """The receipt of an export that could not be, for a caller that goes on with other formats."""
    return ExportReceipt(format, (), 0, False, refused=reason)
