"""Folders that other tools quantized, as models with packed layers: GPTQ, AWQ, compressed-tensors, bitsandbytes.

    model = read_foreign("their-folder")       what `quantailor.load` does where a folder has no receipt of ours

Integers, scales and zero points are taken over as they are, and nothing is rounded; what no grid of ours holds is
refused by layer name with the way out. The folder is scanned as any stranger's, loading is strict, and of the file's
tensors every one finds its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantailor.errors import QuantailorError, UntrustedInput, UsageError
from quantailor.formats import awq_reader, bitsandbytes_reader, compressed_reader, gptq_reader, plugin
from quantailor.formats.folder import check_grids
from quantailor.formats.foreign_layer import Slot, Taken
from quantailor.models.experts import experts_of, split_experts
from quantailor.models.loading import CONFIG_ERRORS, Task, check_shapes, load_tokenizer, quiet_transformers, task_of
from quantailor.models.prepare import State
from quantailor.recipe import Entry, Inventory, Recipe
from quantailor.spec import Scheme
from quantailor.store.config import read_config
from quantailor.store.paths import shown
from quantailor.store.tensors import read_tensors
from quantailor.store.untrusted import ModelFiles, check_finite, scan_model_folder

Reader = Callable[[Mapping[str, Any], dict[str, Tensor], Mapping[str, Slot]], Taken]
READERS: dict[str, Reader] = {
    "gptq": gptq_reader.read_layers,
    "awq": awq_reader.read_layers,
    "compressed-tensors": compressed_reader.read_layers,
    "bitsandbytes": bitsandbytes_reader.read_layers,
}
_QUANTIZED = (".qweight", ".weight_scale", ".SCB", ".absmax")
_CLASSES = {"lm": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}


@dataclass(frozen=True)
class Foreign:
    """A model read from another tool's folder."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    method: str
    notes: tuple[str, ...]


def method_of(folder: Path) -> str | None:
    """The `quant_method` that a folder's config.json names; None where it names none.

    Raises: UntrustedInput for a config.json that is none.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        return None
    quantization = read_config(path).get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is None and isinstance(quantization, dict) and {"load_in_4bit", "load_in_8bit"} & set(quantization):
        return "bitsandbytes"  # configs of before it wrote its name
    return method if isinstance(method, str) else None


def read_foreign(folder: str | Path) -> Foreign:
    """Load a folder that another tool quantized.

    Raises: UsageError for a method, layout or grid that is not read, with the way out; UntrustedInput for a folder that
    cannot be trusted or does not hold one whole model.
    """
    quiet_transformers()
    folder = Path(folder)
    method = method_of(folder)
    if method not in READERS:
        raise UsageError(
            f"{shown(folder)} is quantized by {shown(str(method))}, which is not read; read are {', '.join(READERS)}; "
            "start from its float parent"
        )
    files = scan_model_folder(folder)
    check_finite(files)
    try:
        return _read(folder, files, method)
    except QuantailorError as error:
        raise error if str(folder) in str(error) else type(error)(f"{shown(folder)}: {error}") from error
    except (*CONFIG_ERRORS, IndexError, OverflowError) as error:
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise UntrustedInput(f"{shown(folder)} does not hold one sound model: {first}; use a sound copy") from error


def _read(folder: Path, files: ModelFiles, method: str) -> Foreign:
    quantization = files.config["quantization_config"]
    task = task_of(files.config)
    if task not in _CLASSES:
        raise UntrustedInput("its config.json names no architecture for language modelling or classification")
    own = {k: v for k, v in files.config.items() if k != "quantization_config"}
    if own.get("model_type") not in CONFIG_MAPPING:
        raise UntrustedInput(f"its model_type is {shown(str(own.get('model_type')))}, which transformers does not know")
    config = CONFIG_MAPPING[own["model_type"]].from_dict(own)
    with torch.device("meta"):
        skeleton: Any = _CLASSES[task].from_config(config)
    stored = _named(read_tensors(files.weight_files), skeleton)
    split_experts(skeleton, experts_of(key for key in stored if key.endswith(_QUANTIZED)))
    slots = _slots(skeleton)
    taken = READERS[method](quantization, stored, slots)
    if not taken.layers:
        raise UntrustedInput(f"its config says {method}, and none of its layers is stored so; use a sound copy")
    _check_rest(taken, skeleton)
    model = build(config, task, skeleton, taken, method, folder)
    if model.can_generate():
        with suppress(OSError):  # without the file: what config.json says
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return Foreign(model, load_tokenizer(folder), task, method, tuple(taken.notes))


def _slots(skeleton: nn.Module) -> dict[str, Slot]:
    """Every layer that could be quantized, by name."""
    return {
        name: Slot.of(type(module).__name__, tuple(module.weight.shape))
        for name, module in skeleton.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D", "Embedding") and module.weight.dim() == 2
    }


def _named(stored: dict[str, Tensor], skeleton: Any) -> dict[str, Tensor]:
    """Tensors by the model's own names, where a bare base model's were written."""
    base = getattr(skeleton, "base_model_prefix", "")
    modules = {name for name, _ in skeleton.named_modules()}

    def own(name: str) -> str:
        first = name.partition(".")[0]
        return f"{base}.{name}" if base and first not in modules and f"{base}.{first}" in modules else name

    return {own(name): tensor for name, tensor in stored.items()}


def _check_rest(taken: Taken, skeleton: nn.Module) -> None:
    """What is left is float, and no leftover of a layer that was quantized."""
    inside = tuple(f"{name}." for name in taken.layers)
    for name, tensor in taken.rest.items():
        if name.startswith(inside):
            raise UntrustedInput(f"tensor {shown(name)} is no part of its layer; use a sound copy")
        if not tensor.is_floating_point() and name.endswith((".weight", ".bias")):
            raise UntrustedInput(
                f"tensor {shown(name)} is {tensor.dtype}, and no scale says what for; use a sound copy"
            )
        if tensor.is_floating_point() and tensor.itemsize == 1:
            raise UsageError(f"tensor {shown(name)} is {tensor.dtype}, which is not read")


def build(config: Any, task: Task, skeleton: Any, taken: Taken, method: str, where: Path) -> PreTrainedModel:
    """The model with its state: packed layers in place of `skeleton`'s, every other tensor loaded strictly."""
    schemes = {name: layer.scheme for name, layer in taken.layers.items()}
    counts = list(schemes.values())
    inventory = _inventory(skeleton, schemes, method)
    state = State(max(counts, key=counts.count), inventory, method, notes=list(taken.notes))
    shapes = {name: (layer.weight.out_features, layer.weight.in_features) for name, layer in taken.layers.items()}
    biases = {name for name, layer in taken.layers.items() if layer.bias is not None}
    settings = plugin.own_config(state, shapes, biases, {})
    quantization = plugin.QuantailorConfig(**{k: v for k, v in settings.items() if k != "quant_method"})
    tensors = dict(taken.rest)
    for name, layer in taken.layers.items():
        tensors |= {f"{name}.packed.{part}": value for part, value in layer.weight.named_buffers()}
        tensors |= {f"{name}.bias": layer.bias} if layer.bias is not None else {}
        tensors |= {f"{name}.input_scale": layer.input_scale} if layer.input_scale is not None else {}
    check_grids(quantization, tensors)
    plugin.register()
    with torch.device("meta"):
        plugin.install_packed(skeleton, quantization)
    check_shapes(where, skeleton, {name: tensor.shape for name, tensor in tensors.items()})
    config.quantization_config = quantization.to_dict()
    architecture: Any = _CLASSES[task]._model_mapping[type(config)]  # type: ignore[index]
    model = plugin.assembled(architecture, config, tensors, where)
    model.quantailor_state = state
    return model


def _inventory(skeleton: Any, schemes: Mapping[str, Scheme], method: str) -> Inventory:
    """Every module with its line: what the files have quantized, and the rest in float."""

    def line(entry: Entry) -> Entry:
        scheme = schemes.get(entry.name)
        if scheme is None:
            return replace(entry, reason=f"float in the {method} folder")
        return replace(entry, scheme=scheme, reason=f"as in the {method} folder", tied_to=None)

    return Inventory(tuple(line(entry) for entry in Recipe(Scheme()).assign(skeleton)))
