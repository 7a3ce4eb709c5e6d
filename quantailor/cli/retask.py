"""A model for another task:   quantailor retask ./model --scheme w4a16-g32 --data task.jsonl"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantailor.cli import options as o
from quantailor.cli.console import progress


def retask(
    model: o.ModelArgument,
    data: Annotated[Path, typer.Option(help="the new task's rows", show_default=False)],
    scheme: Annotated[
        str | None, typer.Option(help="what a float model is quantized to; a quantized one keeps its own")
    ] = None,
    eval_data: Annotated[Path | None, typer.Option(help="what is measured; by default a fifth of --data")] = None,
    steps: Annotated[int | None, typer.Option(help="of each route in all; by default by bits", min=2)] = None,
    float_share: Annotated[float, typer.Option(help="part of them in float, on the route that has such a part")] = 0.5,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    learning_rate: Annotated[float | None, typer.Option(help="of all stages; by default by bits and size")] = None,
    method: Annotated[str | None, typer.Option(help="PTQ method")] = None,
    out: Annotated[Path | None, typer.Option(help="save the better one here")] = None,
    samples: o.SamplesOption = 128,
    context: o.ContextOption = 256,
    seed: o.SeedOption = 0,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Bring a model to another task by two routes of equal length, and report both.

    A float model: fine-tune in float and then QAT, against QAT on the task at once. A quantized model: dequantize,
    fine-tune and quantize again, against tuning it quantized. The difference comes with an interval, row by row.

    Example:  quantailor retask ./encoder --scheme w8a8 --data reviews.jsonl --steps 200 --out ./reviews-w8a8
    """
    from quantailor import api
    from quantailor.store.publish import check_out
    from quantailor.verbs.retasking import retask as run

    inputs = [p for p in (model, data, eval_data) if p is not None]
    if out is not None:
        check_out(out, overwrite=False, inputs=inputs)
    settings = api.Settings(steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    found = run(
        model,
        data,
        scheme=scheme,
        eval_data=eval_data,
        settings=settings,
        float_share=float_share,
        method=method,
        samples=samples,
        context=context,
        progress=progress(quiet),
    )
    document, lines = found.to_json(), [str(found), *(f"note: {n}" for n in found.notes)]
    if out is not None:
        api.save(found.better.model, out, inputs=inputs)
        document["out"] = str(out)
        lines.append(f"{found.better.name} saved to {out}")
    o.show(document, "\n".join(lines), json)
