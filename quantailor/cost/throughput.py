"""This machine's speed as a table, and seconds of a traced step from it.

    seconds = sum over operators of [ call + factor * work * seconds a unit of work at that size ]

Products are looked up by their flops, passes by the bytes they move, on a line through the probed sizes (log-log);
`call` and `factor` are set by small training steps, so that the sum meets what was measured on them. The table is kept
in the user's cache folder under a fingerprint of the machine: another processor, torch or number of threads probes anew
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from quantailor.cost.figures import Figure
from quantailor.cost.probe import TRAINED, Probe, Sample
from quantailor.cost.skeleton import Skeleton, on_meta
from quantailor.cost.step import Batch, trace_step
from quantailor.cost.trace import Op
from quantailor.environment import environment
from quantailor.kernels.native import library as native
from quantailor.recipe import Recipe
from quantailor.spec import Scheme
from quantailor.store.jsonio import read_json, write_json

# Covers all models of bench/results/plan_accuracy.json: 15 % off on average, 31 % too low at most.
STEP_ERROR = 0.45
_LIKE = {  # what is not probed, and the probed product or pass that it is like
    "tile_linear": "int_linear",
    "addmm": "mm",
    "bmm": "mm",
    "baddbmm": "mm",
    "_grouped_mm": "mm",
    "convolution": "mm",
    "convolution_backward": "mm",
    "_scaled_dot_product_efficient_attention": "_scaled_dot_product_flash_attention_for_cpu",
    "index_select": "index",
    "gather": "index",
    "fill_": "zeros",
    "zero_": "zeros",
    "new_zeros": "zeros",
    "zeros_like": "zeros",
    "ones_like": "zeros",
    "sigmoid": "tanh",
    "_softmax_backward_data": "_log_softmax_backward_data",
    "rsub": "add",
    "sub": "add",
}
_ROUNDS = 3


@dataclass(frozen=True)
class Machine:
    """Seconds of probed operators. `call`: seconds that an operator costs before it computes; `factor` times all."""

    table: Mapping[Sample, float]
    call: float
    factor: float
    spread: float
    about: Mapping[str, str]

    @cached_property
    def _lines(self) -> dict[tuple[str, str], list[tuple[int, float]]]:
        lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for sample, seconds in self.table.items():
            lines.setdefault((sample.name, sample.dtype), []).append((sample.work, seconds))
        return {key: sorted(line) for key, line in lines.items()}

    def seconds_of(self, op: Op) -> float:
        """One call of `op`, without factor and call."""
        if op.name == "view":
            return 0.0
        name = op.name if (op.name, "float32") in self._lines else _LIKE.get(op.name, op.name)
        if op.flops:
            dtype = "bfloat16" if op.dtype in ("bfloat16", "float16") else "float32"
            line = self._lines.get((name, dtype)) or self._lines.get((name, "float32")) or self._lines["mm", "float32"]
            if name == "_int_mm":
                line = self._lines["_int_mm", "int32"]
            return at(line, op.flops)
        return at(self._lines.get((name, "float32")) or self._lines["mul", "float32"], op.moved)

    def seconds(self, ops: Counter[Op]) -> float:
        """All of them, with factor and calls."""
        return sum(n * (self.call + self.factor * self.seconds_of(op)) for op, n in ops.items())

    def figure(self, ops: Counter[Op]) -> Figure:
        """`seconds` as a figure, its interval from the errors of the bench."""
        value = self.seconds(ops)
        share = STEP_ERROR + self.spread
        source = f"probe of this machine ({self.about.get('device', 'CPU')}, {self.about.get('threads', '?')} threads)"
        return Figure(value, value / (1 + share), value * (1 + share), "measured", source)

    def flops_per_second(self, dtype: str = "float32") -> float:
        """Of the largest probed product."""
        work, seconds = self._lines["mm", dtype][-1]
        return work / seconds

    def bytes_per_second(self) -> float:
        """Of the largest probed pass."""
        work, seconds = self._lines["add", "float32"][-1]
        return work / seconds

    def to_json(self) -> dict[str, Any]:
        return {
            "table": [[s.name, s.dtype, s.work, seconds] for s, seconds in self.table.items()],
            "call": self.call,
            "factor": self.factor,
            "spread": self.spread,
            "about": dict(self.about),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Machine:
        table = {Sample(str(n), str(d), int(w)): float(s) for n, d, w, s in value["table"]}
        numbers = {name: float(value[name]) for name in ("call", "factor", "spread")}
        if not all(math.isfinite(v) and v >= 0 for v in (*table.values(), *numbers.values())):
            raise ValueError("not finite")
        return Machine(table, about={str(k): str(v) for k, v in value["about"].items()}, **numbers)


def at(line: list[tuple[int, float]], work: int) -> float:
    """Seconds at `work` on a line of (work, seconds): between its points log-log, beyond its ends in proportion."""
    place = bisect.bisect_left(line, (work, 0.0))
    if place == 0:
        return line[0][1] * max(work, 1) / line[0][0] if work < line[0][0] / 4 else line[0][1]
    if place == len(line):
        return line[-1][1] * work / line[-1][0]
    (low, low_seconds), (high, high_seconds) = line[place - 1], line[place]
    share = math.log(work / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(low_seconds) + share * math.log(high_seconds))


def fitted(probe: Probe) -> Machine:
    """`call` from the step that is nothing but calls, `factor` from the others."""
    table, steps = probe.medians(), probe.step_medians()
    about = {**environment(), "native": "yes" if native.library() is not None else "no"}
    bare = Machine(table, 0.0, 1.0, probe.spread(), about)
    traced = {name: _small(name) for name in TRAINED}
    calls = sum(traced["nano"].values())
    call = max(0.0, steps["nano"] - bare.seconds(traced["nano"])) / calls
    ratios = [
        (steps[name] - call * sum(ops.values())) / bare.seconds(ops) for name, ops in traced.items() if name != "nano"
    ]
    return Machine(table, call, statistics.median(ratios), probe.spread(), about)


def _small(name: str) -> Counter[Op]:
    """The operators of a probed training step, without the clipping that it does not do."""
    shape = TRAINED[name]
    config = shape.config
    plan = Skeleton(on_meta(config, "lm", torch.float32), config, "lm", torch.float32, name)
    schemes = Recipe(Scheme.parse(shape.scheme)).assign(plan.model).quantized
    step = trace_step(plan, schemes, Batch(shape.rows, shape.length), distance=None)
    return step.ops + step.update_ops


def measured(again: bool = False) -> Machine:
    """This machine, from the cache or by a probe of about a minute. `again`: probe whatever the cache says."""
    place = cache_file()
    if not again and place.exists():
        try:
            return Machine.from_json(read_json(place))
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # written by another version, or damaged: a cache is made anew
    probe = Probe()
    for _ in range(_ROUNDS):
        probe.round()
    machine = fitted(probe)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_json(place, machine.to_json())
    return machine


def is_known() -> bool:
    """Whether `measured` would answer at once."""
    return cache_file().exists()


def cache_file() -> Path:
    """Where this machine's table lies: XDG_CACHE_HOME/quantailor/machine-<fingerprint>.json."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    about = {**environment(), "native": str(native.library() is not None), "format": "1"}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return base / "quantailor" / f"machine-{digest}.json"
