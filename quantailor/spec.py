"""What to quantize to: frozen data, with one string and one JSON form.

A `QuantSpec` says how one tensor is quantized, a `Scheme` how one module is: its weight, its input, its output.
The string of a scheme (`w4a16-g32`, `w8a8-static`, `nf4-dq`, `w1.58a8`) means the same in PTQ, QAT, search and export.

    w<bits>a<bits>[-g<size>][-asym|-balanced][-static]   weights, activations (16 = left alone), group, grid, ranges
    nf4 | nf4-dq                                         4-bit NormalFloat, blocks of 64; scales quantized again
    float                                                no quantization: the control

Conventions: integer zero point, x_hat = (q - zero_point) * scale, round half to even; a symmetric grid is
-2^(b-1) .. 2^(b-1)-1, or without its lowest level where `narrow`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from quantailor.errors import UsageError

RangeMethod = Literal["minmax", "ema", "mse", "percentile", "histogram"]


@dataclass(frozen=True)
class Int:
    """A uniform integer grid of 2 to 8 bits."""

    bits: int
    symmetric: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"bits={self.bits}: an integer grid has 2 to 8 bits; use Binary, Ternary or NF4 otherwise")
        if self.narrow and not self.symmetric:
            raise UsageError("narrow=True drops the lowest level of a symmetric grid; use symmetric=True with it")

    @property
    def qmin(self) -> int:
        if not self.symmetric:
            return 0
        return -(2 ** (self.bits - 1)) + int(self.narrow)

    @property
    def qmax(self) -> int:
        return 2**self.bits - 1 if not self.symmetric else 2 ** (self.bits - 1) - 1


@dataclass(frozen=True)
class NF4:
    """16 quantiles of a normal distribution (QLoRA, arXiv:2305.14314); `double_quant` stores the scales in 8 bits."""

    double_quant: bool = False
    bits: int = dataclasses.field(default=4, init=False)


@dataclass(frozen=True)
class Balanced:
    """Levels mirrored around 0 and without 0, such as ±1/4, ±3/4 of the range at 2 bits (ParetoQ, arXiv:2502.02631)."""

    bits: int = 2

    def __post_init__(self) -> None:
        if self.bits != 2:
            raise UsageError(f"bits={self.bits}: the balanced grid is for 2 bits; use Int above and Binary below")


@dataclass(frozen=True)
class Ternary:
    """-1, 0, +1 times a scale (BitNet b1.58, arXiv:2402.17764); 2 bits in storage."""

    bits: int = dataclasses.field(default=2, init=False)


@dataclass(frozen=True)
class Binary:
    """-1, +1 times a scale (XNOR-Net, arXiv:1603.05279)."""

    bits: int = dataclasses.field(default=1, init=False)


Grid = Int | NF4 | Balanced | Ternary | Binary


@dataclass(frozen=True)
class PerTensor:
    """One scale for all."""


@dataclass(frozen=True)
class PerChannel:
    """One scale an output row of a weight."""


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of `size` elements along the input; the last run of a row may be shorter if `ragged`."""

    size: int
    ragged: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"group size {self.size} must be at least 1; use 32, 64 or 128")


@dataclass(frozen=True)
class PerToken:
    """One scale a row of activations."""


Granularity = PerTensor | PerChannel | PerGroup | PerToken


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized. `range`: how its scale is first found; `dynamic`: at each call from the data."""

    grid: Grid
    granularity: Granularity
    dynamic: bool = False
    range: RangeMethod = "mse"

    def __post_init__(self) -> None:
        if self.range not in get_args(RangeMethod):
            raise UsageError(f"range={self.range!r} is none of {', '.join(get_args(RangeMethod))}")
        if isinstance(self.granularity, PerToken) and not self.dynamic:
            raise UsageError(
                "a per-token scale is only known at each call; use dynamic=True, or PerTensor for a static one"
            )
        if isinstance(self.grid, NF4) and not isinstance(self.granularity, PerGroup):
            raise UsageError("NF4 is defined on blocks; use PerGroup(64)")

    @property
    def group_size(self) -> int | None:
        return self.granularity.size if isinstance(self.granularity, PerGroup) else None


@dataclass(frozen=True)
class Scheme:
    """The specs of one module. All three None: the module computes in float."""

    weight: QuantSpec | None = None
    input: QuantSpec | None = None
    output: QuantSpec | None = None

    @staticmethod
    def parse(text: str) -> Scheme:
        """The scheme that `text` names.

        Raises: UsageError naming the nearest known schemes.

        >>> Scheme.parse("w4a16-g32").weight.granularity
        PerGroup(size=32, ragged=True)
        """
        scheme = _parse(text.strip().lower())
        if scheme is None:
            near = difflib.get_close_matches(text.lower(), KNOWN_SCHEMES, n=3, cutoff=0.3) or list(KNOWN_SCHEMES)[:3]
            raise UsageError(
                f"unknown scheme {text!r}; did you mean {', '.join(near)}? "
                "The form is w<2-8>a<2-8|16>[-g<size>][-asym|-balanced][-static]; `quantailor schemes` lists them"
            )
        return scheme

    def __str__(self) -> str:
        return _name(self)

    @property
    def is_float(self) -> bool:
        return self.weight is None and self.input is None and self.output is None

    def with_ragged(self, ragged: bool) -> Scheme:
        """The same scheme, with a shorter last group allowed or refused."""
        if self.weight is None or not isinstance(self.weight.granularity, PerGroup):
            return self
        granularity = dataclasses.replace(self.weight.granularity, ragged=ragged)
        return dataclasses.replace(self, weight=dataclasses.replace(self.weight, granularity=granularity))


# What `quantailor schemes` lists, with what each is for. Other sizes of the same form are as good.
KNOWN_SCHEMES: dict[str, str] = {
    "float": "no quantization: fine-tunes a bare model, and is the control of every QAT figure",
    "w8a16": "8-bit weights, a scale an output channel; activations float",
    "w8a8": "8-bit weights and activations, scale of each token found at run time",
    "w8a8-static": "8-bit weights and activations, activation scales calibrated beforehand",
    "w4a16": "4-bit weights, a scale an output channel",
    "w4a16-g32": "4-bit weights, groups of 32",
    "w4a16-g64": "4-bit weights, groups of 64",
    "w4a16-g128": "4-bit weights, groups of 128: what most LLM servers run",
    "w4a16-g128-asym": "the same with a zero point a group",
    "w4a8-g32": "4-bit weights in groups of 32, 8-bit activations",
    "w3a16-g32": "3-bit weights, groups of 32",
    "w2a16-g32": "2-bit weights, groups of 32: needs QAT",
    "w2a16-g64": "2-bit weights, groups of 64: needs QAT",
    "w2a16-g32-balanced": "2-bit weights on the levels ±1/4, ±3/4 of each group's range",
    "nf4": "4-bit NormalFloat weights, blocks of 64 (QLoRA)",
    "nf4-dq": "the same, with scales quantized to 8 bits in blocks of 256: 4.127 bits a weight",
    "w1.58a8": "ternary weights, 8-bit activations (BitNet b1.58)",
    "w1a1": "binary weights and activations (XNOR-Net)",
}

_FORM = re.compile(r"w(1\.58|[1-8])a(16|[1-8])(?:-g(\d+))?(-asym|-balanced)?(-static)?")


def _parse(text: str) -> Scheme | None:
    if text == "float":
        return Scheme()
    if text in ("nf4", "nf4-dq"):
        return Scheme(weight=QuantSpec(NF4(double_quant=text.endswith("-dq")), PerGroup(64), range="minmax"))
    match = _FORM.fullmatch(text)
    if match is None:
        return None
    weight_bits, input_bits, group, kind, static = match.groups()
    grid: Grid
    if weight_bits == "1.58" or weight_bits == "1":
        if kind:
            return None
        grid = Ternary() if weight_bits == "1.58" else Binary()
    elif kind == "-balanced":
        if weight_bits != "2":
            return None
        grid = Balanced(2)
    else:
        grid = Int(int(weight_bits), symmetric=kind != "-asym")
    granularity = PerGroup(int(group)) if group else PerChannel()
    activations = None
    if input_bits != "16":
        if input_bits == "1" and static:
            return None
        act_grid: Grid = Binary() if input_bits == "1" else Int(int(input_bits))
        if static:
            activations = QuantSpec(act_grid, PerTensor())
        else:
            activations = QuantSpec(act_grid, PerToken(), dynamic=True, range="minmax")
    elif static:
        return None
    return Scheme(weight=QuantSpec(grid, granularity), input=activations)


def _name(scheme: Scheme) -> str:
    """The string of a scheme that has one, else its JSON (which `Scheme.parse` does not take)."""
    if scheme.is_float:
        return "float"
    ragged = (
        scheme.weight is None or not isinstance(scheme.weight.granularity, PerGroup) or scheme.weight.granularity.ragged
    )
    weight, activations = scheme.weight, scheme.input
    if weight is not None:
        text = ""
        if isinstance(weight.grid, NF4):
            text = "nf4-dq" if weight.grid.double_quant else "nf4"
        else:
            bits = "1.58" if isinstance(weight.grid, Ternary) else str(weight.grid.bits)
            text = f"w{bits}a{activations.grid.bits if activations else 16}"
            text += f"-g{weight.group_size}" if weight.group_size else ""
            if isinstance(weight.grid, Int) and not weight.grid.symmetric:
                text += "-asym"
            text += "-balanced" if isinstance(weight.grid, Balanced) else ""
            text += "-static" if activations and not activations.dynamic else ""
        if _parse(text) == scheme.with_ragged(True):
            return text if ragged else text + " (no ragged group)"
    return str(to_json(scheme))


_TAGS: dict[str, type] = {
    cls.__name__: cls
    for cls in (Int, NF4, Balanced, Ternary, Binary, PerTensor, PerChannel, PerGroup, PerToken, QuantSpec, Scheme)
}


def to_json(value: Any) -> Any:
    """A spec as JSON data: each object carries its type under "is"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"is": type(value).__name__, **fields}
    return value


def from_json(data: Any) -> Any:
    """The spec that `to_json` wrote; None, for what has none, is itself.

    Raises: UsageError on an unknown type or key, a missing key, or a value of the wrong type, naming it.
    """
    if data is None:
        return None
    if not isinstance(data, dict):
        raise UsageError(f"{data!r} is no spec; a spec is an object with its type under 'is'")
    data = dict(data)
    tag = data.pop("is", None)
    cls = _TAGS.get(tag) if isinstance(tag, str) else None
    if cls is None:
        raise UsageError(f"unknown kind {tag!r} in a spec; known are {', '.join(_TAGS)}")
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    if unknown := set(data) - known:
        raise UsageError(f"unknown key {sorted(unknown)[0]!r} in {tag}; it has {', '.join(sorted(known)) or 'none'}")
    hints = get_type_hints(cls)
    values = {key: from_json(value) if isinstance(value, dict) else value for key, value in data.items()}
    for key, value in values.items():
        if not _fits(value, hints[key]):
            raise UsageError(f"{tag} has {key}={data[key]!r}, which is of the wrong type")
    required = {f.name for f in dataclasses.fields(cls) if f.init and f.default is dataclasses.MISSING}
    if missing := required - set(values):
        raise UsageError(f"{tag} lacks its {sorted(missing)[0]!r}")
    result: Any = cls(**values)
    return result


def _fits(value: Any, hint: Any) -> bool:
    """Whether a field of this type may hold this value: exactly, so that neither True nor 4.0 is an int."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    return type(value) in (get_args(hint) or (hint,))
