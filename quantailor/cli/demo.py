"""The main job on the built-in model:   quantailor demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantailor.cli import options as o
from quantailor.cli.console import progress


def demo(
    out: Annotated[
        Path | None, typer.Option(help="keep the three folders here; by default they are thrown away")
    ] = None,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Fit the small built-in model to 8, 4 and 2 bits. No download: the text is Python's own documentation.

    Example:  quantailor demo
    """
    from quantailor import demo as demonstration

    result = demonstration.run(out, progress(quiet))
    o.show(result, demonstration.table(result), json)
