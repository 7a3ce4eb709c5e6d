"""An architecture for its bits:   quantailor nas ./model --data train.txt --max-bytes 150000 --out ./model-small"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantailor.cli import options as o
from quantailor.cli.console import progress
from quantailor.errors import UsageError


def nas(
    model: o.ModelArgument,
    data: Annotated[Path, typer.Option(help="text to train on", show_default=False)],
    out: o.OutOption,
    max_bytes: Annotated[int, typer.Option(help="of the packed weights", min=1, show_default=False)],
    eval_data: Annotated[
        Path | None, typer.Option(help="what the last figure is of; by default rows of --data")
    ] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE,VALUE of depth, width, heads, ffn, bits; by default all, 3/4 and 1/2 of the model's"
        ),
    ] = None,
    supernet_steps: Annotated[int, typer.Option(help="steps of the supernet, four networks each", min=1)] = 400,
    candidates: Annotated[int, typer.Option(help="networks that are scored", min=1)] = 40,
    steps: Annotated[int | None, typer.Option(help="of the winner's QAT; by default from the table", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    samples: o.SamplesOption = 128,
    context: o.ContextOption = 256,
    format: o.FormatOption = None,
    seed: o.SeedOption = 0,
    overwrite: o.OverwriteOption = False,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Find which smaller network, at how many bits, is best within so many bytes; train and save it.

    The model is trained as a supernet whose parts share its weights, on grids; parts are scored under the rounding that
    would serve them, and the winner is trained by QAT towards the model itself. For decoders of the Llama kind.

    Example:  quantailor nas ./model --data train.txt --max-bytes 150000 --out ./model-small
    """
    from quantailor import api

    o.check_format(format)
    found = api.nas(
        model,
        data,
        out=out,
        max_bytes=max_bytes,
        eval_data=eval_data,
        space=_space(space or []),
        supernet_steps=supernet_steps,
        candidates=candidates,
        settings=api.Settings(steps=steps, batch_size=batch_size, seed=seed),
        samples=samples,
        context=context,
        overwrite=overwrite,
        format=format,
        progress=progress(quiet),
    )
    o.show(found.to_json(), found.text(), json)


def _space(texts: list[str]) -> dict[str, tuple[int, ...]]:
    from quantailor.searching.supernet import NAMES

    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in NAMES or name in found:
            raise UsageError(f"--space {text!r} is not NAME=VALUES, each name once; the names are {', '.join(NAMES)}")
        try:
            found[name] = tuple(int(value) for value in values.split(","))
        except ValueError as error:
            raise UsageError(f"--space {text!r}: the values are whole numbers, such as {name}=4,3") from error
    return found
