"""PTQ, hybrid, QAT, LoRA-QAT, progressive or from scratch: a tree of rules, each with what it rests on.

The tree asks in this order: is there a kernel, are there weights to start from, does PTQ stay within the tolerance, is
there data, is there money, does it fit, how few bits, how far is PTQ from the goal. The answer cites every rule that
was passed, and `why_not` says of any other way which rule left it. `fit` remains the judge: it measures what the tree
expects, and where both were asked on real models docs/PLANNING.md says whether they agreed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantailor.cost.figures import Basis
from quantailor.errors import UsageError

WAYS = ("ptq", "hybrid", "qat", "lora-qat", "progressive", "scratch", "none")
MEANING = {
    "ptq": "post-training quantization",
    "hybrid": "PTQ, then a short QAT",
    "qat": "PTQ, then a longer QAT",
    "lora-qat": "QAT of adapters inside the rounding",
    "progressive": "QAT in stages of falling bits",
    "scratch": "training from scratch, quantized from the first step",
    "none": "leave it as it is",
}
FEW_ROWS = 1000  # below: a feasibility probe, not a training set (the 1000-sample rule of a common guide)
FRAGILE = 1_000_000  # parameters below which models lost more than the table's low end: stories260k has 260,032


@dataclass(frozen=True)
class Expected:
    """Relative loss of the best PTQ: `low` on a robust model, `high` on a fragile one."""

    low: float
    high: float
    basis: Basis
    source: str


# Of PTQ's loss, by QAT with its defaults at 4 bits on the fragile model; the longer one learns from the data as well.
_TAKEN_BACK = {"hybrid": 0.18, "qat": 0.77}
_FIT = "bench/results/fit_stories260k.json and fit_tinystories-llama-4m.json"
_PTQ = "bench/results/ptq_quality.json, best PTQ of both models (docs/BENCHMARKS.md)"
# (bits, in groups of at most 128) -> what PTQ is expected to lose, in perplexity.
LOSSES: dict[tuple[int, bool], Expected] = {
    (8, True): Expected(0.0007, 0.0011, "measured", _FIT),
    (8, False): Expected(0.0007, 0.0011, "measured", _FIT),
    (4, True): Expected(0.0003, 0.0313, "measured", _PTQ),
    (4, False): Expected(
        0.031, 0.14, "table", "pc: OPT-125M 29.5 and 31.4 of 27.65 (OmniQuant, arXiv:2308.13137, A20)"
    ),
    (3, True): Expected(0.0062, 0.159, "measured", _PTQ + "; 512 rows for the fragile one"),
    (3, False): Expected(0.29, 1.5, "table", "pc: OPT-125M 35.7 and 69 of 27.65 (OmniQuant, arXiv:2308.13137, A20)"),
    (2, True): Expected(0.0443, 0.98, "measured", _PTQ + "; 512 rows for the fragile one"),
    (2, False): Expected(1.0, math.inf, "table", "Llama-2-7B pc: 37.4 of 5.47 (OmniQuant, arXiv:2308.13137, table 1)"),
    (1, True): Expected(1.0, math.inf, "assumed", "no PTQ result at 1 bit or ternary is known to us"),
    (1, False): Expected(1.0, math.inf, "assumed", "no PTQ result at 1 bit or ternary is known to us"),
}


@dataclass(frozen=True)
class Facts:
    """What the tree is asked about. Amounts and sizes are the plan's own; None where nothing limits.

    `bits` of the weights (1 to 8), `grouped`: scales for at most 128 inputs; `ternary_or_binary`: a grid with signs.
    `architecture` "native": made for its few bits and without a float parent, such as BitNet. `costs`: way -> money
    (or hours, in the unit of `budget`), `fits`: way -> whether its memory is there. `parameters` of the whole model.
    """

    bits: int
    grouped: bool
    parameters: int
    pretrained: bool = True
    architecture: str = "standard"
    ternary_or_binary: bool = False
    rows: int | None = None  # None: no training data at all
    tolerance: float = 0.02
    budget: float | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    fits: Mapping[str, bool] = field(default_factory=dict)
    kernel: bool = True
    must_be_faster: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UsageError(f"bits={self.bits} must be 1 to 8")
        if self.architecture not in ("standard", "native"):
            raise UsageError(f"architecture={self.architecture!r} is neither standard nor native")
        if not 0 <= self.tolerance < 1:
            raise UsageError(f"tolerance={self.tolerance} must be 0 or more and below 1")

    @property
    def expected(self) -> Expected:
        bits = 1 if self.ternary_or_binary else next(b for b in (8, 4, 3, 2, 1) if self.bits >= b)
        return LOSSES[bits, self.grouped or bits == 1]

    def affords(self, way: str) -> bool:
        return self.budget is None or self.costs.get(way, 0.0) <= self.budget

    def holds(self, way: str) -> bool:
        return self.fits.get(way, True)


@dataclass(frozen=True)
class Reason:
    """A rule that was passed: what it says here, and what it rests on."""

    rule: str
    text: str
    basis: Basis
    source: str

    def to_json(self) -> dict[str, str]:
        return {"rule": self.rule, "text": self.text, "basis": self.basis, "source": self.source}


@dataclass(frozen=True)
class Decision:
    """`leaf` names the place in the tree; `within` whether the tolerance is expected to be met: None, not known."""

    way: str
    leaf: str
    within: bool | None
    reasons: tuple[Reason, ...]
    rejected: Mapping[str, str]
    warnings: tuple[str, ...] = ()

    def why_not(self, way: str) -> str:
        """Why another way was left. Raises: UsageError for one that there is not, or the one that was taken."""
        if way not in WAYS:
            raise UsageError(f"{way!r} is no way; ask about one of {', '.join(WAYS)}")
        if way == self.way:
            raise UsageError(f"{way} is what was chosen: {self.reasons[-1].text}")
        return self.rejected[way]

    def to_json(self) -> dict[str, Any]:
        return {
            "way": self.way,
            "meaning": MEANING[self.way],
            "leaf": self.leaf,
            "expected_within_tolerance": self.within,
            "reasons": [reason.to_json() for reason in self.reasons],
            "why_not": dict(self.rejected),
            "warnings": list(self.warnings),
        }


_GUIDE = "bench/results/routes.json: from trained weights, training at the target width won at every width"
_PARETO = "ParetoQ, arXiv:2502.02631: 90 % float and 10 % QAT of one token budget beat scratch at 1, 1.58 and 2 bits"
_ROUTES = "bench/results/routes.json: perplexity 9.28 directly, 12.44 in stages at 2 bits; five seeds, equal tokens"
LEAVES = (
    "no kernel", "native scratch", "no weights", "no weights, no data", "ptq is enough", "no data", "no money",
    "no memory", "lora", "few bits", "near", "few rows", "short of money", "within reach", "far",
)  # fmt: skip


def decide(facts: Facts) -> Decision:
    """The way, with reasons. Every `Facts` has an answer."""
    passed: list[Reason] = []
    warnings: list[str] = []

    def rule(name: str, text: str, basis: Basis, source: str) -> None:
        passed.append(Reason(name, text, basis, source))

    def answer(way: str, leaf: str, within: bool | None) -> Decision:
        assert leaf in LEAVES
        return Decision(way, leaf, within, tuple(passed), _rejected(way, leaf, facts), tuple(warnings))

    if not facts.kernel:
        text = "no runtime known to us multiplies this scheme on the target: smaller there, not faster"
        if facts.must_be_faster:
            rule("kernel", text + ", and speed is what is asked for", "table", "runtimes' own lists, cost/hardware.py")
            return answer("none", "no kernel", None)
        warnings.append(text)
    if not facts.pretrained:
        if facts.rows is None:
            rule("weights", "there are neither weights to start from nor data to train on", "counted", "what you said")
            return answer("none", "no weights, no data", None)
        leaf = "native scratch" if facts.architecture == "native" else "no weights"
        why = (
            "the architecture is made for few bits and has no float parent"
            if facts.architecture == "native"
            else "there are no trained weights to start from"
        )
        rule("weights", why, "counted", "what you said")
        if not facts.affords("scratch"):
            warnings.append("the budget does not pay for it; a pretrained model of this size is the cheaper way")
        return answer("scratch", leaf, None)
    rule("weights", "trained weights are there: start from them", "table", _PARETO if facts.bits <= 2 else _GUIDE)
    expected = facts.expected
    fragile = facts.parameters < FRAGILE
    loss = expected.high if fragile else expected.low
    kind = "fragile" if fragile else "robust"
    size = "inf" if math.isinf(loss) else f"{loss:.2%}"
    text = f"the best PTQ at these bits is expected to lose {size} on a {kind} model, tolerance {facts.tolerance:.2%}"
    rule("expected loss", text, expected.basis, expected.source)
    if expected.low <= facts.tolerance < expected.high:
        warnings.append("models differ here by more than the tolerance: `fit` measures before it trains")
    if loss <= facts.tolerance:
        return answer("ptq", "ptq is enough", True)
    if facts.rows is None:
        rule("data", "QAT needs data to train on, and there is none", "counted", "what you said")
        return answer("ptq", "no data", False)
    if not facts.affords("hybrid"):
        rule("budget", f"even a short QAT costs {facts.costs['hybrid']:,.2f}, over the budget", "counted", "this plan")
        return answer("ptq", "no money", False)
    if not facts.holds("qat"):
        if not facts.holds("lora-qat"):
            rule("memory", "neither full nor LoRA-QAT fits the memory", "measured", "this plan's memory")
            return answer("ptq", "no memory", False)
        rule("memory", "full QAT does not fit the memory, adapters inside the rounding do", "measured", "this plan")
        return answer("lora-qat", "lora", None)
    if facts.bits <= 2 or facts.ternary_or_binary:
        if not fragile and not facts.ternary_or_binary and facts.rows < FEW_ROWS:
            rule("data", f"{facts.rows} rows are too few for more than a short run", "assumed", "the 1000-sample rule")
            return answer("hybrid", "few rows", False)
        if not facts.affords("qat"):
            rule("budget", "the budget pays for a short QAT, not for a longer one", "counted", "this plan")
            return answer("hybrid", "short of money", False)
        text = "at 2 bits and fewer PTQ alone is far off, and training at the target width beats stages of equal length"
        rule("bits", text, "measured", _ROUTES)
        return answer("qat", "few bits", False if fragile else None)
    if facts.rows < FEW_ROWS:
        rule("data", f"{facts.rows} rows are too few for more than a short run", "assumed", "the 1000-sample rule")
        return answer("hybrid", "few rows", None)
    source = "bench/results/fit_stories260k.json, w4a16-g32, three seeds, mean"
    short, longer = ((1 - _TAKEN_BACK[way]) * loss for way in ("hybrid", "qat"))
    if short <= facts.tolerance:
        text = (
            f"PTQ is near: a short QAT took back {_TAKEN_BACK['hybrid']:.0%} of the loss on the fragile model at 4 bits"
        )
        rule("distance", text, "measured", source)
        return answer("hybrid", "near", True)
    if not facts.affords("qat"):
        rule("budget", "the budget pays for a short QAT, not for a longer one", "counted", "this plan")
        return answer("hybrid", "short of money", None)
    reached = longer <= facts.tolerance
    where = "within reach of a longer QAT" if reached else "far off"
    share = f"{_TAKEN_BACK['qat']:.0%}"
    text = f"PTQ is {where}: it took back {share} on the fragile model at 4 bits, which would leave {longer:.2%}"
    rule("distance", text, "measured", source)
    return answer("qat", "within reach" if reached else "far", reached)


def _rejected(way: str, leaf: str, facts: Facts) -> dict[str, str]:
    """Of every other way, the rule that left it."""
    found: dict[str, str] = {}
    for other in WAYS:
        if other != way:
            found[other] = _why_not(other, way, leaf, facts)
    return found


def _why_not(other: str, way: str, leaf: str, facts: Facts) -> str:
    if way == "none":
        if leaf == "no kernel":
            return "the target has no kernel for this scheme, and speed is asked for: choose another scheme"
        return "there is nothing to start from: no weights, no data"
    if other == "none":
        return "there is a way that can be tried"
    if way == "scratch":
        return "it starts from trained weights, and there are none"
    if other == "scratch":
        return (
            f"trained weights are there; scratch costs many times a fine-tune and is no better even at 1 bit: {_PARETO}"
        )
    if way == "ptq" and leaf == "ptq is enough":
        return "PTQ is expected to meet the tolerance; training would cost more and cannot be needed"
    if way == "ptq":
        reason = {"no data": "there is no data to train on", "no money": "the budget does not pay for training"}
        return reason.get(leaf, "it does not fit the memory")
    if other == "ptq":
        return f"it is expected to lose more than the tolerance of {facts.tolerance:.2%}; it is still tried first"
    if other == "lora-qat":
        return "full QAT fits the memory, and trains more than adapters do"
    if way == "lora-qat":
        return "its weights, gradients and optimizer do not fit the memory"
    if other == "progressive":
        return f"of equal length, stages ended behind training at the target width at 4 bits and fewer: {_ROUTES}"
    if other == "hybrid":
        return "a short run is not expected to be enough at this distance; `fit` tries it on the way"
    if leaf == "near":
        return "a short run is expected to be enough"
    return "too few rows for a longer run" if leaf == "few rows" else "the budget does not pay for a longer run"
