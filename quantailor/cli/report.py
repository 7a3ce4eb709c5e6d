"""One page with pictures:   quantailor report ./model-w4 --float ./model"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantailor.cli import options as o


def report(
    path: Annotated[
        Path,
        typer.Argument(
            help="a folder that fit, train or quantize saved, a folder of several, or a file with a command's --json",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="the HTML file; by default NAME.html beside the folder, never in it")
    ] = None,
    lang: Annotated[str, typer.Option(help="en or zh")] = "en",
    layer: Annotated[
        str | None, typer.Option(help="whose weights and inputs are drawn; by default the one that rounding hurt most")
    ] = None,
    float_model: Annotated[
        Path | None,
        typer.Option("--float", help="the float parent: its weights and its text beside the quantized ones"),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="text to continue, repeatable; by default from the rows kept for the proof")
    ] = None,
    receipts_only: Annotated[
        bool, typer.Option("--receipts-only", help="load no model: neither distributions nor text")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier report")] = False,
    json: o.JsonOption = False,
) -> None:
    """Write one self-contained HTML page: the verdict first, then figures, charts and every layer.

    Example:  quantailor report ./model-w4 --float ./model --lang zh

    The page needs no network and no other file; a folder of several fits becomes a comparison.
    """
    from quantailor.verbs.reporting import report as write

    written = write(
        path, out, lang, layer, prompt, float_model, weights=not receipts_only, overwrite=overwrite
    )  # fmt: skip
    size = written.stat().st_size
    o.show(
        {"out": str(written), "size_bytes": size, "lang": lang},
        f"{written}: {size:,} bytes, open it in a browser",
        json,
    )
