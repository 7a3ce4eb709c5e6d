"""How a vision model wants its pixels, as its preprocessor_config.json says: where others have a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantailor.errors import UntrustedInput, UsageError
from quantailor.store.jsonio import read_json, write_json

FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class ImageProcessor:
    """What stands where a language model has its tokenizer. `mean`, `std`: a number a channel, or none."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(folder: Path) -> ImageProcessor:
        """From the model's folder; without a file, bytes are only divided by 255. Raises: UntrustedInput."""
        path = folder / FILE
        if not path.exists():
            return ImageProcessor()
        config = read_json(path)
        if not isinstance(config, dict):
            raise UntrustedInput(f"{path} is no object; use a sound copy")
        mean, std = (config.get(name) or [] for name in ("image_mean", "image_std"))
        sound = all(isinstance(v, int | float) for part in (mean, std) for v in part) and len(mean) == len(std)
        if not sound or not all(v > 0 for v in std):
            raise UntrustedInput(f"{path}: image_mean and image_std must be as many numbers, the latter above 0")
        return ImageProcessor(tuple(map(float, mean)), tuple(map(float, std)), config)

    def save_pretrained(self, folder: str | Path) -> None:
        """The file that was read, again."""
        if self.config:
            write_json(Path(folder) / FILE, self.config)

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 [n, C, H, W] -> float32 as the model was trained on."""
        x = pixels.float() / 255
        if not self.mean:
            return x
        if len(self.mean) not in (1, x.shape[1]):
            raise UsageError(f"the model normalises {len(self.mean)} channels, the images have {x.shape[1]}")
        mean, std = (torch.tensor(part).view(1, -1, 1, 1) for part in (self.mean, self.std))
        return (x - mean) / std
