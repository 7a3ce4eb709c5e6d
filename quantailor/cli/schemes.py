"""What can be asked for:   quantailor schemes"""

from __future__ import annotations

from quantailor.cli import options as o
from quantailor.spec import FORM, KNOWN_SCHEMES


def schemes(json: o.JsonOption = False) -> None:
    """List the schemes, with what each is for. Other sizes of the same form are as good.

    Example:  quantailor schemes
    """
    width = max(map(len, KNOWN_SCHEMES))
    lines = [f"{name:<{width}}  {meaning}" for name, meaning in KNOWN_SCHEMES.items()]
    ends = [
        f"form: {FORM}",
        "ranges of -static: mse (the default), minmax, ema, percentile<99.99>, kl, also called histogram",
        "alias: llm.int8 is w8a8-outliers; a threshold follows its name, w8a8-outliers4.5",
    ]
    o.show({"schemes": KNOWN_SCHEMES}, "\n".join([*lines, *ends]), json)
