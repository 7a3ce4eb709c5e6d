"""A model folder on disk becomes a model in memory, or one clear line that says why not.

The folder is scanned before transformers sees it, weights are looked over for NaN, and loading is strict: a missing
or unexpected tensor is an error, except for the head that a bare encoder is about to be given. A `Skeleton` is a model
whose weights stay on disk until a part of it is asked for.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from quantailor.errors import UntrustedInput, UsageError
from quantailor.models.experts import split_experts
from quantailor.store.config import read_config
from quantailor.store.header import TensorFact
from quantailor.store.paths import check_folder
from quantailor.store.processor import ImageProcessor
from quantailor.store.tensors import DTYPES, read_tensor
from quantailor.store.untrusted import ModelFiles, check_finite, scan_model_folder

Task = Literal["lm", "classification", "images", "qa"]
CLASSES: dict[str, Any] = {
    "lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "images": AutoModelForImageClassification,
    "qa": AutoModelForQuestionAnswering,
}
# What transformers raises for a config.json whose values make no model.
CONFIG_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, StrictDataclassError)


@dataclass(frozen=True)
class Loaded:
    """A model with what it needs to read text, or images."""

    model: PreTrainedModel
    tokenizer: Any  # PreTrainedTokenizerBase; ImageProcessor where the task is images
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
    if "ForImageClassification" in names:
        return "images"
    if "ForQuestionAnswering" in names:
        return "qa"
    return "classification" if "ForSequenceClassification" in names else None


def load_reader(folder: Path, task: Task) -> Any:
    """The tokenizer, or what stands in its place for images. Raises: UntrustedInput if it cannot be read."""
    return ImageProcessor.read(folder) if task == "images" else load_tokenizer(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises: UntrustedInput if the folder has none that loads without running code."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here, and each means the same to the user
        first = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UntrustedInput(f"{folder} has no tokenizer that loads ({first}); save it beside the model") from error


class NotInParts(Exception):
    """This model cannot be worked on a part at a time, for the reason given; whole in memory it may do."""


def load_float(folder: Path, task: Task | None = None, num_labels: int | None = None) -> Loaded:
    """Load a float model folder.

    `task` and `num_labels`: what a bare encoder gets a new head for; else they must agree with the model.
    Raises: UntrustedInput for a folder that cannot be trusted or does not hold a whole model, UsageError where the
    model already is quantized or does not fit the task.
    """
    files, chosen, is_bare = _checked(folder, task)
    if chosen is None:
        raise UsageError(
            f"{folder} is a bare encoder without a head; fine-tune it first: "
            f"quantailor train {folder} --scheme float --data TRAIN.jsonl --out DIR"
        )
    shapes = {name: fact.shape for name, fact in files.tensors.items()}
    model, notes = _from_pretrained(folder, chosen, shapes, new_head=is_bare, num_labels=num_labels)
    return Loaded(model, load_reader(folder, chosen), chosen, notes)


def _checked(folder: Path, task: Task | None) -> tuple[ModelFiles, Task | None, bool]:
    """A float folder's files, what the model is for, and whether it is a bare encoder, which says nothing of that."""
    quiet_transformers()
    files = scan_model_folder(folder)
    if (quantization := files.config.get("quantization_config")) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UsageError(f"{folder} is quantized already ({method}); start from its float parent")
    own_task = task_of(files.config)
    if own_task is not None and task is not None and own_task != task:
        raise UsageError(f"{folder} is made for {own_task}, not for {task}; use data of that kind")
    check_finite(files)
    return files, own_task or task, own_task is None


class Skeleton:
    """A float model folder as a model whose tensors are on torch's `meta` device until `load` brings some in.

    `facts` says of every tensor of the model, by each name it has, where it lies on disk; tied ones lie in one place.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, facts: dict[str, TensorFact]
    ) -> None:
        self.model, self.tokenizer, self.task, self.facts = model, tokenizer, task, facts
        self.dtype: torch.dtype = model.dtype
        self._shared: weakref.WeakValueDictionary[tuple[Path, int], nn.Parameter] = weakref.WeakValueDictionary()

    @torch.no_grad()
    def load(self, module: nn.Module, name: str, *, deep: bool = True, device: torch.device | None = None) -> None:
        """Read the tensors of the module called `name` that are not there yet; `deep`: those of its children as well.

        In the model's own type, as `load_float` has them; tied parameters are one object while one of them is there.
        """
        for child_name, child in list(module.named_modules()) if deep else [("", module)]:
            prefix = ".".join(filter(None, (name, child_name)))
            self._compute_buffers(child, device)
            for own, parameter in child._parameters.items():
                if parameter is not None and parameter.is_meta:
                    child._parameters[own] = self._parameter(f"{prefix}.{own}", parameter, device)
            for own, buffer in child._buffers.items():
                if buffer is not None and buffer.is_meta:
                    child._buffers[own] = self.read(f"{prefix}.{own}").to(device, buffer.dtype)

    def read(self, name: str) -> Tensor:
        """One tensor as it lies on disk."""
        return read_tensor(self.facts[name])

    def _parameter(self, name: str, meta: nn.Parameter, device: torch.device | None) -> nn.Parameter:
        fact = self.facts[name]
        found = self._shared.get((fact.file, fact.start))
        if found is None:
            found = nn.Parameter(read_tensor(fact).to(device, meta.dtype), requires_grad=meta.requires_grad)
            self._shared[(fact.file, fact.start)] = found
        return found

    def _compute_buffers(self, module: nn.Module, device: torch.device | None) -> None:
        """What is in no file, such as the frequencies of rotary positions: as transformers itself makes it anew."""
        names = [
            n for n in module._non_persistent_buffers_set if (b := module._buffers.get(n)) is not None and b.is_meta
        ]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")  # type: ignore[arg-type]
        if names:
            self.model._init_weights(module)  # its parameters are still on meta, where nothing is drawn
        for name in names:
            module._buffers[name] = module._buffers[name].to(device)  # type: ignore[union-attr]


def open_skeleton(folder: Path) -> Skeleton:
    """A float model folder, checked as `load_float` checks it, without its weights.

    Raises: UntrustedInput and UsageError as `load_float`; NotInParts where its tensors are not, one for one, those of
    the model: transformers then converts them, and only a whole load does that.
    """
    files, task, is_bare = _checked(folder, None)
    if task is None or is_bare:
        raise NotInParts("it has no head")
    if task == "images":
        raise NotInParts("its norms are folded into convolutions before anything is quantized")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        dtype = torch.float32 if config.dtype is None else config.dtype
        with torch.device("meta"):
            model = CLASSES[task].from_config(config, dtype=dtype)
    except CONFIG_ERRORS as error:
        raise NotInParts(f"its architecture cannot be made without its weights ({type(error).__name__})") from error
    if model._get_dtype_plan(dtype):
        raise NotInParts("parts of it stay in float32 whatever the type of the others")
    if model.can_generate():
        with suppress(OSError):  # without the file: what config.json says
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    split_experts(model)  # as their tensors lie on disk
    check_shapes(folder, model, {name: fact.shape for name, fact in files.tensors.items()})
    facts = _facts_of(model, files.tensors)
    return Skeleton(model.eval(), load_tokenizer(folder), task, facts)


def _facts_of(model: PreTrainedModel, stored: Mapping[str, TensorFact]) -> dict[str, TensorFact]:
    """Where each tensor of the model lies, by name. Raises: NotInParts unless names and shapes fit one to one."""
    base = getattr(model, "base_model_prefix", "")
    by_tensor: dict[int, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_tensor.setdefault(id(tensor), []).append(name)
        shapes[name] = tuple(tensor.shape)
    facts: dict[str, TensorFact] = {}
    used = set()
    for names in by_tensor.values():
        short = {name: name.removeprefix(f"{base}.") for name in names}
        found = [key for name in names for key in dict.fromkeys((name, short[name])) if key in stored]
        if len(found) != 1:
            what = "twice" if found else "under no name of the model's own"
            raise NotInParts(f"its files have {names[0]} {what}")
        if stored[found[0]].shape != shapes[names[0]] or stored[found[0]].dtype not in DTYPES:
            raise NotInParts(f"its files have {names[0]} in another form")
        used.add(found[0])
        facts |= dict.fromkeys(names, stored[found[0]])
    if rest := sorted(set(stored) - used):
        raise NotInParts(f"its files have {rest[0]}, which the model does not")
    return facts


def _from_pretrained(
    folder: Path, task: Task, shapes: Mapping[str, Sequence[int]], new_head: bool, num_labels: int | None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    options: dict[str, Any] = {"num_labels": num_labels} if new_head and num_labels else {}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        with torch.device("meta"):
            skeleton = CLASSES[task].from_config(config)
        check_shapes(folder, skeleton, shapes)
        model, info = CLASSES[task].from_pretrained(
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
    except CONFIG_ERRORS as error:
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise UntrustedInput(f"{folder} does not load as a model for {task}: {first}") from error
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if mismatched := info.get("mismatched_keys"):
        raise UntrustedInput(
            f"{folder}: tensor {min(key for key, *_ in mismatched)} has another shape than config.json says; "
            "the folder is damaged"
        )
    head = ("classifier.", "score.", "classification_head.", "pre_classifier.", "qa_outputs.")
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


def load_random(folder: Path, seed: int) -> Loaded:
    """The architecture that a folder's config.json names, with weights drawn by `seed`; its own, if any, are not read.

    Raises: UntrustedInput for a configuration that cannot be trusted or made; UsageError for a bare encoder.
    """
    quiet_transformers()
    check_folder(folder)
    task = task_of(read_config(folder / "config.json"))
    if task is None:
        raise UsageError(
            f"{folder} is a bare encoder without a head; training from scratch needs a whole model's config"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = CLASSES[task].from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UntrustedInput(f"{folder}: config.json makes no model ({type(error).__name__}: {error})") from error
    if model.can_generate():
        with suppress(OSError):  # without the file: what config.json says
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return Loaded(model.eval(), load_reader(folder, task), task, (f"random weights, drawn by seed {seed}",))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor lives."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
