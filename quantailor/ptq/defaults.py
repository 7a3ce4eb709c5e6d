"""Which method a scheme gets where none is named: the measured best of its cost class (docs/BENCHMARKS.md).

Three classes: no solver (RTN with a searched range, a second for a small model), one pass of a solver (Qronos), and
descent on whole blocks (Block-AP from Qronos' integers, a minute for a small model). Where activations are quantized,
SmoothQuant comes first; it leaves a layer alone where smoothing would not lower its error.
"""

from __future__ import annotations

from quantailor.spec import NF4, Scheme


def one_pass(scheme: Scheme) -> str:
    """The method of `quantize` and the start of `train`."""
    if scheme.weight is None:
        return "rtn"
    return _smoothed(scheme, "qronos")


def rungs(scheme: Scheme) -> tuple[str, ...]:
    """What `fit` tries before it trains, cheapest first."""
    if scheme.weight is None:
        return ("rtn",)
    if isinstance(scheme.weight.grid, NF4):  # no steps that descent could round between
        return ("rtn", _smoothed(scheme, "qronos"))
    return ("rtn", _smoothed(scheme, "qronos"), _smoothed(scheme, "blockap"))


def _smoothed(scheme: Scheme, method: str) -> str:
    return method if scheme.input is None else f"smoothquant+{method}"
