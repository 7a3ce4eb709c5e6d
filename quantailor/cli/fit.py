"""The main job:   quantailor fit ./model --data train.txt --eval-data valid.txt --scheme w4a16-g32 --out ./model-w4"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantailor.cli import options as o
from quantailor.cli.console import progress
from quantailor.errors import Infeasible


def fit(
    model: o.ModelArgument,
    data: Annotated[
        Path, typer.Option(help="text, JSONL or data set folder to calibrate and train on", show_default=False)
    ],
    scheme: o.SchemeOption,
    out: o.OutOption,
    eval_data: Annotated[
        Path | None, typer.Option(help="what to measure on; by default a tenth of --data, held out")
    ] = None,
    tolerance: Annotated[str, typer.Option(help="loss allowed, as a share of the float model's figure")] = "2%",
    minutes: Annotated[float, typer.Option(help="time for the whole job")] = 30.0,
    steps: Annotated[int, typer.Option(help="steps of the longer QAT; the short one takes a quarter", min=4)] = 400,
    learning_rate: Annotated[
        float | None, typer.Option(help="of the weights; by default from the table by bits and size")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    task_weight: Annotated[
        float | None,
        typer.Option(
            help="of the data's own loss in the longer QAT, beside the distance from the float model; 0 learns from "
            "the float model alone; by default 1 where the start is within half of the float model's figure",
            min=0,
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="PTQ methods to try, cheapest first, by comma; by default rtn, then what suits the scheme"),
    ] = None,
    samples: o.SamplesOption = 128,
    context: o.ContextOption = 256,
    rule: o.RuleOption = None,
    point: o.PointOption = None,
    no_ragged: o.NoRaggedOption = False,
    control: Annotated[
        bool, typer.Option("--control", help="also fine-tune the float model for as many steps, and report it")
    ] = False,
    format: o.FormatOption = None,
    seed: o.SeedOption = 0,
    overwrite: o.OverwriteOption = False,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Fit a model to fewer bits by the cheapest way that stays within the tolerance.

    Measures the float model, tries post-training quantization (RTN, Qronos, Block-AP), and only where that loses too
    much trains: a short QAT, then a longer one. The result is packed, checked and saved with its report.

    Example:  quantailor fit ./model --data train.txt --eval-data valid.txt --scheme w4a16-g32 --out ./model-w4

    Exit status 4: nothing met the tolerance in time; the best that was found is saved all the same.
    """
    from quantailor import api

    goal = api.Goal(
        tolerance=o.share(tolerance),
        minutes=minutes,
        calibration=samples,
        methods=None if methods is None else tuple(name.strip() for name in methods.split(",") if name.strip()),
        short_steps=max(1, steps // 4),
        long_steps=steps,
        task_weight=task_weight,
        control=control,
        settings=api.Settings(learning_rate=learning_rate, batch_size=batch_size, seed=seed),
    )
    result = api.fit(
        model,
        data,
        scheme,
        out,
        eval_data=eval_data,
        goal=goal,
        rules=o.rules(rule),
        points=o.points(point),
        ragged=not no_ragged,
        context=context,
        overwrite=overwrite,
        format=format,
        progress=progress(quiet),
    )
    report = result.data
    final = report["final"]
    text = (
        f"{result.verdict}: {report['metric']} {report['float']['value']:.4f} -> {final['value']:.4f} "
        f"({final['loss']:+.2%}), "
        f"{report['float_size_bytes']:,} -> {report['size_bytes']:,} bytes, "
        f"{report['bits_per_weight']:.2f} bits a weight; "
        f"parity {'equal' if report['check']['equal'] else 'NOT equal'}; saved to {out}, read {out / 'report.md'}"
    )
    o.show(result.to_json(), text, json)
    if not result.meets:
        raise Infeasible(
            f"no way that was tried stays within {goal.tolerance:.2%} (best: {final['loss']:+.2%}); "
            f"the best is saved in {out}. "
            "Allow more --minutes or --steps, a larger --tolerance, or a scheme with more bits"
        )
