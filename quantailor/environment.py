"""What a figure depends on: versions, machine, threads."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch

import quantailor


def _processor() -> str:
    """The CPU's name where the system tells it, else its architecture."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def environment() -> dict[str, str]:
    """What a figure depends on: versions, machine, threads."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "quantailor": quantailor.__version__,
        "python": platform.python_version(),
        **versions,
        "system": platform.system(),
        "device": device,
        "threads": str(torch.get_num_threads()),
    }
