"""What is kept with a folder to prove it by: probe inputs, and the logits that the simulated model gave for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantailor.errors import UntrustedInput

PARITY = "parity.safetensors"


def store_probe(folder: Path, probe: Mapping[str, Tensor], logits: Tensor) -> None:
    """What `stored_probe` reads."""
    save_file({**{f"input.{k}": v.contiguous() for k, v in probe.items()}, "logits": logits}, folder / PARITY)


def stored_probe(folder: Path, config: Any) -> tuple[dict[str, Tensor], Tensor] | None:
    """(probe inputs, the simulated model's last logits) kept with the folder, or None.

    Raises: UntrustedInput unless they are tokens that a model of this `config` can take, and finite logits.
    """
    path = Path(folder) / PARITY
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UntrustedInput(f"{path} cannot be read: {error}") from error
    logits = tensors.pop("logits", None)
    inputs = {k.removeprefix("input."): v for k, v in tensors.items() if k.startswith("input.")}
    if set(inputs) == {"pixel_values"}:
        pixels, channels = inputs["pixel_values"], getattr(config, "num_channels", 3)
        sound = pixels.ndim == 4 and pixels.numel() > 0 and pixels.shape[1] == channels and pixels.is_floating_point()
        sound = sound and bool(torch.isfinite(pixels).all()) and _are_logits(logits, len(pixels))
        if not sound or len(tensors) != 1:
            raise UntrustedInput(f"{path} holds no images that this model could run on; use a sound copy")
        return inputs, logits  # type: ignore[return-value]
    limits = {
        "input_ids": getattr(config, "vocab_size", 0),
        "attention_mask": 2,
        "token_type_ids": getattr(config, "type_vocab_size", 1),
    }
    shape = inputs["input_ids"].shape if "input_ids" in inputs else ()
    sound = (
        len(inputs) == len(tensors)
        and len(shape) == 2
        and shape[0] * shape[1] > 0
        and shape[1] <= (getattr(config, "max_position_embeddings", None) or shape[1])
        and all(k in limits and v.shape == shape and v.dtype == torch.int64 for k, v in inputs.items())
        and all(int(v.min()) >= 0 and int(v.max()) < limits[k] for k, v in inputs.items())
        and _are_logits(logits, shape[0])
    )
    if not sound:
        raise UntrustedInput(f"{path} holds no probe that this model could run on; use a sound copy")
    return inputs, logits  # type: ignore[return-value]


def _are_logits(logits: Tensor | None, rows: int) -> bool:
    if logits is None or not logits.is_floating_point():
        return False
    return len(logits) == rows and bool(torch.isfinite(logits).all())
