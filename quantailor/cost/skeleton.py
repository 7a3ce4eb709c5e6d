"""A model without weights: from a config.json, or a folder that holds one, to modules on torch's `meta` device.

No weight file is opened; the folder may hold none. The modules are those that transformers would run, so that what is
counted and traced later on is there: tied heads, fused experts, convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from quantailor.errors import UntrustedInput, UsageError
from quantailor.models.loading import CONFIG_ERRORS, quiet_transformers
from quantailor.store.config import read_config

Kind = Literal["lm", "classification", "image"]
_CLASSES: dict[Kind, Any] = {
    "lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "image": AutoModelForImageClassification,
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Skeleton:
    """`model` lives on `meta`; `config` is transformers' own; `notes` say what was assumed on the way."""

    model: nn.Module
    config: Any
    kind: Kind
    dtype: torch.dtype
    name: str
    notes: tuple[str, ...] = ()


def skeleton(path: str | Path) -> Skeleton:
    """The modules that the config at `path` (a file, or a folder with config.json) describes.

    Raises: UntrustedInput for a config that cannot be trusted or that transformers cannot build; UsageError where the
    model is quantized already or its kind is none that can be planned.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    raw = read_config(file)
    if (quantization := raw.get("quantization_config")) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UsageError(f"{file} is of a quantized model ({method}); plan from the config of its float parent")
    model_type = raw.get("model_type")
    if model_type == "quantailor":
        raise UsageError(f"{file} is of a quantized model; plan from the config of its float parent")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UntrustedInput(
            f"{file} has model_type {model_type!r}, which this transformers does not know; "
            "use the config.json of a model that it loads without running code"
        )
    quiet_transformers()
    kind, notes = _kind(raw, file)
    name = path.name if path.is_dir() else path.parent.name or path.name
    try:
        config = CONFIG_MAPPING[model_type].from_dict(raw)
        dtype = _dtype(config)
        model = on_meta(config, kind, dtype)
    except (*CONFIG_ERRORS, LookupError, ArithmeticError) as error:
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise UntrustedInput(f"{file} does not build a model for {kind}: {first}") from error
    return Skeleton(model, config, kind, dtype, name, notes)


def on_meta(config: Any, kind: Kind, dtype: torch.dtype) -> nn.Module:
    """The model of `config` on the meta device, in training mode."""
    with torch.device("meta"):
        model: nn.Module = _CLASSES[kind].from_config(config, dtype=dtype)
    return model.train()


def _kind(raw: dict[str, Any], file: Path) -> tuple[Kind, tuple[str, ...]]:
    listed = raw.get("architectures")
    names = " ".join(map(str, listed)) if isinstance(listed, list) else ""
    if "ForCausalLM" in names or "LMHead" in names:
        return "lm", ()
    if "ForSequenceClassification" in names:
        return "classification", ()
    if "ForImageClassification" in names:
        return "image", ()
    if not names or names.endswith("Model") or "MaskedLM" in names:
        return "classification", ("a bare encoder: planned with a new classification head",)
    raise UsageError(
        f"{file} is of {names}; what can be planned is ForCausalLM, ForSequenceClassification, "
        "ForImageClassification, and a bare encoder"
    )


def _dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype.removeprefix("torch."))
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def num_parameters(model: nn.Module) -> int:
    """Tied ones once."""
    return sum(p.numel() for p in model.parameters())
