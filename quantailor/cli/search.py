"""Auto-QAT:   quantailor search ./model --data train.txt --accuracy 98% --latency 5 --hours 2 --out ./model-fit"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantailor.cli import options as o
from quantailor.cli.console import progress
from quantailor.errors import Infeasible, UsageError


def search(
    model: o.ModelArgument,
    data: Annotated[Path, typer.Option(help="text, JSONL or data set folder to train on", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="new folder for the trained winner; without it this process only tries recipes: a worker"),
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option(help="what the verdict is measured on; by default a tenth of --data, held out")
    ] = None,
    accuracy: Annotated[
        str, typer.Option(help="98% of the float model's figure, or the accuracy or perplexity itself: 0.85, 14.5")
    ] = "98%",
    latency: Annotated[
        float | None, typer.Option(help="milliseconds that one pass of the packed model may take; see --bandwidth")
    ] = None,
    latency_tokens: Annotated[int, typer.Option(help="tokens in that pass", min=1)] = 1,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            help="predict the latency as bytes over so many GB/s, of another device; by default it is measured"
        ),
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="of the packed weights, in place of --latency", min=1)] = None,
    hours: Annotated[float | None, typer.Option(help="time for the whole job, training the winner included")] = None,
    minutes: Annotated[float | None, typer.Option(help="the same in minutes; 60 by default")] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            help="what to choose from: NAME=VALUE,VALUE of bits, group (0: a row), inputs, scales (learned, fixed), "
            "steps, frozen (share of the blocks), lora (rank of adapters; 0: none), learning_rate (times the table's; "
            "or LOW..HIGH); repeatable"
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="at most so many by this process; by default what time allows")
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option(
            help="folder that workers share, on one machine or many; by default hidden beside --out. After a kill the "
            "same command goes on"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    task_weight: Annotated[
        float, typer.Option(help="weight of the task's own loss beside the KL to the float model", min=0)
    ] = 0.0,
    samples: o.SamplesOption = 128,
    context: o.ContextOption = 256,
    rule: o.RuleOption = None,
    format: o.FormatOption = None,
    seed: o.SeedOption = 0,
    overwrite: o.OverwriteOption = False,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Find and train the QAT recipe of least loss within an accuracy, a latency and a time.

    Recipes (bits, groups, learned scales, learning rate, steps, frozen blocks) are tried by short trainings; those
    that do worse than others of no more cost are stopped early. The winner is trained with the time that is left,
    measured again, packed, checked and saved. Prints the Pareto front and what the search itself cost.

    Example:  quantailor search ./model --data train.txt --accuracy 98% --latency 5 --hours 2 --out ./model-fit

    More workers, here or on other machines, with the same options, --study at a shared place and no --out:
    quantailor search ./model --data train.txt --accuracy 98% --latency 5 --hours 2 --study /shared/study

    Exit status 4: infeasible; the closest is saved all the same.
    """
    from quantailor import api
    from quantailor.searching.space import Space

    if hours is not None and minutes is not None:
        raise UsageError("--hours and --minutes are the same budget; give one of the two")
    o.check_format(format)
    found = api.search(
        model,
        data,
        out=out,
        eval_data=eval_data,
        accuracy=accuracy,
        latency_ms=latency,
        size_bytes=max_bytes,
        minutes=60 * hours if hours is not None else minutes if minutes is not None else 60.0,
        space=Space().with_texts(space or []),
        trials=trials,
        study=study,
        bandwidth=bandwidth,
        latency_tokens=latency_tokens,
        settings=api.Settings(batch_size=batch_size, task_weight=task_weight, seed=seed),
        rules=o.rules(rule),
        samples=samples,
        context=context,
        overwrite=overwrite,
        format=format,
        progress=progress(quiet),
    )
    o.show(found.to_json(), found.text(), json)
    if not found.meets:
        raise Infeasible(f"{found.data['sentence']}; the closest is saved in {out}. Allow more, or a wider --space")
