"""Hardware that is not this machine: peaks from data sheets, an assumed share of them, prices, and who has a kernel.

Peaks are the dense ones of the vendors' sheets, in TFLOP/s or TOP/s; memory in GB (10^9), bandwidth in GB/s. What a
training run gets of a peak is an assumption: well-tuned runs of large models report 30 to 55 % (PaLM, arXiv:2204.02311,
table 3, lists 21 to 46 %; Megatron-LM, arXiv:2104.04473, 44 to 52 %), and eager QAT is not tuned that far. Prices are
round figures, no quotes; the user's own replace them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from quantailor.cost.figures import Figure
from quantailor.cost.trace import Op
from quantailor.errors import UsageError
from quantailor.spec import NF4, Binary, Int, PerChannel, PerGroup, Scheme, Ternary

SHARE_OF_PEAK = Figure(0.30, 0.15, 0.50, "assumed", "assumed: 15 to 50 % of the data sheet's peak")
SHARE_OF_BANDWIDTH = Figure(0.60, 0.40, 0.80, "assumed", "assumed: 40 to 80 % of the data sheet's bandwidth")
SCALING = Figure(0.90, 0.75, 1.0, "assumed", "assumed: 75 to 100 % of linear over several devices")


@dataclass(frozen=True)
class Hardware:
    """One kind of device and how many. `generation`: NVIDIA's compute capability times ten; 0: not NVIDIA's."""

    name: str
    peak: dict[str, float]  # "float32", "bfloat16" (also float16), "int8": TFLOP/s
    memory_gb: float
    bandwidth_gbs: float
    generation: int
    price: Figure  # an hour of one device
    source: str
    count: int = 1

    def seconds(self, ops: Counter[Op]) -> Figure:
        """Of traced operators: products at a share of the peak, passes at a share of the bandwidth."""
        products = Figure(0.0, 0.0, 0.0, "counted")
        by_type: dict[str, int] = {}
        moved = 0
        for op, n in ops.items():
            if op.flops:
                kind = "int8" if op.name in ("int_linear", "tile_linear", "_int_mm") else op.dtype
                by_type[kind] = by_type.get(kind, 0) + op.flops * n
            else:
                moved += op.moved * n
        table = Figure(1.0, 1.0, 1.0, "table", self.source)
        for kind, flops in by_type.items():
            products = products + (table * (flops / (1e12 * self._peak(kind)))) / SHARE_OF_PEAK
        passes = (table * (moved / (1e9 * self.bandwidth_gbs))) / SHARE_OF_BANDWIDTH
        one = products + passes
        return one if self.count == 1 else one * (1 / self.count) / SCALING

    def _peak(self, kind: str) -> float:
        kind = "bfloat16" if kind == "float16" else kind
        return self.peak.get(kind, self.peak["float32"])

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "count": self.count,
            "peak_tflops": self.peak,
            "memory_gb": self.memory_gb,
            "bandwidth_gb_per_s": self.bandwidth_gbs,
            "price_per_hour": self.price.to_json(),
            "source": self.source,
            "share_of_peak": SHARE_OF_PEAK.to_json(),
        }


def _price(value: float) -> Figure:
    return Figure(value, value / 2, value * 2, "assumed", "a round figure, no quote: give your own with --price")


def _device(
    name: str, fp32: float, half: float, int8: float, memory: float, bandwidth: float, generation: int, price: float
) -> Hardware:
    peak = {"float32": fp32, "bfloat16": half} | ({"int8": int8} if int8 else {})
    return Hardware(name, peak, memory, bandwidth, generation, _price(price), f"NVIDIA data sheet of the {name}")


# name: FP32, BF16/FP16 and INT8 dense peaks, GB, GB/s, compute capability x 10, assumed price an hour.
DEVICES = {
    "V100": _device("V100 SXM2 32GB", 15.7, 125, 0, 32, 900, 70, 2.5),
    "T4": _device("T4", 8.1, 65, 130, 16, 320, 75, 0.5),
    "A10": _device("A10", 31.2, 125, 250, 24, 600, 86, 1.0),
    "L4": _device("L4", 30.3, 121, 242.5, 24, 300, 89, 0.8),
    "L40S": _device("L40S", 91.6, 362, 733, 48, 864, 89, 1.5),
    "RTX4090": _device("GeForce RTX 4090", 82.6, 165.2, 660.6, 24, 1008, 89, 0.5),
    "A100": _device("A100 SXM 80GB", 19.5, 312, 624, 80, 2039, 80, 2.0),
    "H100": _device("H100 SXM", 67, 989, 1979, 80, 3350, 90, 3.0),
    "H200": _device("H200 SXM", 67, 989, 1979, 141, 4800, 90, 3.5),
}


def device(text: str, price: float | None = None) -> Hardware:
    """`A100`, `8xA100`. Raises: UsageError for one that is not in the table, or an impossible count or price."""
    count, times, name = text.strip().partition("x")
    if not times or not count.isdigit():
        count, name = "1", text.strip()
    found = next((d for key, d in DEVICES.items() if key.lower() == name.lower()), None)
    if found is None:
        raise UsageError(f"hardware {text!r} is not in the table; use one of {', '.join(DEVICES)}, such as 8xA100")
    if not 1 <= int(count) <= 100_000:
        raise UsageError(f"hardware {text!r}: a count of {count} cannot be; use 1 or more")
    return dataclasses.replace(found, count=int(count), price=found.price if price is None else given(price))


def given(price: float) -> Figure:
    """The user's own price. Raises: UsageError unless it is one."""
    if not 0 <= price < 1e6:
        raise UsageError(f"price={price} an hour cannot be; use 0 or more")
    return Figure(price, price, price, "table", "the price you gave")


# ---------------------------------------------------------------------------------------------- who has a kernel

Kernel = Literal["native", "dequantized", "none"]


@dataclass(frozen=True)
class Support:
    """What a runtime does with a scheme: multiply it as it is, or make floats of it first, or refuse it."""

    runtime: str
    kernel: Kernel
    why: str


def support(scheme: Scheme, generation: int | None) -> list[Support]:
    """Every runtime's answer. `generation` None: a CPU; else an NVIDIA compute capability times ten.

    From vLLM's table of supported hardware and its WNA16 schemes, bitsandbytes' and llama.cpp's own documentation, and
    this package's kernels.
    """
    weight, bits = scheme.weight, scheme.weight.grid.bits if scheme.weight else 16
    plain = isinstance(weight.grid, Int) if weight else False
    symmetric = plain and weight is not None and getattr(weight.grid, "symmetric", False)
    weight_only = scheme.input is None
    int8 = (
        plain and bits == 8 and not weight_only and isinstance(getattr(scheme.input, "grid", None), Int)
        and weight is not None and isinstance(weight.granularity, PerChannel)
        and getattr(getattr(scheme.input, "grid", None), "bits", 0) == 8
        and getattr(scheme.input, "outliers", None) is None and getattr(scheme.input, "group_size", None) is None
    )  # fmt: skip
    found = []
    if scheme.is_float:
        return [Support("torch", "native", "float")]
    if generation is None:
        integer = weight is not None and scheme.input is not None and not isinstance(weight.grid, NF4)
        found.append(
            Support("quantailor", "native", "the integer product of this package")
            if integer and not isinstance(weight.grid if weight else None, Binary | Ternary)
            else Support("quantailor", "dequantized", "weights are made floats at each call: smaller, not faster")
        )
        group = weight.granularity.size if weight and isinstance(weight.granularity, PerGroup) else None
        gguf = symmetric and weight_only and group == 32 and bits in (4, 8)
        found.append(
            Support("llama.cpp", "native" if gguf else "none", "Q4_0 and Q8_0 are groups of 32, symmetric, 4 or 8 bits")
        )
        return found
    if weight_only and plain and bits in (4, 8):
        ok = generation >= 75
        found.append(Support("vLLM", "native" if ok else "none", "WNA16 (Marlin) from compute capability 7.5"))
    elif int8:
        ok = 75 <= generation < 100
        found.append(Support("vLLM", "native" if ok else "none", "INT8 W8A8 from Turing to Hopper, not later ones"))
    else:
        found.append(
            Support("vLLM", "none", f"compressed-tensors there runs 4 and 8 bits weight-only, or W8A8: {bits}")
        )
    if weight and isinstance(weight.grid, NF4):
        found.append(Support("bitsandbytes", "native", "NF4 on CUDA"))
    found.append(Support("quantailor", "dequantized", "weights are made floats at each call: smaller, not faster"))
    return found


def has_kernel(answers: list[Support]) -> bool:
    """Whether any runtime multiplies the scheme as it is."""
    return any(answer.kernel == "native" for answer in answers)
