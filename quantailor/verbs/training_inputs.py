"""What a training run starts from: the model, the rows that teach and those that choose, the teacher."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import torch

from quantailor.data.examples import Examples
from quantailor.data.loading import Data, load_examples, overlap, split
from quantailor.errors import UntrustedInput, UsageError
from quantailor.formats import folder as folders
from quantailor.models.loading import load_tokenizer, task_of
from quantailor.store.untrusted import scan_model_folder
from quantailor.verbs.model import Model, as_model, check_comparable, examples_for, load


def for_training(
    model: str | Path | Model, data: Data | Examples, context: int, seed: int
) -> tuple[Model, Examples, bool]:
    """The model, its data, and whether it was a bare encoder: that gets a head for these classes, drawn by `seed`.

    Raises: UsageError where the data is not for the model's task, UntrustedInput where it has a single class.
    """
    if isinstance(model, Model):
        return model, examples_for(model, data, context=context), False
    folder = Path(model)
    if isinstance(data, Examples) or not folder.exists() or (folder / folders.RECEIPT).exists():
        loaded = load(folder)
        return loaded, examples_for(loaded, data, context=context), False
    config = scan_model_folder(folder).config
    if task_of(config) is not None:
        loaded = load(folder)
        return loaded, examples_for(loaded, data, context=context), False
    longest = min(context, config.get("max_position_embeddings") or context)
    examples = load_examples(data, load_tokenizer(folder), context=longest)
    if examples.task != "classification":
        raise UsageError(
            f"{folder} is a bare encoder, which can be given a head for classification; the data is for {examples.task}"
        )
    if examples.num_labels < 2:
        raise UntrustedInput(
            f"{examples.source} has the one class {examples.label_names[0]!r}; a head needs two to choose from"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = load(folder, task="classification", num_labels=examples.num_labels)
    loaded.model.config.id2label = dict(enumerate(examples.label_names))
    loaded.model.config.label2id = {name: i for i, name in enumerate(examples.label_names)}
    return loaded, examples, True


def for_choosing(
    source: Model, train_data: Examples, eval_data: Data | Examples | None, context: int, seed: int
) -> tuple[Examples, Examples, list[str]]:
    """(what trains, what chooses the best iterate, what is to be said of both)."""
    notes = [f"training data: {note}" for note in train_data.notes]
    if eval_data is None:
        train_data, held_out = split(train_data, 0.1, seed)
        notes.append(
            f"no evaluation data: {len(held_out)} rows of the training data are held out to choose the best iterate"
        )
    else:
        held_out = examples_for(source, eval_data, context=context)
        if shared := overlap(train_data, held_out):
            notes.append(f"{shared} rows are in both the training and the evaluation data")
    return train_data, held_out, notes


def teacher_of(source: Model, teacher: str | Path | Model | None) -> Model | None:
    if teacher is None:
        return None
    if teacher != "self":
        other = as_model(teacher)
        check_comparable(source, other, "teacher")
        return other
    if source.state is not None:
        raise UsageError(
            "teacher='self' needs the float model, and this one is quantized; name the float folder as teacher, or None"
        )
    return dataclasses.replace(source, model=copy.deepcopy(source.model))
