"""Images with a class each, as a vision model takes them: `pixel_values` [C, H, W] and a label.

    .safetensors, .npz    pixel_values [n, C, H, W] and labels [n]; class names in a labels.json beside it
    a list of records     {"pixel_values": ..., "label": ...}, one image each; a saved data set folder gives such

Floating-point pixels are taken as they are: whoever made them normalised them. Bytes (uint8) are divided by 255 and
normalised with the mean and deviation in the model's preprocessor_config.json. Nothing is resized or decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quantailor.data.batching import ImageCollator, RecordDataset
from quantailor.data.classified import checked_names, label_ids, names_beside
from quantailor.data.examples import Examples
from quantailor.data.sources import Record, read_records
from quantailor.errors import UntrustedInput, UsageError
from quantailor.store.processor import ImageProcessor

ARRAYS = (".safetensors", ".npz")


def load_images(
    data: str | Path | Sequence[Record],
    processor: ImageProcessor,
    *,
    channels: int,
    limit: int | None = None,
    label_names: Sequence[str] | None = None,
) -> Examples:
    """Images and their classes, ready for a model of so many `channels`.

    Raises: UntrustedInput for data that cannot be read, has another shape, or holds what is no finite number;
    UsageError for an option out of range.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit} leaves no images; use 1 or more, or None for all")
    source = str(data) if isinstance(data, str | Path) else "the data"
    names = checked_names(label_names) if label_names is not None else None
    if isinstance(data, str | Path):
        names = names or names_beside(Path(data))
    pixels, labels = _read(data, source, limit)
    if pixels.ndim != 4 or pixels.shape[1] != channels or not len(pixels):
        raise UntrustedInput(
            f"{source}: pixel_values are {list(pixels.shape)}; [images, {channels}, height, width] is needed"
        )
    notes = []
    if pixels.dtype == torch.uint8:
        pixels = processor.normalised(pixels)
        notes.append("bytes divided by 255" + (" and normalised as the model's folder says" if processor.mean else ""))
    pixels = pixels.float()
    if not bool(torch.isfinite(pixels).all()):
        raise UntrustedInput(f"{source}: pixel_values hold NaN or Inf; mend them")
    ids, found = label_ids([{"label": label} for label in labels], "label", names, source=source)
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, ids)]
    return Examples(
        task="classification",
        dataset=RecordDataset(rows),
        collator=ImageCollator(0),
        source=source,
        label_names=found,
        notes=tuple(notes),
    )


def _read(data: str | Path | Sequence[Record], source: str, limit: int | None) -> tuple[Tensor, list[Any]]:
    """(pixels [n, C, H, W] in their own type, a label each)."""
    if isinstance(data, str | Path) and Path(data).suffix in ARRAYS:
        return _arrays(Path(data), limit)
    records = read_records(data, limit=limit) if isinstance(data, str | Path) else list(data)[:limit]
    if not records or not all(isinstance(r, dict) and "pixel_values" in r and "label" in r for r in records):
        raise UntrustedInput(
            f"{source} holds no images; give {' or '.join(ARRAYS)} with pixel_values and labels, or records with "
            "pixel_values and label"
        )
    try:
        pixels = torch.stack([torch.as_tensor(np.asarray(r["pixel_values"])) for r in records])
    except (RuntimeError, TypeError, ValueError) as error:
        raise UntrustedInput(f"{source}: pixel_values are no arrays of one shape ({error}); mend them") from error
    return pixels, [record["label"] for record in records]


def _arrays(path: Path, limit: int | None) -> tuple[Tensor, list[Any]]:
    if not path.is_file():
        raise UntrustedInput(f"{path} does not exist; name a file with pixel_values and labels")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as stored:
                tensors = {name: torch.as_tensor(stored[name]) for name in ("pixel_values", "labels")}
        else:
            tensors = load_file(path)
        pixels, labels = tensors["pixel_values"], tensors["labels"]
    except (KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
        raise UntrustedInput(f"{path} cannot be read as pixel_values and labels: {error}; make it again") from error
    if labels.ndim != 1 or len(labels) != len(pixels):
        raise UntrustedInput(
            f"{path}: {len(pixels)} images and labels {list(labels.shape)}; one number an image is due"
        )
    return pixels[:limit], labels[:limit].tolist()
