"""Adapters into a quantized model and out of it again: which layers get one, what the base keeps, and the merge.

The base is the model as PTQ left it, packed; what rounding threw away may be kept beside its integers (`fraction`).
Targets are named as peft names them: a layer matches its whole name or the last parts of it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.errors import UsageError
from quantailor.models.prepare import FAKE_QUANT
from quantailor.models.structure import modules_of, replace
from quantailor.nn.fake_quant import FakeQuantLinear
from quantailor.nn.lora import Adapter, LoRA, LoRALinear
from quantailor.nn.packed import PackedWeight, QuantConv2d, QuantLinear, packed
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.numerics import grids
from quantailor.numerics.grouping import from_groups
from quantailor.numerics.lora import fraction, loftq
from quantailor.observers.weights import weight_scale
from quantailor.recipe import block_prefixes
from quantailor.spec import NF4, QuantSpec

DEFAULT_BASE_BITS = 8


def matches(name: str, targets: tuple[str, ...]) -> bool:
    """Whether a layer is one of `targets`: the whole name, or its last parts."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def targeted(found: list[str], everything: list[str], targets: tuple[str, ...] | None) -> list[str]:
    """Those of `found`, the layers that can have an adapter, that `targets` names; all of them at None.

    Raises: UsageError naming the first target that hits none of them.
    """
    if not found:
        raise UsageError("no linear layer of this model is quantized, and an adapter needs a packed base; quantize it")
    if targets is None:
        return found
    for target in targets:
        if any(matches(name, (target,)) for name in found):
            continue
        if any(matches(name, (target,)) for name in everything):
            raise UsageError(
                f"target {target!r} names no quantized linear layer (what it names is kept in float, tied, or not "
                f"linear); use {_endings(found)}, or quantize it by a rule"
            )
        raise UsageError(f"target {target!r} is in no layer's name; this model's are {_endings(found)}")
    return [name for name in found if matches(name, targets)]


def _endings(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))


@torch.no_grad()
def adapt(
    model: nn.Module,
    lora: LoRA,
    *,
    name: str = "default",
    seed: int = 0,
    originals: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Pack `model` in place, freeze it, and give its target layers the adapter `name`, which becomes the active one.

    `model`: fake-quantized (the base then keeps fractions, in `lora.base_bits`), packed, or with adapters already.
    `originals`: float weights [O, N] by layer, for "loftq". Returns notes.
    Raises: UsageError where targets, bits, grid or name do not suit the model; the model is then as it was.
    """
    layers = dict(_linear(model))
    chosen = targeted(list(layers), [n for n, _ in model.named_modules()], lora.target_modules)
    notes = _check(model, {n: layers[n] for n in chosen}, lora, name, originals)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _pack_with_fractions(model, chosen, lora)
        for layer in chosen:
            old = model.get_submodule(layer)
            if not isinstance(old, LoRALinear):
                assert isinstance(old, QuantLinear)
                old = LoRALinear(old)
                replace(model, layer, old)
            if lora.init == "loftq":
                assert originals is not None
                _loftq(old, lora, name, originals[layer])
            else:
                old.add(name, Adapter(lora, old.packed, old.packed.scales().device))
    model.requires_grad_(False)
    activate(model, name)
    return notes


def _linear(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers that can have an adapter: linear, quantized, and not sharing their weight with another layer."""
    owners: dict[int, int] = {}
    for _, module in _quantized(model):
        key = id(getattr(module, "packed", None) or module.weight_quantizer)
        owners[key] = owners.get(key, 0) + 1
    for name, module in modules_of(model, (FakeQuantLinear, QuantLinear, LoRALinear)):
        quantizer = getattr(module, "packed", None) or module.weight_quantizer
        if quantizer is not None and owners[id(quantizer)] == 1:
            yield name, module


def _quantized(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, FAKE_QUANT) or hasattr(module, "packed"):
            yield name, module


def _spec(module: Any) -> QuantSpec:
    return module.packed.spec if hasattr(module, "packed") else module.weight_quantizer.spec


def _check(
    model: nn.Module, chosen: dict[str, Any], lora: LoRA, name: str, originals: Mapping[str, Tensor] | None
) -> list[str]:
    if not name or "." in name or "/" in name:
        raise UsageError(f"{name!r} cannot name an adapter; use letters, digits and dashes")
    if convolutions := [n for n, m in model.named_modules() if isinstance(m, QuantConv2d) or _is_conv(m)]:
        raise UsageError(
            f"{convolutions[0]} is a quantized convolution, through which adapters get no gradient; keep it"
        )
    for layer, module in chosen.items():
        spec, bits = _spec(module), _spec(module).grid.bits
        if lora.inside and isinstance(spec.grid, NF4):
            raise UsageError(f"{layer} is nf4, which has no integers to round an adapter into; train it beside (QLoRA)")
        wanted = base_bits(lora, bits)
        if lora.inside and wanted > bits + 8:
            raise UsageError(f"base_bits={wanted}: {layer} has {bits} bits, and 8 more is the most a base keeps")
        if lora.inside and wanted < bits:
            raise UsageError(f"base_bits={wanted} cannot hold the {bits} bits of {layer}; use {bits} or more")
        if wanted > bits and lora.init == "loftq":
            raise UsageError(f'init="loftq" finds what a base of {bits} bits lacks; leave base_bits out, or use {bits}')
        if lora.base_bits is not None and lora.base_bits > bits and lora.inside and hasattr(module, "packed"):
            kept = getattr(module, "fraction_bits", 0)
            if bits + kept != lora.base_bits:
                raise UsageError(
                    f"base_bits={lora.base_bits}: {layer} is packed and holds {bits + kept} bits a weight; leave it "
                    "out, or start from the float model"
                )
        if name in getattr(module, "adapters", {}):
            raise UsageError(f"the model has an adapter {name!r} already; give another name")
        if lora.r > min(_shape(module)):
            raise UsageError(f"r={lora.r} is more than {layer} has ({min(_shape(module))} is its smaller side)")
    if lora.init == "loftq" and (originals is None or any(layer not in originals for layer in chosen)):
        raise UsageError('init="loftq" needs the float weights, and this model is quantized already; start from float')
    if lora.init == "loftq" and any(isinstance(m, LoRALinear) for m in chosen.values()):
        raise UsageError('init="loftq" makes a base of its own; it cannot be a second adapter')
    packed_already = [n for n, m in chosen.items() if isinstance(m, QuantLinear)]
    if lora.inside and lora.init != "loftq" and packed_already and lora.base_bits is None:
        return [f"{len(packed_already)} layers hold integers only: the base keeps no fractions"]
    return []


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and isinstance(module, FAKE_QUANT)


def _shape(module: Any) -> tuple[int, int]:
    return module.out_features, module.in_features


def base_bits(lora: LoRA, bits: int) -> int:
    """Bits a weight of the base, for a weight of `bits`."""
    if lora.base_bits is not None:
        return lora.base_bits
    return bits if lora.init == "loftq" or not lora.inside else max(DEFAULT_BASE_BITS, bits)


def _pack_with_fractions(model: nn.Module, chosen: list[str], lora: LoRA) -> None:
    """Fake-quantized layers become packed ones, one at a time; targets keep their fractions."""
    done: dict[int, PackedWeight] = {}
    for name, module in list(modules_of(model, FAKE_QUANT)):
        twin = packed(module, done.get(id(module.weight_quantizer)))
        done[id(module.weight_quantizer)] = twin.packed
        if name in chosen and isinstance(twin, QuantLinear):
            bits = module.weight_quantizer.spec.grid.bits
            extra = base_bits(lora, bits) - bits if lora.inside else 0
            kept = fractions_of(module.weight_quantizer, module.weight_ON, extra) if extra else None
            replace(model, name, LoRALinear(twin, kept, extra))
        else:
            replace(model, name, twin)


def fractions_of(quantizer: WeightQuantizer, weight_ON: Tensor, bits: int) -> Tensor:
    """int32 [O, N]: where in its cell each weight lies (numerics.lora.fraction)."""
    qmin, qmax, offset = grids.limits(quantizer.spec.grid)
    scale, zero_point = quantizer.grid_of_groups(quantizer.scale.detach(), quantizer.zero_point)
    v = from_groups(quantizer.groups(weight_ON.detach().float()) / scale - offset + zero_point, quantizer.in_features)
    return fraction(v, quantizer.integers(weight_ON).to(torch.int32), bits, qmin, qmax)


def _loftq(layer: LoRALinear, lora: LoRA, name: str, weight_ON: Tensor) -> None:
    """Base and adapter of one layer, in turns."""
    spec, old = layer.packed.spec, layer.packed
    quantizer = WeightQuantizer(spec, old.out_features, old.in_features, old.scales().device)

    def quantize(w: Tensor) -> Tensor:
        quantizer.set_scale(*weight_scale(w, spec))
        return quantizer.dequantize(quantizer.integers(w))

    weight = weight_ON.float()
    base, a, b = loftq(weight, quantize, lora.r, lora.iterations)
    new = PackedWeight(spec, old.out_features, old.in_features, old.scales().device)
    new.store(quantizer.integers(base), quantizer)
    layer.packed = new
    adapter = Adapter(lora, new, weight.device)
    share = lora.scaling**0.5
    adapter.lora_A.copy_(a / share)
    adapter.lora_B.copy_(b / share)
    layer.add(name, adapter)


# ------------------------------------------------------------------------------------------------ which one is active


def adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that the model holds, in the order they came."""
    return list(dict.fromkeys(name for _, m in modules_of(model, LoRALinear) for name in m.adapters))


def active(model: nn.Module) -> str | None:
    """The adapter that is used now; None: the base alone, or no adapters."""
    return next((m.active for _, m in modules_of(model, LoRALinear) if m.active is not None), None)


def activate(model: nn.Module, name: str | None) -> None:
    """Use this adapter, which alone will train; None is the base. Raises: UsageError if there is none of that name."""
    known = adapters(model)
    if name is not None and name not in known:
        raise UsageError(f"there is no adapter {name!r}; this model has {', '.join(known) or 'none'}")
    for _, module in modules_of(model, LoRALinear):
        module.active = name if name in module.adapters else None
        for other, adapter in module.adapters.items():
            adapter.requires_grad_(other == name)


def merge_errors(model: nn.Module) -> dict[str, float]:
    """Layer -> what merging the active adapter loses, as a share of what the adapter changed; only where it does."""
    found = {name: module.merge_error() for name, module in modules_of(model, LoRALinear)}
    return {name: error for name, error in found.items() if error}


# ------------------------------------------------------------------------------------------------ counting


@dataclass(frozen=True)
class Size:
    """What an adapter trains: numbers of parameters, `total` with the model's own."""

    trainable: int
    total: int
    layers: int

    @property
    def share(self) -> float:
        return self.trainable / self.total

    def __str__(self) -> str:
        numbers = f"{_short(self.trainable)} trainable of {_short(self.total)} parameters ({self.share:.2%})"
        return f"{numbers}, {self.layers} layers"


def _short(number: int) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.{1 if unit != 'B' else 2}f} {unit}"
    return str(number)


def num_weights(model: nn.Module) -> int:
    """Parameters of the model itself, packed or not: without adapters and without the grids' scales."""
    quantizers = {id(p) for m in model.modules() if isinstance(m, WeightQuantizer) for p in m.parameters()}
    own = [p for n, p in model.named_parameters() if ".adapters." not in n and id(p) not in quantizers]
    packed_weights = [m for m in model.modules() if isinstance(m, PackedWeight)]
    biases = [m.bias for m in model.modules() if hasattr(m, "packed") and isinstance(m.bias, Tensor)]
    total = sum(t.numel() for t in (*own, *biases))
    return total + sum(m.out_features * m.in_features for m in packed_weights)


def size_of(model: nn.Module, lora: LoRA) -> Size:
    """What `lora` would train on `model`, float or quantized, on any device, `meta` included: names and shapes only.

    Raises: UsageError as `targeted`.
    """
    total = num_weights(model)
    shapes = {name: _shape(module) for name, module in _linear(model)}
    if not shapes:  # float: the linear layers that quantization would take by default, those of the blocks
        prefixes = tuple(block_prefixes(model)) or ("",)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.startswith(prefixes):
                shapes[name] = _shape(module)
            elif type(module).__name__ == "Conv1D" and name.startswith(prefixes):
                shapes[name] = (module.weight.shape[1], module.weight.shape[0])
    chosen = targeted(list(shapes), [n for n, _ in model.named_modules()], lora.target_modules)
    trainable = sum(lora.r * sum(shapes[name]) for name in chosen)
    return Size(trainable, total + trainable, len(chosen))


# ------------------------------------------------------------------------------------------------ the base


def attach_fractions(model: nn.Module, found: Mapping[str, tuple[Tensor, int]]) -> None:
    """Put what a base kept beside its integers (layer -> words, bits) into a packed model, which is still the base."""
    for name, (words, bits) in found.items():
        source = model.get_submodule(name)
        assert isinstance(source, QuantLinear)
        layer = LoRALinear(source)
        layer.fraction_bits = bits
        layer.register_buffer("fraction", words)
        replace(model, name, layer)


def base_of(model: nn.Module) -> Any:
    """The packed base alone, on the same tensors: adapters and fractions are left out."""
    base = sharing_copy(model)
    activate(base, None)
    for name, module in list(modules_of(base, LoRALinear)):
        replace(base, name, module.merged())
    return base


def base_hash(model: nn.Module) -> str:
    """sha256 of all that lies under the adapters: integers, scales, fractions, and what is in float."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if ".adapters." in name:
            continue
        raw = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(raw.shape)} {raw.dtype} ".encode())
        digest.update(memoryview(raw.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def sharing_copy(model: nn.Module) -> Any:
    """A copy of the modules on the very same tensors, adapters apart, which are copied: freezing it, giving it adapters
    or training them leaves `model` alone."""
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        if ".adapters." not in name:
            memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo)
