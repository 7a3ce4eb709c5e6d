"""A float model becomes a fake-quantized one by a recipe, and that one becomes packed integers. Both in place.

Weights that were tied stay tied: two layers that share a parameter share its quantizer, and later its integers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from quantailor.errors import UntrustedInput
from quantailor.models.experts import split_experts
from quantailor.models.points import find_points, freeze_static_outputs, install_points, with_outputs
from quantailor.models.structure import modules_of, replace
from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.nn.fake_quant import FakeQuant, fake_quantized
from quantailor.nn.lora import LoRALinear
from quantailor.nn.packed import PackedWeight, QuantConv2d, QuantEmbedding, QuantLinear, packed
from quantailor.nn.points import PackedPoint, PointQuantizer, packed_point, unpacked_point
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.observers.weights import weight_scale
from quantailor.recipe import Entry, Inventory, Recipe, in_features
from quantailor.spec import Scheme

FAKE_QUANT = get_args(FakeQuant)
PACKED = (QuantLinear, QuantEmbedding, QuantConv2d)
SIMULATED = (*FAKE_QUANT, LoRALinear)  # layers in training: `packed_twin` gives what is served


@dataclass
class State:
    """What was done to a model: carried by the model as `quantailor_state`, saved with it as its receipt."""

    scheme: Scheme
    inventory: Inventory
    method: str = "none"
    notes: list[str] = field(default_factory=list)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)  # per layer: what its solver reported
    folded: list[str] = field(default_factory=list)  # norms that are part of a convolution now (models/folding.py)


def state_of(model: nn.Module) -> State | None:
    """The state `prepare` or a loader attached; None for a float model."""
    state = getattr(model, "quantailor_state", None)
    return state if isinstance(state, State) else None


def prepare(model: nn.Module, recipe: Recipe, probe: Mapping[str, Tensor] | None = None) -> State:
    """Replace every module that the recipe quantizes by its fake-quantized twin, with min-max scales, and hang
    quantizers on its points.

    `probe`: what a model that takes no tokens is watched on, where the recipe has points.
    Raises: UsageError as `Recipe.assign` and `find_points` do; UntrustedInput where a weight holds NaN or Inf, naming
    its layer.
    """
    if not recipe.scheme.is_float or recipe.rules:
        split_experts(model)
    state = planned(model, recipe, probe)
    prepare_layers(model, state.inventory.quantized)
    device = next((p.device for p in model.parameters()), None)
    install_points(model, state.inventory.points, device=device)
    freeze_static_outputs(model, state.inventory.points)
    model.quantailor_state = state  # type: ignore[assignment]
    return state


def planned(model: nn.Module, recipe: Recipe, probe: Mapping[str, Tensor] | None = None) -> State:
    """What `prepare` will do, from names and shapes alone, and for points from one pass. Raises: UsageError as
    `Recipe.assign` and `find_points` do."""
    inventory = recipe.assign(model)
    if recipe.points:
        points = find_points(model, recipe.points, inventory.entries, probe)
        inventory = Inventory(with_outputs(inventory.entries, points), points)
    state = State(recipe.scheme, inventory)
    if recipe.points.scores or recipe.points.kv:
        state.notes.append(
            "scores, keys and values are quantized in our own attention function, which holds the probabilities whole"
        )
    if ragged := [e.name for e in inventory if e.scheme is not None and _is_ragged(e)]:
        state.notes.append(
            f"{len(ragged)} layers have a shorter last group (input size no multiple of the group): {_some(ragged)}"
        )
    return state


def prepare_layers(model: nn.Module, schemes: Mapping[str, Scheme]) -> None:
    """Put the fake-quantized twins in place for these layers of `model`, whose weights must be there."""
    quantizers: dict[int, WeightQuantizer] = {}
    for name, scheme in schemes.items():
        twin = fake_quantized(model.get_submodule(name), scheme)
        if twin.weight_quantizer is not None:
            shared = quantizers.setdefault(id(twin.weight), twin.weight_quantizer)
            if shared is twin.weight_quantizer:
                try:  # good enough to compute with; calibration searches better ones
                    shared.set_scale(*weight_scale(twin.weight_ON, dataclasses.replace(shared.spec, range="minmax")))
                except ValueError as error:
                    raise UntrustedInput(f"{name}: {error}") from error
            twin.weight_quantizer = shared
        replace(model, name, twin)


def _is_ragged(entry: Entry) -> bool:
    size = entry.scheme.weight.group_size if entry.scheme and entry.scheme.weight else None
    return size is not None and bool(in_features(entry.kind, entry.shape) % size)


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def pack_model(model: nn.Module) -> nn.Module:
    """Replace every layer in training by its packed twin: float weights go, adapters are merged. Returns the model."""
    done: dict[int, PackedWeight] = {}
    for name, module in list(modules_of(model, SIMULATED)):
        replace(model, name, packed_twin(module, done))
    for name, point in list(modules_of(model, PointQuantizer)):
        replace(model, name, packed_point(point))
    return model


def packed_twin(module: Any, stores: dict[int, PackedWeight]) -> QuantLinear | QuantEmbedding | QuantConv2d:
    """What a layer in training is served as. `stores` remembers the packed weights that tied layers share."""
    if isinstance(module, LoRALinear):
        return module.merged()
    twin = packed(module, stores.get(id(module.weight_quantizer)))
    stores[id(module.weight_quantizer)] = twin.packed
    return twin


def unpack_model(model: nn.Module) -> nn.Module:
    """Replace every packed layer by the fake-quantized one with the same integers: to check it, or to train on."""
    weights: dict[int, tuple[nn.Parameter, WeightQuantizer]] = {}
    for name, module in list(modules_of(model, PACKED)):
        replace(model, name, unpacked(module, weights))
    for name, point in list(modules_of(model, PackedPoint)):
        replace(model, name, unpacked_point(point))
    if (state := state_of(model)) is not None:
        freeze_static_outputs(model, state.inventory.points)
    return model


@torch.no_grad()
def unpacked(
    module: QuantLinear | QuantEmbedding | QuantConv2d, weights: dict[int, tuple[nn.Parameter, WeightQuantizer]]
) -> FakeQuant:
    """The fake-quantized twin of a packed layer; `weights` remembers what tied layers share."""
    store = module.packed
    dense = store.dequantize()
    source: nn.Module
    if isinstance(module, QuantEmbedding):
        source = nn.Embedding(store.out_features, store.in_features, device="meta")
        dense = dense.to(module.dtype)
    elif isinstance(module, QuantLinear):
        source = nn.Linear(store.in_features, store.out_features, bias=module.bias is not None, device="meta")
    else:
        shape = module.settings["shape"]
        names = ("stride", "padding", "dilation", "groups")
        out, per_group, *kernel = shape
        options = {n: module.settings[n] for n in names}
        channels = per_group * module.settings["groups"]
        source = nn.Conv2d(channels, out, tuple(kernel), bias=module.bias is not None, device="meta", **options)
        dense = dense.reshape(shape)
    parameter, quantizer = weights.get(id(store), (nn.Parameter(dense), None))
    source.weight = parameter
    if module.bias is not None:
        source.bias = nn.Parameter(module.bias.clone())
    twin = fake_quantized(source.train(module.training), module.scheme)
    assert twin.weight_quantizer is not None
    if quantizer is None:
        zero_point = store.zero_points()
        if store.is_double:
            twin.weight_quantizer.set_double(store.scale_codes, store.scale_second, store.scale_mean)  # type: ignore[arg-type]
        twin.weight_quantizer.base_scale.copy_(store.scales().unsqueeze(-1))
        if isinstance(zero_point, torch.Tensor):
            twin.weight_quantizer.zero_point.copy_(zero_point.unsqueeze(-1))
        if store.spec.is_indexed:
            twin.weight_quantizer.group_index.copy_(store.group_index)  # type: ignore[operator,arg-type]
        weights[id(store)] = (parameter, twin.weight_quantizer)
    else:
        twin.weight_quantizer = quantizer
    for name, activations in (("input_scale", twin.input_quantizer), ("output_scale", twin.output_quantizer)):
        if isinstance(activations, ActivationQuantizer) and not activations.spec.dynamic:
            activations.set_scale(getattr(module, name))
    return twin
