"""A model folder on disk becomes a model in memory, or one clear line that says why not.

The folder is scanned before transformers sees it, weights are looked over for NaN, and loading is strict: a missing
or unexpected tensor is an error, except for the head that a bare encoder is about to be given.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from quantailor.errors import UntrustedInput, UsageError
from quantailor.store.untrusted import check_finite, scan_model_folder

Task = Literal["lm", "classification"]
_CLASSES = {"lm": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}


@dataclass(frozen=True)
class Loaded:
    """A model with what it needs to read text."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    notes: tuple[str, ...]


def quiet_transformers() -> None:
    """Their progress bars and load reports would stand between our lines; what matters in them is checked here."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def task_of(config: dict[str, Any]) -> Task | None:
    """What the model was made for, from its config; None for a bare encoder."""
    listed = config.get("architectures")
    names = " ".join(map(str, listed)) if isinstance(listed, list) else ""
    if "ForCausalLM" in names or "LMHead" in names:
        return "lm"
    return "classification" if "ForSequenceClassification" in names else None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises: UntrustedInput if the folder has none that loads without running code."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here, and each means the same to the user
        first = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UntrustedInput(f"{folder} has no tokenizer that loads ({first}); save it beside the model") from error


def load_float(folder: Path, task: Task | None = None, num_labels: int | None = None) -> Loaded:
    """Load a float model folder.

    `task` and `num_labels`: what a bare encoder gets a new head for; else they must agree with the model.
    Raises: UntrustedInput for a folder that cannot be trusted or does not hold a whole model, UsageError where the
    model already is quantized or does not fit the task.
    """
    quiet_transformers()
    files = scan_model_folder(folder)
    if (quantization := files.config.get("quantization_config")) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UsageError(f"{folder} is quantized already ({method}); start from its float parent")
    own_task = task_of(files.config)
    if own_task is not None and task is not None and own_task != task:
        raise UsageError(f"{folder} is made for {own_task}, not for {task}; use data of that kind")
    check_finite(files)
    chosen = own_task or task
    if chosen is None:
        raise UsageError(
            f"{folder} is a bare encoder without a head; fine-tune it first: "
            f"quantailor train {folder} --scheme float --data TRAIN.jsonl --out DIR"
        )
    shapes = {name: fact.shape for name, fact in files.tensors.items()}
    model, notes = _from_pretrained(folder, chosen, shapes, new_head=own_task is None, num_labels=num_labels)
    return Loaded(model, load_tokenizer(folder), chosen, notes)


def _from_pretrained(
    folder: Path, task: Task, shapes: Mapping[str, Sequence[int]], new_head: bool, num_labels: int | None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    options: dict[str, Any] = {"num_labels": num_labels} if new_head and num_labels else {}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        with torch.device("meta"):
            skeleton = _CLASSES[task].from_config(config)
        check_shapes(folder, skeleton, shapes)
        model, info = _CLASSES[task].from_pretrained(
            folder,
            config=config,
            dtype=torch.float32 if config.dtype is None else config.dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # an error below, where the tensor is named
            output_loading_info=True,
        )
    except UntrustedInput:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UntrustedInput(f"{folder} does not load as a model for {task}: {first}") from error
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if mismatched := info.get("mismatched_keys"):
        raise UntrustedInput(
            f"{folder}: tensor {min(key for key, *_ in mismatched)} has another shape than config.json says; "
            "the folder is damaged"
        )
    head = ("classifier.", "score.", "classification_head.", "pre_classifier.")
    notes = []
    if new_head:
        made = [key for key in missing if key.startswith(head) or ".pooler." in key]
        missing = [key for key in missing if key not in made]
        notes.append(f"a bare encoder: new head {', '.join(made)} starts from random weights")
    if missing or unexpected:
        kind, key = ("lacks", missing[0]) if missing else ("has", unexpected[0])
        more = f" and {len(missing or unexpected) - 1} more" if len(missing or unexpected) > 1 else ""
        raise UntrustedInput(
            f"{folder} {kind} tensor {key}{more}, against its config.json; use a whole checkpoint of one model"
        )
    return model.eval(), tuple(notes)


def check_shapes(folder: Path, skeleton: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Hold what the files have against a model without weights (on `meta`), before anything is allocated.

    Raises: UntrustedInput naming the first tensor of another shape.
    """
    for name, tensor in skeleton.state_dict().items():
        if name in shapes and tuple(shapes[name]) != tuple(tensor.shape):
            raise UntrustedInput(
                f"{folder}: tensor {name} is {list(shapes[name])}, and config.json makes it {list(tensor.shape)}; "
                "use a whole checkpoint of one model"
            )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor lives."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
