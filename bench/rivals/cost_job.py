"""What the cost adapters share: a layer read from a folder, and a loop that solves it for each line on stdin."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FOLDER, BITS, GROUP = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
TOKENS = 65_536
DATA = load_file(FOLDER / "layer.safetensors")
WEIGHT, HESSIAN = DATA["weight"], DATA["hessian"]  # [O, N], X^T X [N, N]
_OUT = sys.stdout
sys.stdout = sys.stderr  # the libraries' own lines must not mix with ours


def serve(package: str, settings: dict, prepare: Callable[[], object], solve: Callable[..., torch.Tensor]) -> None:
    """`solve(prepare())` gives the dequantized weight [O, N]; only `solve` is timed."""
    _say(
        {
            "package": package,
            "version": metadata.version(package),
            "settings": settings,
            "threads": torch.get_num_threads(),
        }
    )
    result = None
    for line in sys.stdin:
        word, _, path = line.strip().partition(" ")
        if word == "solve":
            ready = prepare()
            start = time.perf_counter()
            result = solve(ready)
            _say({"seconds": time.perf_counter() - start})
        elif word == "save" and result is not None:
            save_file({"weight": result.detach().float().contiguous()}, path)
            _say({"saved": path})


def _say(document: dict) -> None:
    print(json.dumps(document), file=_OUT, flush=True)
