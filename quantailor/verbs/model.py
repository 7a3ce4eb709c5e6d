"""A model with its tokenizer and task: read, packed and written; and data read for it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantailor.data.examples import Examples
from quantailor.data.images import load_images
from quantailor.data.loading import Data, load_examples
from quantailor.data.squad import QAExamples, load_questions
from quantailor.errors import UntrustedInput, UsageError
from quantailor.evaluate.classification import ClassificationResult
from quantailor.evaluate.lm import LMResult
from quantailor.evaluate.qa import QAResult
from quantailor.formats import folder as folders
from quantailor.formats import foreign
from quantailor.formats.gguf_model import read_gguf
from quantailor.formats.probe import stored_probe
from quantailor.models.loading import (
    Task,
    load_float,
)
from quantailor.models.prepare import SIMULATED, State, pack_model, state_of
from quantailor.models.structure import modules_of
from quantailor.qat.alarms import sentence
from quantailor.qat.recording import NAME as RECORDING
from quantailor.qat.train import TrainReport
from quantailor.store import manifest
from quantailor.store.manifest import hash_folder, write_manifest
from quantailor.store.paths import shown
from quantailor.store.publish import new_folder

Result = LMResult | ClassificationResult | QAResult


@dataclass
class Model:
    """A model with its tokenizer and its task, on its way from float to packed.

    `parent` names the folder it came from and its hash; `training` is the report of the last `train`; `details` is
    what a loaded folder's receipt tells of both, kept while the model stays as it was loaded.
    """

    model: PreTrainedModel
    tokenizer: Any  # PreTrainedTokenizerBase; ImageProcessor where the task is images
    task: Task
    parent: dict[str, str] = field(default_factory=dict)
    training: TrainReport | None = None
    notes: list[str] = field(default_factory=list)
    probe: dict[str, Tensor] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> State | None:
        """What was quantized and how; None while the model is float."""
        return state_of(self.model)

    @property
    def is_packed(self) -> bool:
        """Whether it holds integers only, all of them as they will be served."""
        return self.state is not None and not any(True for _ in modules_of(self.model, SIMULATED))


def load(path: str | Path, *, task: Task | None = None, num_labels: int | None = None, verify: bool = True) -> Model:
    """A model folder, float or quantized by quantailor, GPTQ, AWQ, compressed-tensors or bitsandbytes; or a GGUF file.

    Others' integers and scales are taken over as they are; what is not as in their files is in the model's notes.
    `verify=False` skips the hashes of a huge folder of ours.
    Raises: UntrustedInput for a folder that cannot be trusted or is not whole; UsageError where the task does not fit.
    """
    path = Path(path)
    if not path.exists() and path.parent.is_dir():
        folders.recover(path)  # a writer may have been killed between its two renames
    if is_foreign(path):
        return _from_others(path, task)
    if not (path / folders.RECEIPT).exists() and not _is_ours(path):
        plain = load_float(path, task, num_labels)
        parent = {"folder": path.name, "hash": hash_folder(path)}
        return Model(plain.model, plain.tokenizer, plain.task, parent, notes=list(plain.notes))
    loaded = folders.read_folder(path, verify_hashes=verify)
    stored, details = stored_probe(path, loaded.model.config), loaded.receipt.get("details")
    return Model(
        loaded.model,
        loaded.tokenizer,
        loaded.task,
        {"folder": path.name},
        notes=list(loaded.state.notes),
        probe=stored[0] if stored else None,
        details=details if isinstance(details, dict) else {},
    )


def is_foreign(path: Path) -> bool:
    """Whether `path` holds integers of another tool: a GGUF file, or a quantized folder without a receipt of ours."""
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return True
    return not (path / folders.RECEIPT).exists() and foreign.method_of(path) is not None and not _is_ours(path)


def _is_ours(path: Path) -> bool:
    """Whether quantized weights lie with a manifest of ours or in our layout: what is missing is then told by name."""
    method = foreign.method_of(path)
    return method == "quantailor" or (method is not None and (path / manifest.NAME).exists())


def _from_others(path: Path, task: Task | None) -> Model:
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return _from_gguf(path, task)
    read = foreign.read_foreign(path)
    _check_task(path, read.task, task)
    parent = {"folder": path.name, "hash": hash_folder(path)}
    return Model(read.model, read.tokenizer, read.task, parent, notes=list(read.notes))


def _from_gguf(path: Path, task: Task | None) -> Model:
    read = read_gguf(path)
    _check_task(path, "lm", task)
    if read.tokenizer is None:
        raise UsageError(f"{shown(path)} has no tokenizer, and a model here comes with one; convert it with its own")
    if (state := state_of(read.model)) is not None:
        state.notes += read.notes
    return Model(read.model, read.tokenizer, "lm", {"folder": path.stem}, notes=list(read.notes))


def _check_task(path: Path, own: Task, wanted: Task | None) -> None:
    if wanted is not None and wanted != own:
        raise UsageError(f"{shown(path)} is made for {own}, not for {wanted}; use data of that kind")


def as_model(model: str | Path | Model, *, task: Task | None = None, num_labels: int | None = None) -> Model:
    """What every verb takes: a folder, or a model in memory."""
    return model if isinstance(model, Model) else load(model, task=task, num_labels=num_labels)


def placed(model: Model, device: str) -> Model:
    """The model itself, moved to a device such as "cuda". Raises: UsageError where torch sees no such device."""
    try:
        model.model.to(torch.device(device))  # type: ignore[arg-type]
    except (AssertionError, RuntimeError) as error:  # what torch raises for names unknown and devices absent
        raise UsageError(f"device={device!r}: {str(error).strip().splitlines()[0]}; use one that torch sees") from None
    return model


def examples_for(model: Model, data: Data | Examples, *, context: int = 256, limit: int | None = None) -> Examples:
    """Data read for this model's tokenizer and task. `context` is cut to what the model can take."""
    if isinstance(data, Examples):
        return data
    if model.task == "images":
        names = label_names_of(model)
        channels = int(getattr(model.model.config, "num_channels", 3))
        return load_images(data, model.tokenizer, channels=channels, limit=limit, label_names=names)  # type: ignore[arg-type]
    if model.task == "qa":
        return _questions_for(model, data, context, limit)
    positions = getattr(model.model.config, "max_position_embeddings", None)
    longest = min(context, positions) if isinstance(positions, int) else context
    names = label_names_of(model) if model.task == "classification" else None
    examples = load_examples(data, model.tokenizer, model.task, context=longest, limit=limit, label_names=names)
    _check_tokens(examples, model)
    return examples


def label_names_of(model: Model) -> tuple[str, ...] | None:
    """The names that the model has for its classes; None where they are mere numbers."""
    ordered = tuple(str(name) for _, name in sorted((model.model.config.id2label or {}).items()))
    return None if all(name.startswith("LABEL_") for name in ordered) else ordered


def _questions_for(model: Model, data: Data, context: int, limit: int | None) -> QAExamples:
    if not isinstance(data, str | Path):
        raise UsageError("a model for answers takes its questions from a file in SQuAD's form; name one")
    positions = getattr(model.model.config, "max_position_embeddings", None)
    longest = min(context, positions) if isinstance(positions, int) else context
    examples = load_questions(data, model.tokenizer, context=longest, limit=limit)
    _check_tokens(examples, model)
    return examples


def _check_tokens(examples: Examples, model: Model) -> None:
    """Raises: UntrustedInput if the tokenizer gives numbers that the model has no embedding for."""
    highest = max(int(batch["input_ids"].max()) for batch in examples.batches(1024))
    if highest >= model.model.config.vocab_size:
        raise UntrustedInput(
            f"the tokenizer gives token {highest}, and the model knows {model.model.config.vocab_size}: it is another "
            "model's; put the right tokenizer files into the model's folder"
        )


def refuse_questions(model: Model) -> None:
    """Raises: UsageError for a model that answers questions out of a text: it is quantized and measured, no more."""
    if model.task == "qa":
        raise UsageError(
            "a model for answers out of a text (qa) can be quantized, evaluated, checked and exported; training and "
            "searching need a loss, which this package has for language models and classifiers"
        )


def check_comparable(model: Model, other: Model, role: str) -> None:
    """Raises: UsageError unless both give logits over the same tokens or classes."""
    outputs = [
        f"{m.task}, {m.model.config.vocab_size if m.task == 'lm' else m.model.config.num_labels} outputs"
        for m in (model, other)
    ]
    if outputs[0] != outputs[1]:
        raise UsageError(f"the model is for {outputs[0]}, the {role} for {outputs[1]}; use a {role} of its own kind")


def probe_of(examples: Examples, rows: int = 2, length: int = 64) -> dict[str, Tensor]:
    """A few tokens of the data on which parity is shown, now and at every later `check`."""
    batch = next(iter(examples.batches(rows, limit=rows)))
    return {name: value[:, :length].contiguous() for name, value in batch.items() if name != "labels"}


def default_probe(model: Model) -> dict[str, Tensor]:
    """What to compare on where no data is at hand: the vocabulary's own ids, spread evenly; for images, a ramp."""
    if model.task == "images":
        return default_images(model.model.config)
    vocab = int(model.model.config.vocab_size)
    ids = torch.linspace(0, vocab - 1, 64).long().reshape(2, 32)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def default_images(config: Any) -> dict[str, Tensor]:
    """Two images of the size that the model is made for: waves of every channel, from -1 to 1."""
    channels, size = int(getattr(config, "num_channels", 3)), int(getattr(config, "image_size", 224))
    ramp = torch.linspace(0, 40, 2 * channels * size * size).reshape(2, channels, size, size)
    return {"pixel_values": torch.sin(ramp.square() / 8)}


def pack(model: Model) -> Model:
    """The packed twin: integers only. The given model is left as it is."""
    if model.state is None:
        raise UsageError("the model is float; quantize it first")
    packed = copy.deepcopy(model.model)
    pack_model(packed)
    return dataclasses.replace(model, model=packed)


def save(
    model: Model, out: str | Path, *, overwrite: bool = False, format: str | None = None, inputs: Sequence[Path] = ()
) -> Path:
    """Write a model folder, whole or not at all: packed if it is quantized, else float. The model stays as it is.

    `format`: `compressed-tensors` or `quantailor`; by default the first where the scheme can be said in it.
    Raises: UsageError if `out` exists or the format cannot hold the scheme; QuantailorError if the disk is full.
    """
    out = Path(out)
    with new_folder(out, overwrite=overwrite, inputs=inputs) as folder:
        fill(folder, model, format)
    return out


def fill(folder: Path, model: Model, format: str | None, details: dict[str, Any] | None = None) -> None:
    recording = model.training.recording if model.training is not None else None
    if recording is not None:
        (folder / RECORDING).write_bytes(recording.to_bytes())
    if model.state is None:
        model.model.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        write_manifest(folder, kind="float model", details={"parent": model.parent, **(details or {})})
        return
    folders.write_folder(
        folder,
        model.model,
        model.tokenizer,
        format=format,
        probe=model.probe or default_probe(model),
        details={
            "parent": model.parent,
            "training": _training_json(model.training),
            **model.details,
            **(details or {}),
        },
    )


def _training_json(report: TrainReport | None) -> dict[str, Any] | None:
    if report is None:
        return None
    return {
        **{k: v for k, v in vars(report).items() if k not in ("curve", "recording")},
        "curve": [[s, *score] for s, score in report.curve],
        "alarms": []
        if report.recording is None
        else [{**dataclasses.asdict(alarm), "what": sentence(alarm)} for alarm in report.recording.alarms],
    }
