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
    data: Annotated[Path | None, typer.Option(help="text, labelled records, or SQuAD's questions")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="lm, classification or qa; by default what the model is made for"),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="lm-evaluation-harness: names of tasks, comma between; `windows` is perplexity on --data"),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="folder of the harness's task files; they are programs: use ones you trust")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="float model: adds KL and agreement")] = None,
    context: o.ContextOption = 256,
    limit: Annotated[int | None, typer.Option(help="only the first rows", min=1)] = None,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Measure perplexity, accuracy, or F1 of answers, with a 95 % interval, of a float or quantized model.

    Example:  quantailor eval ./model-w4 --data valid.txt --reference ./model

    With --tasks the harness of EleutherAI does it, offline:
    quantailor eval ./model-w4 --tasks my_task --include-path ./my_tasks
    """
    from quantailor import api

    if tasks is not None:
        if task is not None or reference is not None:
            raise UsageError("--tasks goes without --task and --reference: the harness measures one language model")
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        found = api.evaluate_tasks(model, names, include_path=include_path, data=data, context=context, limit=limit)
        o.show(found.to_json(), "\n".join([str(found), *(f"note: {n}" for n in found.notes)]), json)
        return
    if include_path is not None:
        raise UsageError(f"--include-path {include_path} is for --tasks; name some of its tasks, or leave it out")
    if data is None:
        raise UsageError("name what to measure on: --data FILE, or --tasks NAMES with --include-path FOLDER")
    if task not in (None, "lm", "classification", "qa"):
        raise UsageError(f"task {task!r} is none of lm, classification, qa; leave it out to take the model's own")
    loaded = api.load(model)
    if task is not None and loaded.task != task:
        raise UsageError(f"{model} is made for {loaded.task}, not for {task}; leave --task out")
    result = api.evaluate(loaded, data, reference=reference, context=context, limit=limit, progress=progress(quiet))
    o.show(result.to_json(), "\n".join([str(result), *(f"note: {n}" for n in result.notes)]), json)
