"""What can be asked for:   quantailor schemes"""

from __future__ import annotations

from quantailor.cli import options as o
from quantailor.spec import KNOWN_SCHEMES


def schemes(json: o.JsonOption = False) -> None:
    """List the schemes, with what each is for. Other sizes of the same form are as good.

    Example:  quantailor schemes
    """
    width = max(map(len, KNOWN_SCHEMES))
    lines = [f"{name:<{width}}  {meaning}" for name, meaning in KNOWN_SCHEMES.items()]
    form = "form: w<2-8|1.58|1>a<2-8|16|1>[-g<size>][-asym|-balanced][-static]"
    o.show({"schemes": KNOWN_SCHEMES}, "\n".join([*lines, form]), json)
