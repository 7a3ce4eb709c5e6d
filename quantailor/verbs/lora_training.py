"""What `train` does differently where an adapter trains: where it begins, what it may set, and how fast it learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quantailor.errors import UsageError
from quantailor.formats import folder as folders
from quantailor.models.adapt import Size, adapters, num_weights, sharing_copy
from quantailor.models.structure import modules_of
from quantailor.nn.lora import LoRA, LoRALinear
from quantailor.qat.settings import Settings, adapter_rate
from quantailor.verbs.adapters import add_adapter, as_lora, load_base
from quantailor.verbs.model import Model

_PLAIN = {
    "gradient": "lsq",
    "trains": "all",
    "cage": 0.0,
    "freeze_oscillating": None,
    "freeze_ranges": None,
    "train_only": (),
}


def for_adapter(settings: Settings, lora: LoRA | int | None) -> Settings:
    """The settings, if an adapter can train with them. Raises: UsageError for one that is about float weights."""
    if lora is None:
        return settings
    for name, plain in _PLAIN.items():
        if getattr(settings, name) != plain:
            raise UsageError(
                f"{name}={getattr(settings, name)!r} is about weights and ranges that train, and with lora only the "
                "adapter does; leave one of the two out"
            )
    if settings.parallel != "ddp":
        raise UsageError(f"parallel={settings.parallel!r} shares float weights, and a packed base has none; use ddp")
    return settings


def base_for_adapter(model: str | Path | Model) -> str | Path | Model:
    """A packed folder with the fractions beside its integers; anything else as it is."""
    if isinstance(model, Model) or not (Path(model) / folders.RECEIPT).exists():
        return model
    return load_base(model)


def method_before(lora: LoRA | int | None, method: str | None) -> str | None:
    """The PTQ method before an adapter: what was asked for, but LoftQ's base is rounded to nearest.

    Raises: UsageError where both are asked for."""
    if not isinstance(lora, LoRA) or lora.init != "loftq":
        return method
    if method not in (None, "rtn"):
        raise UsageError(
            f'init="loftq" finds the integers itself, and method={method!r} would too; leave one of them out'
        )
    return "rtn"


def continued(source: Model, lora: LoRA | int | None, seed: int) -> Model:
    """A quantized model with a new adapter, or with the one that it has: packed tensors are shared with `source`."""
    if lora is None:
        return dataclasses.replace(source, model=sharing_copy(source.model))
    if adapters(source.model):
        raise UsageError(
            "the model has adapters; leave lora out to train the active one further, or add_adapter another and train"
        )
    return add_adapter(source, lora, seed=seed)


def begun(started: Model, source: Model, lora: LoRA | int, seed: int) -> Model:
    """What PTQ made of the float `source`, packed, with a new adapter; "loftq" starts over from the float weights."""
    lora = as_lora(lora)
    originals = None
    if lora.init == "loftq":
        originals = {name: _rows(module) for name, module in source.model.named_modules() if _is_linear(module)}
        assert started.state is not None
        started.state.method = "loftq"
    return add_adapter(started, lora, seed=seed, originals=originals)


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _rows(module: Any) -> Tensor:
    """The weight as [O, N]; Conv1D stores it the other way round."""
    weight: Tensor = module.weight.detach()
    return weight if isinstance(module, nn.Linear) else weight.t()


def adapter_rates(settings: Settings, model: nn.Module) -> Settings:
    """The same with the adapters' own learning rate where none is asked for."""
    bits = min(m.packed.spec.grid.bits for _, m in modules_of(model, LoRALinear))
    return dataclasses.replace(settings, learning_rate=adapter_rate(settings, bits))


def size_of_adapter(model: nn.Module, name: str) -> Size:
    """What the adapter trains, of all that there is."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = sum(name in m.adapters for _, m in modules_of(model, LoRALinear))
    return Size(trainable, num_weights(model) + trainable, layers)
