"""How fast a model answers, and how near that is to reading its weights: clocks, counts and the memory's own speed.

A language model has two speeds. Prefill reads the prompt's tokens in one pass and is bound by arithmetic; decoding
makes a token a pass and is bound by reading every weight once. All others have one: examples a second, a batch a pass.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from quantailor.kernels import decode
from quantailor.kernels.ops import product_here
from quantailor.models.generation import continued, decoder_of
from quantailor.models.serving import serving
from quantailor.models.structure import modules_of
from quantailor.nn.packed import QuantEmbedding, QuantLinear

_PROBE_BYTES = 256 * 2**20  # more than caches hold
_LEAST_SECONDS = 0.05  # of calls behind one figure


@dataclass(frozen=True)
class Speed:
    """Of several rounds: something a second."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, rounds: list[float]) -> Speed:
        return cls(statistics.median(rounds), min(rounds), max(rounds))

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


def memory_gb_per_s(num_bytes: int = _PROBE_BYTES, rounds: int = 7, device: str = "cpu") -> float:
    """GB (10^9) a second that torch reads of a device's memory: the best round, since others can only slow one down."""
    x = torch.ones(num_bytes // 4, device=device)
    return num_bytes / 1e9 / min(seconds_of(x.sum, least=0.0) for _ in range(rounds))


def seconds_of(run: Callable[[], Any], least: float = _LEAST_SECONDS) -> float:
    """Of one call; the median of as many as fill `least` seconds, after one that is not timed."""

    def waited() -> None:
        run()
        if torch.cuda.is_initialized():  # a GPU's work is only begun when a call returns
            torch.cuda.synchronize()

    waited()
    times: list[float] = []
    while not times or (sum(times) < least and len(times) < 1000):
        start = time.perf_counter()
        waited()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bytes_a_token(model: nn.Module) -> int:
    """What decoding one token reads: all weights but tables of embeddings, of which it reads a row."""
    tables = {id(part) for _, m in modules_of(model, (nn.Embedding, QuantEmbedding)) for part in m.modules()}
    shared = {id(m.packed) for _, m in modules_of(model, QuantLinear)}
    held: dict[int, Tensor] = {}
    for module in model.modules():
        if id(module) in tables and id(module) not in shared:
            continue
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            held[tensor.data_ptr()] = tensor
    for _, layer in modules_of(model, QuantLinear):
        stored = layer.packed.stored() if layer.scheme.input is None else None
        if stored is not None and (half := stored.with_half_scale().half_scale) is not None:
            held[stored.scale.data_ptr()] = half  # what serving reads in their place
    return sum(t.numel() * t.element_size() for t in held.values())


class _Clock(BaseStreamer):
    """(Time, this process's CPU time) at which generation started, and of each token."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def put(self, value: Tensor) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def end(self) -> None:
        pass


def generation_speed(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """(tokens a second of the prompt, of what follows it), as `generate` makes them with a static cache."""
    times = [wall for wall, _ in generation_times(model, prompt, new_tokens)]
    return prompt.numel() / (times[1] - times[0]), (len(times) - 2) / (times[-1] - times[1])


def generation_times(model: Any, prompt: Tensor, new_tokens: int) -> list[tuple[float, float]]:
    """(Seconds, CPU seconds of this process) at the start and at each new token; a decoder is proved before that."""
    clock = _Clock()
    continued(model, prompt, new_tokens, clock, decoder=decoder_of(model)[0], ends=False)
    return clock.times


@dataclass(frozen=True)
class Product:
    """One shape of layer at one number of rows: what serving takes, why, and the milliseconds of each way."""

    scheme: str
    out_features: int
    in_features: int
    layers: int
    rows: int
    takes: str
    why: str
    ms: dict[str, float]

    @property
    def is_fastest(self) -> bool:
        """Whether no other way that keeps the weight packed was faster by a tenth."""
        packed_ways = [ms for way, ms in self.ms.items() if way != "float weight"]
        return self.ms[self.takes] <= 1.1 * min(packed_ways)


def products(model: nn.Module, rows: tuple[int, ...]) -> list[Product]:
    """Every shape of packed Linear at every number of rows, each way that it could go timed here.

    "float weight" is the same layer held in float, to compare with: it takes the memory that quantizing saved.
    """
    kinds: dict[tuple[str, int, int], list[QuantLinear]] = {}
    for _, layer in modules_of(model, QuantLinear):
        kinds.setdefault((str(layer.scheme), layer.out_features, layer.in_features), []).append(layer)
    return [
        _product(layers[0], scheme, len(layers), count) for (scheme, _, _), layers in kinds.items() for count in rows
    ]


def _product(layer: QuantLinear, scheme: str, layers: int, rows: int) -> Product:
    packed = layer.packed
    x = torch.randn(rows, packed.in_features, device=packed.scales().device)
    weight = packed.dequantize()
    ms = {"float weight": 1e3 * seconds_of(lambda: F.linear(x, weight, layer.bias))}
    if layer.scheme.input is not None:
        takes = "integer product"
        ms[takes] = 1e3 * seconds_of(lambda: layer(x))
        why = f"its inputs are integers as well, by {product_here(x.device.type, has_run=True)}"
    else:
        held = None if (stored := packed.stored()) is None else stored.with_half_scale()
        reason = decode.why_not(held, rows, x.device.type)
        takes = "float blocks" if reason else "packed kernel"
        why = reason or f"up to {decode.most_rows(x.device.type)} rows it reads each weight once, packed"
        ms["float blocks"] = 1e3 * seconds_of(
            lambda: decode.by_blocks(x, packed.block_maker(), packed.out_features, layer.bias)
        )
        if held is not None and not decode.why_not(held, 1, x.device.type):
            ms["packed kernel"] = 1e3 * seconds_of(lambda: decode.decode_linear(x, held, layer.bias))
    return Product(scheme, packed.out_features, packed.in_features, layers, rows, takes, why, ms)


def serving_speed(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """`generation_speed` with products chosen by shape."""
    with serving(model):
        return generation_speed(model, prompt, new_tokens)
