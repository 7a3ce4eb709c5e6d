"""Adapters on a quantized model: made, saved alone, put onto their base again, swapped, merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quantailor.cost.skeleton import skeleton
from quantailor.errors import UntrustedInput, UsageError
from quantailor.formats import adapter as files
from quantailor.models import adapt
from quantailor.models.prepare import pack_model
from quantailor.models.structure import modules_of
from quantailor.nn.lora import LoRA, LoRALinear
from quantailor.store.publish import new_folder
from quantailor.verbs.model import Model, fill, load


def add_adapter(
    model: Model,
    lora: LoRA | int | None = None,
    *,
    name: str = "default",
    seed: int = 0,
    originals: dict[str, Tensor] | None = None,
) -> Model:
    """A twin of a quantized `model` with an adapter, which is active and alone trains; packed tensors are shared.

    `lora` a number: the rank. The model that comes back starts as the same function; "loftq" changes it, and needs
    the float weights [O, N] by layer in `originals`.
    Raises: UsageError where the model is float, or adapter and model do not suit each other.
    """
    if model.state is None:
        raise UsageError("the model is float, and an adapter inside the rounding needs a grid; quantize it first")
    lora = as_lora(lora)
    twin = dataclasses.replace(model, model=adapt.sharing_copy(model.model), notes=list(model.notes))
    twin.notes += adapt.adapt(twin.model, lora, name=name, seed=seed, originals=originals)
    return twin


def as_lora(lora: LoRA | int | None) -> LoRA:
    """A rank as an adapter with peft's other defaults; None is the default one."""
    return lora if isinstance(lora, LoRA) else LoRA() if lora is None else LoRA(r=lora)


def load_base(path: str | Path) -> Model:
    """A packed folder as the base of adapters: with the fractions that `save_base` put beside its integers."""
    model = load(path)
    if model.state is None:
        raise UsageError(f"{path} is a float model; an adapter's base is quantized")
    adapt.attach_fractions(model.model, files.read_fractions(Path(path), model.model))
    return model


def save_base(model: Model, out: str | Path, *, overwrite: bool = False, inputs: Sequence[Path] = ()) -> Path:
    """The base of a model with adapters as an ordinary packed folder (it serves as the PTQ model that it is), and the
    fractions of its weights beside it, which only adapters need. Raises: UsageError if `out` exists."""
    with new_folder(Path(out), overwrite=overwrite, inputs=inputs) as folder:
        fill_base(folder, model)
    return Path(out)


def fill_base(folder: Path, model: Model) -> None:
    """What `save_base` writes, into an empty folder."""
    _check_has_adapters(model)
    files.write_fractions(folder, model.model)
    base = dataclasses.replace(model, model=adapt.base_of(model.model), training=None, details={})
    assert model.state is not None
    base.model.quantailor_state = dataclasses.replace(model.state, method=model.state.method.removesuffix(TRAINED))  # type: ignore[assignment]
    fill(folder, base, None)


TRAINED = "+lora"  # what a trained adapter adds to the method that a receipt names


def save_adapter(
    model: Model, out: str | Path, *, name: str | None = None, overwrite: bool = False, inputs: Sequence[Path] = ()
) -> Path:
    """One adapter alone, in peft's file format (formats/adapter.py). `name` None: the active one.

    Raises: UsageError if there is none, or `out` exists.
    """
    with new_folder(Path(out), overwrite=overwrite, inputs=inputs) as folder:
        fill_adapter(folder, model, name)
    return Path(out)


def fill_adapter(folder: Path, model: Model, name: str | None = None) -> None:
    """What `save_adapter` writes, into an empty folder."""
    _check_has_adapters(model)
    chosen = name or adapt.active(model.model)
    if chosen is None:
        raise UsageError(f"no adapter is active; name one of {', '.join(adapt.adapters(model.model))}")
    files.write_adapter(folder, model.model, chosen, task=model.task, base_folder=model.parent.get("folder", ""))


def load_adapter(base: str | Path | Model, folder: str | Path, *, name: str = "default") -> Model:
    """A twin of `base` with the adapter in `folder`, active; packed tensors are shared.

    `base`: the folder that the adapter belongs to, or a model made of it, with other adapters or without.
    Raises: UsageError for another base than the adapter was trained on; UntrustedInput for a damaged folder.
    """
    model = base if isinstance(base, Model) else load_base(base)
    stored = files.read_adapter(Path(folder))
    if model.state is None:
        raise UsageError("the model is float; an adapter's base is quantized")
    if stored.base is not None and stored.base != (found := adapt.base_hash(model.model)):
        raise UsageError(
            f"the adapter in {folder} belongs to another base ({stored.base_folder or 'its folder has no name'}, "
            f"{stored.base[:12]}); this one is {found[:12]}: name the folder that --base-out wrote, or the packed one"
        )
    names = [n for n, _ in model.model.named_modules()]
    if missing := next((layer for layer in stored.a if layer not in names), None):
        raise UntrustedInput(f"the adapter in {folder} is for {missing}, which this model does not have")
    twin = add_adapter(model, stored.lora, name=name)
    twin.notes += files.put(stored, twin.model, name)
    if stored.base_folder:
        twin.parent = {**twin.parent, "folder": stored.base_folder}  # the same base under the name it was trained by
    if stored.base is None:
        twin.notes.append("the adapter was saved by peft: which base it was trained on is not known")
    return twin


def set_adapter(model: Model, name: str | None) -> Model:
    """`model` itself, with this adapter active; None is the base alone. Raises: UsageError if there is none such."""
    _check_has_adapters(model)
    adapt.activate(model.model, name)
    return model


def merge(model: Model) -> Model:
    """The packed twin with the active adapter merged. Inside the rounding, its integers are those that were trained;
    beside it, weights are rounded a second time, and a note says by how much that changes them."""
    _check_has_adapters(model)
    notes = merge_notes(model.model)
    twin = dataclasses.replace(model, model=adapt.sharing_copy(model.model), notes=[*model.notes, *notes])
    pack_model(twin.model)
    return twin


def merge_notes(model: nn.Module) -> list[str]:
    """What merging the active adapter loses, if anything."""
    errors = adapt.merge_errors(model)
    if not errors:
        return []
    worst = max(errors, key=lambda layer: errors[layer])
    return [
        f"the adapter stood beside the rounding: merging rounded {len(errors)} layers again, off by "
        f"{sum(errors.values()) / len(errors):.0%} of what it had changed on average, {errors[worst]:.0%} at {worst}"
    ]


def lora_size(model: str | Path | Model, lora: LoRA | int | None = None) -> adapt.Size:
    """How much an adapter would train on a model, or on the model that a config.json describes: no weight is read.

    >>> print(lora_size("llama-7b/config.json", LoRA(64, 128, target_modules=("q_proj", "v_proj"))))  # doctest: +SKIP
    33.6 M trainable of 6.77 B parameters (0.50%), 64 layers
    """
    return adapt.size_of(model.model if isinstance(model, Model) else skeleton(model).model, as_lora(lora))


def _check_has_adapters(model: Model) -> None:
    if not any(True for _ in modules_of(model.model, LoRALinear)):
        raise UsageError("the model has no adapters; train it with lora=16, or load one onto it")


def adapter_details(model: Model) -> dict[str, Any]:
    """What a receipt tells of an adapter that was merged into its model."""
    name = adapt.active(model.model)
    if name is None:
        return {}
    lora = next(m.adapters[name].lora for _, m in modules_of(model.model, LoRALinear) if name in m.adapters)
    return {"adapter": {**dataclasses.asdict(lora), "base": adapt.base_hash(model.model)}}
