"""What to quantize to: frozen data, with one string and one JSON form.

A `QuantSpec` says how one tensor is quantized, a `Scheme` how one module is: its weight, its input, its output.
The string of a scheme (`w4a16-g32`, `w8a8-static`, `nf4-dq`, `w1.58a8`) means the same in PTQ, QAT, search and export.

    w<bits>a<bits>[-g<size>][-ag<size>][-asym|-balanced][-static[-<range>]|-outliers[<threshold>]]
        bits of weights and activations (16 = left alone), groups of weights and of activations, the weights' grid;
        activation scales fixed beforehand and how, or outlier columns kept in float (llm.int8 = w8a8-outliers)
    nf4 | nf4-dq      4-bit NormalFloat, blocks of 64; scales quantized again
    float             no quantization: the control

Conventions: integer zero point, x_hat = (q - zero_point) * scale, round half to even; a symmetric grid is
-2^(b-1) .. 2^(b-1)-1, or without its lowest level where `narrow`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from quantailor.errors import UsageError

RangeMethod = Literal["minmax", "ema", "mse", "percentile", "kl", "histogram"]  # the last two are one


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
    """One scale for each run of `size` elements along the input, of an output row of a weight or of a row of
    activations; the last run of a row may be shorter if `ragged`. `indexed`: which group each input of a weight is in
    is listed beside it (act-order of GPTQ, arXiv:2210.17323); only read from others' files, never chosen."""

    size: int
    ragged: bool = True
    indexed: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"group size {self.size} must be at least 1; use 32, 64 or 128")


@dataclass(frozen=True)
class PerToken:
    """One scale a row of activations."""


Granularity = PerTensor | PerChannel | PerGroup | PerToken


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized. `range`: how its scale is first found; `dynamic`: at each call from the data.

    `outliers` (LLM.int8, arXiv:2208.07339): input columns that hold a magnitude of this size or more, in any row of a
    call, stay in float. `percentile`: what `range="percentile"` covers, in % of the values.
    """

    grid: Grid
    granularity: Granularity
    dynamic: bool = False
    range: RangeMethod = "mse"
    outliers: float | None = None
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.range not in get_args(RangeMethod):
            raise UsageError(f"range={self.range!r} is none of {', '.join(get_args(RangeMethod))}")
        if not 50 < self.percentile <= 100:
            raise UsageError(f"percentile={self.percentile} must lie in (50, 100]; 99.99 is usual")
        if self.percentile != 99.99 and self.range != "percentile":
            raise UsageError(
                f"percentile={self.percentile} says nothing to range={self.range!r}; use range='percentile'"
            )
        if self.outliers is not None:
            if not (math.isfinite(self.outliers) and self.outliers > 0):
                raise UsageError(f"outliers={self.outliers} must be a finite magnitude above 0; the paper's is 6.0")
            if not (self.dynamic and isinstance(self.granularity, PerToken) and isinstance(self.grid, Int)):
                raise UsageError(
                    "outliers are taken out of rows that get one scale at each call; "
                    "use an integer grid, PerToken() and dynamic=True with them"
                )
        if isinstance(self.granularity, PerToken) and not self.dynamic:
            raise UsageError(
                "a per-token scale is only known at each call; use dynamic=True, or PerTensor for a static one"
            )
        if isinstance(self.grid, NF4) and not isinstance(self.granularity, PerGroup):
            raise UsageError("NF4 is defined on blocks; use PerGroup(64)")

    @property
    def group_size(self) -> int | None:
        return self.granularity.size if isinstance(self.granularity, PerGroup) else None

    @property
    def is_indexed(self) -> bool:
        """Whether a list says which group an input is in."""
        return isinstance(self.granularity, PerGroup) and self.granularity.indexed


@dataclass(frozen=True)
class Scheme:
    """The specs of one module. All three None: the module computes in float."""

    weight: QuantSpec | None = None
    input: QuantSpec | None = None
    output: QuantSpec | None = None

    def __post_init__(self) -> None:
        if any(spec is not None and spec.outliers is not None for spec in (self.weight, self.output)):
            raise UsageError("outliers are columns of an input; weights and outputs have none: leave it out there")
        if any(spec is not None and spec.is_indexed for spec in (self.input, self.output)):
            raise UsageError("a list of groups is a weight's alone; leave indexed out for inputs and outputs")
        if self.weight is not None and self.weight.is_indexed and self.input is not None:
            raise UsageError(
                "groups in act-order do not meet quantized inputs: an integer sum needs its group in one run; "
                "leave the inputs in float"
            )
        mine, theirs = (spec.group_size if spec else None for spec in (self.weight, self.input))
        if mine is not None and theirs is not None and mine != theirs:
            raise UsageError(
                f"groups of {mine} weights and of {theirs} activations do not meet: an integer sum needs one scale of "
                f"each; use -g{mine}-ag{mine} or -g{theirs}-ag{theirs}, or leave one of the two out"
            )

    @staticmethod
    def parse(text: str) -> Scheme:
        """The scheme that `text` names.

        Raises: UsageError: why these parts cannot go together, or else the nearest known schemes.

        >>> Scheme.parse("w4a16-g32").weight.granularity
        PerGroup(size=32, ragged=True, indexed=False)
        """
        scheme = _parse(text.strip().lower())
        if scheme is None:
            near = difflib.get_close_matches(text.lower(), KNOWN_SCHEMES, n=3, cutoff=0.3) or list(KNOWN_SCHEMES)[:3]
            raise UsageError(
                f"unknown scheme {text!r}; did you mean {', '.join(near)}? "
                f"The form is {FORM}; `quantailor schemes` lists them"
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


FORM = "w<2-8|1.58|1>a<2-8|16|1>[-g<size>][-ag<size>][-asym|-balanced][-static[-<range>]|-outliers[<threshold>]]"


def why_not_convolution(scheme: Scheme) -> str | None:
    """Why a convolution cannot have this scheme, with the way out; None if it can."""
    spec = scheme.input
    if spec is None or (spec.outliers is None and spec.group_size is None):
        return None
    what = "outlier columns" if spec.outliers is not None else f"groups of {spec.group_size} inputs"
    return (
        f"{scheme} cannot be a convolution's: {what} are of a matrix product's rows, and a convolution sees an image "
        "with one scale; give it w8a8 or w8a8-static by a rule, or keep it"
    )


# What `quantailor schemes` lists, with what each is for. Other sizes of the same form are as good.
KNOWN_SCHEMES: dict[str, str] = {
    "float": "no quantization: fine-tunes a bare model, and is the control of every QAT figure",
    "w8a16": "8-bit weights, a scale an output channel; activations float",
    "w8a8": "8-bit weights and activations, scale of each token found at run time",
    "w8a8-static": "8-bit weights and activations, activation scales calibrated beforehand (least squared error)",
    "w8a8-static-minmax": "the same, ranges from the smallest to the largest value seen",
    "w8a8-static-percentile": "the same, ranges that hold 99.99 % of the values; -percentile99.9 and others as well",
    "w8a8-static-kl": "the same, ranges of least KL divergence (TensorRT's entropy calibration)",
    "w8a8-outliers": "LLM.int8: 8 bits, but input columns with a value of 6 or more stay in float; any threshold",
    "w8a8-ag64": "8-bit weights and activations, a scale for 64 inputs of each token",
    "w4a16": "4-bit weights, a scale an output channel",
    "w4a16-g32": "4-bit weights, groups of 32",
    "w4a16-g64": "4-bit weights, groups of 64",
    "w4a16-g128": "4-bit weights, groups of 128: what most LLM servers run",
    "w4a16-g128-asym": "the same with a zero point a group",
    "w4a8-g32": "4-bit weights in groups of 32, 8-bit activations",
    "w4a8-g32-ag32": "the same with a scale for 32 inputs of each token",
    "w3a16-g32": "3-bit weights, groups of 32",
    "w2a16-g32": "2-bit weights, groups of 32: needs QAT",
    "w2a16-g64": "2-bit weights, groups of 64: needs QAT",
    "w2a16-g32-balanced": "2-bit weights on the levels ±1/4, ±3/4 of each group's range",
    "nf4": "4-bit NormalFloat weights, blocks of 64 (QLoRA)",
    "nf4-dq": "the same, with scales quantized to 8 bits in blocks of 256: 4.127 bits a weight",
    "w1.58a8": "ternary weights, 8-bit activations (BitNet b1.58)",
    "w1a1": "binary weights and activations (XNOR-Net)",
}

_NUMBER = r"\d+(?:\.\d+)?"
_FORM = re.compile(
    r"w(?P<weight>1\.58|[1-8])a(?P<input>16|[1-8])(?:-g(?P<group>\d+))?(?:-ag(?P<input_group>\d+))?"
    r"(?P<kind>-asym|-balanced)?"
    rf"(?P<static>-static(?:-(?P<range>minmax|ema|mse|kl|histogram|percentile(?P<percentile>{_NUMBER})?))?)?"
    rf"(?P<outliers>-outliers(?P<threshold>{_NUMBER})?)?"
)
_ALIASES = {"llm.int8": "w8a8-outliers", "llm.int8()": "w8a8-outliers"}
_LLM_INT8_THRESHOLD = 6.0  # arXiv:2208.07339, section 3.2
_NF4_IS_4_BITS = (
    "NF4 is 4 bits by definition, a table of 16 quantiles of a normal distribution for weights (QLoRA): it has no "
    "8-bit form, and no integer product with quantized activations. "
    "Use nf4 or nf4-dq for 4 bits, w8a16 or w8a8 for 8, w4a8-g32 for 4-bit weights with 8-bit activations"
)


def _parse(text: str) -> Scheme | None:
    """The scheme that `text` names, None if it has not the form. Raises: UsageError where its parts contradict."""
    if text == "float":
        return Scheme()
    if text in ("nf4", "nf4-dq"):
        return Scheme(weight=QuantSpec(NF4(double_quant=text.endswith("-dq")), PerGroup(64), range="minmax"))
    if _mixes_nf4(text):
        raise UsageError(f"scheme {text!r} cannot be: {_NF4_IS_4_BITS}")
    match = _FORM.fullmatch(_ALIASES.get(text, text))
    if match is None:
        return None
    part = match.groupdict()
    if reason := _why_not(part):
        raise UsageError(f"scheme {text!r} cannot be: {reason}")
    grid: Grid
    if part["weight"] in _SIGNS:
        grid = Ternary() if part["weight"] == "1.58" else Binary()
    elif part["kind"] == "-balanced":
        grid = Balanced(2)
    else:
        grid = Int(int(part["weight"]), symmetric=part["kind"] != "-asym")
    granularity = PerGroup(int(part["group"])) if part["group"] else PerChannel()
    return Scheme(weight=QuantSpec(grid, granularity), input=_activations(part))


def _activations(part: dict[str, Any]) -> QuantSpec | None:
    """The input's spec of a matched string."""
    if part["input"] == "16":
        return None
    grid: Grid = Binary() if part["input"] == "1" else Int(int(part["input"]))
    if part["static"]:
        method = (part["range"] or "mse").removesuffix(part["percentile"] or "")
        return QuantSpec(grid, PerTensor(), range=method, percentile=float(part["percentile"] or 99.99))  # type: ignore[arg-type]
    if part["input_group"]:
        return QuantSpec(grid, PerGroup(int(part["input_group"])), dynamic=True, range="minmax")
    threshold = float(part["threshold"] or _LLM_INT8_THRESHOLD) if part["outliers"] else None
    return QuantSpec(grid, PerToken(), dynamic=True, range="minmax", outliers=threshold)


_SIGNS = {"1.58": "ternary weights are -1, 0 and 1", "1": "binary weights are -1 and 1"}


def _why_not(part: dict[str, Any]) -> str | None:
    """Why the parts of a string cannot go together, with the way out; None if they can."""
    bits, inputs = part["weight"], part["input"]
    scales = {
        "static": ("-static", "static scales are fixed beforehand"),
        "input_group": (f"-ag{part['input_group']}", "the scales of groups are found at each call"),
        "outliers": ("-outliers", "outlier columns are chosen at each call, and the rest of a row has one scale"),
    }
    asked = [scales[key][0] for key in scales if part[key]]
    reasons = [scales[key][1] for key in scales if part[key]]
    if part["kind"] and bits in _SIGNS:
        sizes = f"-g{part['group']}" if part["group"] else ""
        return (
            f"{_SIGNS[bits]} times a scale, levels that are fixed and mirrored around 0; "
            f"leave {part['kind']} out, or use w2a{inputs}{sizes}{part['kind']}"
        )
    if part["kind"] == "-balanced" and bits != "2":
        return f"the balanced grid is for 2 bits; use w2a{inputs}-balanced, or leave -balanced out"
    if asked and inputs == "16":
        return f"a16 leaves activations in float, where {asked[0]} means nothing; use a8, or leave {asked[0]} out"
    if asked and inputs == "1":
        return (
            "binary activations have the mean magnitude of each token as their scale (XNOR-Net); "
            f"leave {asked[0]} out, or use a8"
        )
    if len(asked) > 1:
        return f"{reasons[0]}, but {reasons[1]}; leave {asked[0]} or {asked[1]} out"
    return None


def _mixes_nf4(text: str) -> bool:
    """Whether a string asks for NormalFloat of other than 4 bits, or for NF4 together with another width."""
    match = re.search(r"nf(\d+)", text)
    if match is None:
        return False
    rest = text[: match.start()] + " " + text[match.end() :]
    return match[1] != "4" or re.search(r"w\d|a\d|int\d|\d.?bit", rest) is not None


def _name(scheme: Scheme) -> str:
    """The string of a scheme that has one, else its JSON (which `Scheme.parse` does not take)."""
    if scheme.is_float:
        return "float"
    if scheme.output is not None and (without := _name(dataclasses.replace(scheme, output=None))) != "float":
        activations_only = Scheme(Scheme.parse("w8a16").weight, scheme.output)
        return f"{without}, output {_name(activations_only).removeprefix('w8')}"
    weight, activations = scheme.weight, scheme.input
    suffix = ""
    if weight is not None and isinstance(weight.granularity, PerGroup):
        suffix += " (no ragged group)" if not weight.granularity.ragged else ""
        suffix += " (act-order)" if weight.granularity.indexed else ""
    if weight is not None:
        text = ""
        if isinstance(weight.grid, NF4):
            text = "nf4-dq" if weight.grid.double_quant else "nf4"
        else:
            bits = "1.58" if isinstance(weight.grid, Ternary) else str(weight.grid.bits)
            text = f"w{bits}a{activations.grid.bits if activations else 16}"
            text += f"-g{weight.group_size}" if weight.group_size else ""
            text += f"-ag{activations.group_size}" if activations and activations.group_size else ""
            if isinstance(weight.grid, Int) and not weight.grid.symmetric:
                text += "-asym"
            text += "-balanced" if isinstance(weight.grid, Balanced) else ""
            text += _activation_suffix(activations) if activations else ""
        if _means(text, _plain(scheme)):
            return text + suffix
    return str(to_json(scheme))


def _plain(scheme: Scheme) -> Scheme:
    """The scheme without what no string names: a refused ragged group, a list of groups."""
    if scheme.weight is None or not isinstance(scheme.weight.granularity, PerGroup):
        return scheme
    granularity = PerGroup(scheme.weight.granularity.size)
    return dataclasses.replace(scheme, weight=dataclasses.replace(scheme.weight, granularity=granularity))


def _activation_suffix(spec: QuantSpec) -> str:
    if spec.outliers is not None:
        return "-outliers" + ("" if spec.outliers == _LLM_INT8_THRESHOLD else f"{spec.outliers:.15g}")
    if spec.dynamic:
        return ""
    percentile = f"{spec.percentile:.15g}" if spec.percentile != 99.99 else ""
    return "-static" + (f"-{spec.range}{percentile}" if spec.range != "mse" else "")


def _means(text: str, scheme: Scheme) -> bool:
    try:
        return _parse(text) == scheme
    except UsageError:  # parts that no string can name together
        return False


_TAGS: dict[str, type] = {
    cls.__name__: cls
    for cls in (Int, NF4, Balanced, Ternary, Binary, PerTensor, PerChannel, PerGroup, PerToken, QuantSpec, Scheme)
}


def to_json(value: Any) -> Any:
    """A spec as JSON data: each object carries its type under "is". What only some schemes have is left out of others,
    so that readers that do not know of it take them as before."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        rare = {"outliers": None, "percentile": 99.99, "indexed": False}
        kept = {k: to_json(v) for k, v in fields.items() if not (k in rare and v == rare[k])}
        return {"is": type(value).__name__, **kept}
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
    _check_not_bitsandbytes(data)
    tag = data.pop("is", None)
    cls = _TAGS.get(tag) if isinstance(tag, str) else None
    if cls is None:
        raise UsageError(f"unknown kind {tag!r} in a spec; known are {', '.join(_TAGS)}")
    if cls is NF4 and data.get("bits", 4) != 4:
        raise UsageError(f"NF4 with bits={data['bits']!r} cannot be: {_NF4_IS_4_BITS}")
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    if unknown := set(data) - known:
        raise UsageError(f"unknown key {sorted(unknown)[0]!r} in {tag}; it has {', '.join(sorted(known)) or 'none'}")
    hints = _hints(cls)
    values = {key: from_json(value) if isinstance(value, dict) else value for key, value in data.items()}
    for key, value in values.items():
        if not _fits(value, hints[key]):
            raise UsageError(f"{tag} has {key}={data[key]!r}, which is of the wrong type")
    required = {f.name for f in dataclasses.fields(cls) if f.init and f.default is dataclasses.MISSING}
    if missing := required - set(values):
        raise UsageError(f"{tag} lacks its {sorted(missing)[0]!r}")
    result: Any = cls(**values)
    return result


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _check_not_bitsandbytes(data: dict[str, Any]) -> None:
    """Raises: UsageError for the options of a BitsAndBytesConfig, with the scheme that means them."""
    options = [key for key in data if isinstance(key, str) and key.startswith(("load_in_", "bnb_4bit_", "llm_int8_"))]
    if not options:
        return
    if data.get("load_in_8bit") and "nf4" in map(str, data.values()):
        raise UsageError(f"load_in_8bit with nf4 cannot be: {_NF4_IS_4_BITS}")
    raise UsageError(
        f"{options[0]!r} is an option of bitsandbytes, not of a spec: load_in_8bit is the scheme w8a8-outliers, "
        "load_in_4bit with nf4 is nf4, with bnb_4bit_use_double_quant nf4-dq"
    )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a field of this type may hold this value: exactly, so that neither True nor 4.0 is an int; a whole number
    may stand for a float."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    types = get_args(hint) or (hint,)
    return type(value) in types or (type(value) is int and float in types)
