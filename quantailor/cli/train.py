"""QAT:   quantailor train ./model --scheme w2a16-g32 --data train.txt --out ./model-w2"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantailor.cli import options as o
from quantailor.cli.console import progress


def train(
    model: o.ModelArgument,
    data: Annotated[Path, typer.Option(help="text, JSONL or data set folder to train on", show_default=False)],
    out: o.OutOption,
    scheme: Annotated[
        str | None,
        typer.Option(help="what to train for; `float` is a plain fine-tune; leave out for a quantized model"),
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option(help="chooses the best iterate; by default a tenth of --data")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 200,
    learning_rate: Annotated[
        float | None, typer.Option(help="of the weights; by default from the table by bits and size")
    ] = None,
    scale_learning_rate: Annotated[float | None, typer.Option(help="of the logarithms of the scales")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    accumulate: Annotated[int, typer.Option(help="batches a step", min=1)] = 1,
    teacher: Annotated[str, typer.Option(help="`self` (the float model), `none`, or a model folder")] = "self",
    task_weight: Annotated[
        float, typer.Option(help="weight of the task's own loss beside the KL to the teacher", min=0)
    ] = 0.0,
    method: Annotated[
        str | None, typer.Option(help="PTQ method to start from, as in `quantize`; by default what suits the scheme")
    ] = None,
    samples: o.SamplesOption = 128,
    context: o.ContextOption = 256,
    rule: o.RuleOption = None,
    no_ragged: o.NoRaggedOption = False,
    format: o.FormatOption = None,
    seed: o.SeedOption = 0,
    overwrite: o.OverwriteOption = False,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Train with the quantization in the loop; the result is never worse than the PTQ it starts from.

    Example:  quantailor train ./model --scheme w2a16-g32 --data train.txt --out ./model-w2 --steps 400

    A bare encoder gets a head for the labels in the data:
    quantailor train ./encoder --scheme float --data train.jsonl --out ./classifier
    """
    from quantailor import api
    from quantailor.cost.size import weight_file_bytes
    from quantailor.store.publish import check_out

    inputs = [p for p in (model, data, eval_data) if p is not None]
    check_out(out, overwrite=overwrite, inputs=inputs)
    o.check_format(format)
    settings = api.Settings(
        steps=steps,
        learning_rate=learning_rate,
        scale_learning_rate=scale_learning_rate,
        batch_size=batch_size,
        accumulate=accumulate,
        task_weight=task_weight,
        seed=seed,
    )
    trained = api.train(
        model,
        data,
        scheme=scheme,
        eval_data=eval_data,
        teacher=None if teacher == "none" else teacher,
        settings=settings,
        method=method,
        samples=samples,
        context=context,
        rules=o.rules(rule),
        ragged=not no_ragged,
        progress=progress(quiet),
    )
    api.save(trained, out, overwrite=overwrite, format=format, inputs=inputs)
    report = trained.training
    assert report is not None
    document = {
        "out": str(out),
        "scheme": str(trained.state.scheme) if trained.state else "float",
        "steps": report.steps,
        "best_step": report.best_step,
        "improved": report.improved,
        "start": list(report.start),
        "best": list(report.best),
        "learning_rate": report.learning_rate,
        "size_bytes": weight_file_bytes(out),
        "notes": trained.notes,
    }
    text = (
        f"{document['scheme']}: score {report.start[0]:.4f} -> {report.best[0]:.4f} "
        f"(lower is better; best at step {report.best_step} of {report.steps}); "
        f"saved to {out}"
    )
    o.show(document, "\n".join([text, *(f"note: {n}" for n in trained.notes)]), json)
