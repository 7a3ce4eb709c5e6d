"""Enough, and of the right kind?   quantailor calibration ./model --data calib.txt --eval-data valid.txt"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantailor.cli import options as o
from quantailor.cli.console import progress


def calibration(
    model: o.ModelArgument,
    data: Annotated[Path, typer.Option(help="calibration data", show_default=False)],
    eval_data: Annotated[
        Path | None, typer.Option(help="what the model will be measured on: also told whether both are alike")
    ] = None,
    scheme: Annotated[str, typer.Option("--scheme", help="what the layers are solved for")] = "w4a16-g32",
    method: Annotated[str, typer.Option(help="the method that solves them; one that fits X^T X needs most data")] = (
        "gptq"
    ),
    samples: o.SamplesOption = 128,
    context: o.ContextOption = 256,
    seed: o.SeedOption = 0,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Tell whether calibration data is enough and of the right kind, before anything is quantized.

    Layers are solved on halves of the rows and tried on the other half; the metric's own error is estimated by
    resampling; and the rows are held against the evaluation data, or against what the model expects.

    Example:  quantailor calibration ./model --data calib.txt --eval-data valid.txt --samples 128
    """
    from quantailor import api

    found = api.adequacy(
        model,
        data,
        eval_data=eval_data,
        scheme=scheme,
        method=method,
        samples=samples,
        context=context,
        seed=seed,
        progress=progress(quiet),
    )
    o.show(found.to_json(), found.text(), json)
