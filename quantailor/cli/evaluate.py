"""Quality:   quantailor eval ./model-w4 --data valid.txt --reference ./model"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantailor.cli import options as o
from quantailor.cli.console import progress
from quantailor.errors import UsageError


def evaluate(
    model: o.ModelArgument,
    data: Annotated[Path, typer.Option(help="text or labelled records", show_default=False)],
    task: Annotated[
        str | None, typer.Option(help="lm or classification; by default what the model is made for")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="float model: adds KL and agreement")] = None,
    context: o.ContextOption = 256,
    limit: Annotated[int | None, typer.Option(help="only the first rows", min=1)] = None,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Measure perplexity or accuracy, with a 95 % interval, of a float or quantized model.

    Example:  quantailor eval ./model-w4 --data valid.txt --reference ./model
    """
    from quantailor import api

    if task not in (None, "lm", "classification"):
        raise UsageError(f"task {task!r} is none of lm, classification; leave it out to take the model's own")
    loaded = api.load(model)
    if task is not None and loaded.task != task:
        raise UsageError(f"{model} is made for {loaded.task}, not for {task}; leave --task out")
    result = api.evaluate(loaded, data, reference=reference, context=context, limit=limit, progress=progress(quiet))
    o.show(result.to_json(), "\n".join([str(result), *(f"note: {n}" for n in result.notes)]), json)
