"""Where training from scratch starts: the same architecture, with random weights."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import torch

from quantailor.errors import UsageError
from quantailor.models.loading import load_random
from quantailor.verbs.model import Model


def random_start(model: str | Path | Model, seed: int) -> Model:
    """A float model of the same architecture, tokenizer and task, its weights drawn by `seed` as transformers does.

    A folder may hold config.json and the tokenizer alone. Raises: UsageError for a quantized model or a bare encoder.
    """
    if not isinstance(model, Model):
        folder = Path(model)
        plain = load_random(folder, seed)
        parent = {"folder": folder.name, "weights": plain.notes[0]}
        return Model(plain.model, plain.tokenizer, plain.task, parent, notes=list(plain.notes))
    if model.state is not None:
        raise UsageError("from_scratch makes random float weights, and the model is quantized; give its float parent")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model.model)(copy.deepcopy(model.model.config))
    told = f"random weights, drawn by seed {seed}"
    return dataclasses.replace(
        model, model=fresh.eval(), parent={**model.parent, "weights": told}, notes=[*model.notes, told]
    )
