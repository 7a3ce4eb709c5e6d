"""What every adapter does alike: read the job, time the quantization, write dequantized weights and a receipt.

An adapter runs in its rival's own virtual environment and may import torch, transformers and safetensors besides the
rival itself, never quantailor. It is called `run_<rival>.py`, since a script's folder is searched first and `hqq.py`
would hide the package of that name.

    job = Job.from_command_line()            after the imports: memory is counted from here
    model = job.load()
    with job.timed():                        the quantization alone
        ...
    job.finish(weights, settings={...}, packages=["hqq"], notes=[...])
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

MIB = 2**20


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linears of the repeated blocks: what is quantized here. Embeddings, head and norms stay float."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in f".{n}"}


def groups_of(model: nn.Module, group_size: int) -> dict[str, int]:
    """Of each Linear of the blocks: `group_size`, or the next wider one that divides its inputs."""
    return {
        name: next(g for g in range(group_size, layer.in_features + 1) if layer.in_features % g == 0)
        for name, layer in block_linears(model).items()
    }


@dataclass
class Job:
    """`calibration` int64 [rows, tokens]. `only`: the layers to quantize, None for all of the blocks."""

    model: Path
    calibration: Path
    bits: int
    group_size: int
    out: Path
    threads: int
    variant: str
    only: list[str] | None = None
    seed: int = 0
    seconds: float = 0.0
    base_mib: float = field(default=0.0, init=False)
    peak_mib: float | None = field(default=None, init=False)

    @staticmethod
    def from_command_line() -> Job:
        parser = argparse.ArgumentParser()
        for name in ("model", "calibration", "out"):
            parser.add_argument(f"--{name}", type=Path, required=True)
        for name in ("bits", "group-size", "threads"):
            parser.add_argument(f"--{name}", type=int, required=True)
        parser.add_argument("--variant", default="", help="which of the rival's methods")
        parser.add_argument("--only", type=Path, help="JSON list of the layers to quantize, where that is not all")
        options = parser.parse_args()
        options.only = json.loads(options.only.read_text()) if options.only else None
        job = Job(**vars(options))
        torch.set_num_threads(job.threads)
        torch.manual_seed(job.seed)
        job.base_mib = _restart_peak()
        return job

    def load(self) -> Any:
        """The float32 model, in evaluation mode."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()

    def rows(self) -> Tensor:
        return torch.from_numpy(np.load(self.calibration).astype(np.int64))

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """What `model(**batch)` takes; nothing is padded."""
        return [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in self.rows().split(size)]

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around the quantization; a second use adds to the first. The peak of memory is read when it ends."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        self.peak_mib = _status_mib("VmHWM")

    def finish(
        self,
        weights: Mapping[str, Tensor],
        *,
        settings: Mapping[str, Any],
        packages: Sequence[str],
        notes: Sequence[str] = (),
        also: Mapping[str, Tensor] | None = None,
        layers: Mapping[str, Any] | None = None,
        judged: Mapping[str, Any] | None = None,
    ) -> None:
        """Write `weights` {layer: dequantized [O, N]} and the receipt; `layers`: a report a layer, where there is one.

        `also`: float parameters by their full names that the method changed as well, such as the norms that AWQ scales.
        `judged`: the measurements themselves, from an adapter that can make them.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name}.weight": w for name, w in weights.items()} | dict(also or {})
        tensors = {name: w.detach().float().contiguous().clone() for name, w in tensors.items()}
        save_file(tensors, self.out / "weights.safetensors")
        peak = _status_mib("VmHWM") if self.peak_mib is None else self.peak_mib
        receipt = {
            "seconds": self.seconds,
            "peak_rss_mib": peak - self.base_mib,
            "imports_rss_mib": self.base_mib,
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", *packages)},
            "quantized": sorted(weights),
            "settings": dict(settings),
            "notes": list(notes),
        }
        receipt |= {"layers": dict(layers)} if layers else {}
        receipt |= {"judged": dict(judged)} if judged else {}
        (self.out / "receipt.json").write_text(json.dumps(receipt, indent=1, default=str) + "\n")


def _restart_peak() -> float:
    """Forget the highest memory use so far; returns the present one in MiB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _status_mib("VmHWM")  # it cannot be forgotten: count from it
    return _status_mib("VmRSS")


def _status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024 / MIB
    return 0.0
