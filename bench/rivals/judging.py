"""The one evaluation that everything here gets: perplexity, KL to the float model and agreement, by quantailor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import quantailor as qt
from quantailor.api import examples_for
from quantailor.evaluate.lm import LMResult, Reference
from quantailor.evaluate.run import evaluate, reference_for
from quantailor.verbs.model import placed

DATA = Path(os.environ.get("QUANTAILOR_DATA", Path(__file__).parents[3] / "shared" / "data"))
CONTEXT = 256


class Judge:
    """Holds a float model's answers on the evaluation text; made once a model."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        self.float = placed(qt.load(DATA / "models" / name), device)
        self.valid = examples_for(self.float, DATA / "text" / "tinystories" / "valid.txt", context=CONTEXT)
        reference = reference_for(self.float.model, self.valid)
        assert isinstance(reference, Reference)
        self.reference = reference

    def __call__(self, model: Any) -> dict[str, Any]:
        result = evaluate(model, self.valid, reference=self.reference)
        assert isinstance(result, LMResult)
        base = self.reference.result
        return {
            "perplexity": result.perplexity,
            "float_perplexity": base.perplexity,
            "ratio": result.perplexity / base.perplexity,
            "kl": result.kl,
            "top1_agreement": result.top1_agreement,
            "tokens": result.num_tokens,
            "compared_tokens": result.compared_tokens,
            "fingerprint": result.fingerprint,
        }
