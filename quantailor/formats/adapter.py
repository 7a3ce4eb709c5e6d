"""An adapter alone on disk, in peft's own two files, and beside them what peft has no place for.

    adapter_config.json          peft's: rank, alpha, dropout, target modules
    adapter_model.safetensors    peft's: base_model.model.<layer>.lora_A.weight [R, N], .lora_B.weight [O, R], float32
    quantailor_adapter.json      the base it belongs to (a hash), whether it stands inside the rounding, and the digests
                                 of the integers it merges to
    scales.safetensors           <layer>: logarithms [O, G] of what the scales are multiplied by, where they train
    MANIFEST.json                sha256 of each file

A folder that peft wrote has the first two only: such an adapter stands beside the rounding, and its base is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quantailor.errors import UntrustedInput, UsageError
from quantailor.evaluate.parity import Digests, differing, digests
from quantailor.models.adapt import activate, active, adapters, base_hash
from quantailor.models.structure import modules_of
from quantailor.nn.lora import LoRA, LoRALinear
from quantailor.numerics.packing import words_per_row
from quantailor.store.header import read_header
from quantailor.store.jsonio import read_json, write_json
from quantailor.store.manifest import NAME as MANIFEST
from quantailor.store.manifest import verify, write_manifest
from quantailor.store.tensors import read_tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN, SCALES, FRACTIONS = "quantailor_adapter.json", "scales.safetensors", "fractions.safetensors"
FORMAT_VERSION = 1
_PREFIX = "base_model.model."
# What peft can do and this cannot: (name in its config, the only value that is read, what to say).
_UNREAD: tuple[tuple[str, Any], ...] = (
    ("use_dora", False),
    ("use_rslora", False),
    ("lora_bias", False),
    ("bias", "none"),
    ("modules_to_save", None),
    ("rank_pattern", {}),
    ("alpha_pattern", {}),
)


@dataclass(frozen=True)
class Stored:
    """An adapter read from disk: `a`, `b` and `log_scales` by layer. `base` None: peft wrote it, and its base is
    unknown."""

    lora: LoRA
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    log_scales: dict[str, Tensor] = field(default_factory=dict)
    base: str | None = None
    base_folder: str = ""
    expected: Digests = field(default_factory=dict)


def write_adapter(folder: Path, model: nn.Module, name: str, *, task: str, base_folder: str = "") -> None:
    """Fill an empty `folder` with the adapter `name`; the caller publishes it. Raises: UsageError if there is none."""
    if name not in adapters(model):
        raise UsageError(f"there is no adapter {name!r}; this model has {', '.join(adapters(model)) or 'none'}")
    layers = {layer: m for layer, m in modules_of(model, LoRALinear) if name in m.adapters}
    lora: LoRA = next(iter(layers.values())).adapters[name].lora
    tensors: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for layer, module in layers.items():
        adapter = module.adapters[name]
        tensors[f"{_PREFIX}{layer}.lora_A.weight"] = adapter.lora_A.detach().contiguous()
        tensors[f"{_PREFIX}{layer}.lora_B.weight"] = adapter.lora_B.detach().contiguous()
        if adapter.log_scale is not None:
            scales[layer] = adapter.log_scale.detach().contiguous()
    write_json(folder / CONFIG, _peft_config(lora, list(layers), task, base_folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if scales:
        save_file(scales, folder / SCALES)
    before = active(model)
    activate(model, name)
    held, base = digests(model), base_hash(model)
    activate(model, before)
    write_json(
        folder / OWN,
        {
            "format_version": FORMAT_VERSION,
            "base": {"hash": base, "folder": base_folder},
            "inside": lora.inside,
            "scales": lora.scales,
            "init": lora.init,
            "digests": {layer: held[layer] for layer in layers},
        },
    )
    write_manifest(folder, kind="adapter", details={"base": base, "r": lora.r})


def _peft_config(lora: LoRA, layers: list[str], task: str, base_folder: str) -> dict[str, Any]:
    """The fields that peft needs; others keep peft's defaults. Targets are whole names: peft matches those exactly."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if task == "lm" else None,
        "base_model_name_or_path": base_folder or None,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": sorted(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def read_adapter(folder: Path) -> Stored:
    """An adapter that `write_adapter` or peft wrote, strictly.

    Raises: UntrustedInput for a folder that is damaged, not whole, or holds what a LoRA adapter does not; UsageError
    for what peft can train and this cannot hold.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UntrustedInput(f"{folder} has no {CONFIG}; give the folder of an adapter")
    if (folder / MANIFEST).exists():
        verify(folder)
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UntrustedInput(f"{folder / CONFIG} is not of a LoRA adapter; use a sound copy")
    for name, only in _UNREAD:
        if (value := config.get(name, only)) not in (only, [] if only is None else only):
            raise UsageError(
                f"{folder / CONFIG} has {name}={value!r}, which cannot be read; train it with {name}={only!r}"
            )
    if not (folder / WEIGHTS).is_file():
        raise UntrustedInput(f"{folder} has no {WEIGHTS}; save the adapter as safetensors")
    own = _own(folder)
    a, b = _pairs(folder / WEIGHTS)
    scales = _finite(folder / SCALES) if own.get("scales") else {}
    try:
        lora = LoRA(
            r=config.get("r"),  # type: ignore[arg-type]
            lora_alpha=float(config["lora_alpha"]),
            lora_dropout=float(config.get("lora_dropout", 0.0)),
            target_modules=tuple(a),
            inside=own.get("inside", False),
            init="zeros",
            scales=own.get("scales", False),
        )
    except (UsageError, KeyError, TypeError, ValueError) as error:
        raise UntrustedInput(f"{folder / CONFIG} is damaged: {error}") from error
    if wrong := next((n for n in a if a[n].shape[0] != lora.r or b[n].shape[1] != lora.r), None):
        raise UntrustedInput(f"{folder / WEIGHTS} has another rank at {wrong} than r={lora.r} of {CONFIG}")
    base = own.get("base", {})
    return Stored(lora, a, b, scales, base.get("hash"), str(base.get("folder", "")), own.get("digests", {}))


def _own(folder: Path) -> dict[str, Any]:
    if not (folder / OWN).exists():
        return {}
    own = read_json(folder / OWN, max_bytes=100_000_000)
    if not isinstance(own, dict) or type(own.get("format_version")) is not int or own["format_version"] < 1:
        raise UntrustedInput(f"{folder / OWN} is damaged; use a sound copy")
    if own["format_version"] > FORMAT_VERSION:
        raise UntrustedInput(f"{folder / OWN} is in version {own['format_version']}; upgrade quantailor")
    sound = isinstance(own.get("base"), dict) and isinstance(own["base"].get("hash"), str)
    sound &= isinstance(own.get("inside"), bool) and isinstance(own.get("scales"), bool)
    sound &= isinstance(own.get("digests"), dict) and all(isinstance(d, dict) for d in own["digests"].values())
    if not sound:
        raise UntrustedInput(f"{folder / OWN} is damaged: it tells no base, kind or digests; use a sound copy")
    return own


def _finite(path: Path) -> dict[str, Tensor]:
    tensors = {name: read_tensor(fact) for name, fact in read_header(path).items()}
    bad = next((n for n, t in tensors.items() if not t.is_floating_point() or not torch.isfinite(t).all()), None)
    if bad is not None:
        raise UntrustedInput(f"{path} holds NaN, Inf or integers in {bad}; use a sound copy")
    return {name: tensor.float() for name, tensor in tensors.items()}


def _pairs(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(A, B) by layer. Raises: UntrustedInput for any other tensor, or a half without the other."""
    halves: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, tensor in _finite(path).items():
        for half, ending in zip(halves, (".lora_A.weight", ".lora_B.weight")):
            if name.startswith(_PREFIX) and name.endswith(ending) and tensor.dim() == 2:
                half[name.removeprefix(_PREFIX).removesuffix(ending)] = tensor
                break
        else:
            raise UntrustedInput(f"{path} holds {name}, which is no half of a linear layer's adapter; use a sound copy")
    if halves[0].keys() != halves[1].keys() or not halves[0]:
        lonely = sorted(halves[0].keys() ^ halves[1].keys())
        raise UntrustedInput(
            f"{path} has one half of an adapter only at {lonely[:1] or 'every layer'}; use a sound copy"
        )
    return halves


@torch.no_grad()
def put(stored: Stored, model: nn.Module, name: str) -> list[str]:
    """Values of an adapter into the one called `name`, which has its shapes. Returns notes: layers that now merge to
    other integers than they did where the adapter was saved."""
    layers = {layer: m for layer, m in modules_of(model, LoRALinear) if name in m.adapters}
    for layer, module in layers.items():
        adapter = module.adapters[name]
        for parameter, value in ((adapter.lora_A, stored.a[layer]), (adapter.lora_B, stored.b[layer])):
            if parameter.shape != value.shape:
                raise UntrustedInput(
                    f"the adapter has {list(value.shape)} at {layer}, and {list(parameter.shape)} fits; it is another "
                    "model's"
                )
            parameter.copy_(value)
        if adapter.log_scale is not None:
            if layer not in stored.log_scales or stored.log_scales[layer].shape != adapter.log_scale.shape:
                raise UntrustedInput(f"the adapter's {SCALES} does not fit {layer}; use a sound copy")
            adapter.log_scale.copy_(stored.log_scales[layer])
    if not stored.expected:
        return []
    held = digests(model)
    changed = differing(stored.expected, {layer: held[layer] for layer in stored.expected if layer in held})
    return (
        [
            f"{len(changed)} layers merge to other integers than where the adapter was saved (arithmetic of another "
            "machine decides ties differently): measure before serving"
        ]
        if changed
        else []
    )


def write_fractions(folder: Path, model: nn.Module) -> None:
    """What rounding threw away, beside a base: int32 words as <layer>.fraction<bits>. Nothing where none is kept."""
    layers = [(name, module) for name, module in modules_of(model, LoRALinear) if module.fraction_bits]
    if layers:
        save_file({f"{n}.fraction{m.fraction_bits}": m.fraction.contiguous() for n, m in layers}, folder / FRACTIONS)


def read_fractions(folder: Path, model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Layer -> (words int32 [O, words], bits). Raises: UntrustedInput where they do not fit the model."""
    path = Path(folder) / FRACTIONS
    if not path.exists():
        return {}
    found: dict[str, tuple[Tensor, int]] = {}
    modules = dict(model.named_modules())
    for key, fact in read_header(path).items():
        name, _, bits = key.rpartition(".fraction")
        base: Any = getattr(modules.get(name), "packed", None)
        sound = base is not None and bits in set("12345678") and fact.dtype == "I32"
        if not sound or fact.shape != (base.out_features, words_per_row(base.in_features, int(bits))):
            raise UntrustedInput(f"{path} does not fit the model at {key}; use a sound copy of the base")
        found[name] = (read_tensor(fact), int(bits))
    return found
