"""Other engines that run an exported ONNX file, so that a packed model can be timed where it might be served.

ONNX Runtime and OpenVINO are optional; `available` tells which are here. Both take the file that `export` writes, with
as many threads as torch has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PACKAGES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}
Arrays = dict[str, np.ndarray[Any, Any]]
Run = Callable[[Arrays], Arrays]


def available() -> dict[str, str]:
    """Engine -> its version; without those that are not installed."""
    return {name: version(package) for name, package in PACKAGES.items() if find_spec(package) is not None}


class Engine:
    """One engine with one file in it."""

    def __init__(self, name: str, file: Path) -> None:
        open_ = {"ONNX Runtime": _onnxruntime, "OpenVINO": _openvino}[name]
        self.name, self.version = name, version(PACKAGES[name])
        self._run, self._takes, self._gives = open_(file, torch.get_num_threads())

    def __call__(self, given: Mapping[str, Tensor | np.ndarray[Any, Any]]) -> Arrays:
        """One pass: what the file takes of `given`; where it has a cache and none is given, nothing came before."""
        arrays = {n: v.numpy() if isinstance(v, Tensor) else v for n, v in given.items() if n in self._takes}
        rows = len(next(iter(arrays.values())))
        for name, (heads, width) in self._takes.items():
            if name.startswith("past_key_values.") and name not in arrays:
                arrays[name] = np.zeros((rows, heads, 0, width), dtype=np.float32)
        return self._run(arrays)

    def generation_speed(self, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
        """(tokens a second of the prompt, of what follows it), greedily, of a file with a cache."""
        feeds: dict[str, Any] = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        times = [time.perf_counter()]
        for made in range(1, new_tokens + 1):
            found = self(feeds)
            token = found["logits"][:, -1].argmax(-1)[:, None].astype(np.int64)
            times.append(time.perf_counter())
            feeds = {"input_ids": token, "attention_mask": torch.ones(1, prompt.shape[1] + made, dtype=torch.int64)}
            feeds |= {
                n.replace("present", "past_key_values", 1): v for n, v in found.items() if n.startswith("present")
            }
        return prompt.numel() / (times[1] - times[0]), (new_tokens - 1) / (times[-1] - times[1])


def _sizes(shape: Any) -> tuple[int, int]:
    """Heads and width of a cache's tensor; of other inputs nobody asks."""
    return (int(shape[1]), int(shape[3])) if len(shape) == 4 else (0, 0)


def _onnxruntime(file: Path, threads: int) -> tuple[Run, dict[str, tuple[int, int]], list[str]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    running = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    gives = [value.name for value in running.get_outputs()]
    takes = {value.name: _sizes(value.shape) for value in running.get_inputs()}
    return lambda arrays: dict(zip(gives, running.run(gives, arrays))), takes, gives


def _openvino(file: Path, threads: int) -> tuple[Run, dict[str, tuple[int, int]], list[str]]:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    takes = {}
    for port in compiled.inputs:
        shape = port.get_partial_shape()
        sizes = [side.get_length() if side.is_static else 0 for side in shape]
        takes[port.get_any_name()] = _sizes(sizes)
    gives = [port.get_any_name() for port in compiled.outputs]
    return lambda arrays: dict(zip(gives, compiled(arrays).values())), takes, gives
