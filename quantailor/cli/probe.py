"""Is QAT worth it:   quantailor probe ./model --scheme w2a16-g32 --data train.txt"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantailor.cli import options as o
from quantailor.cli.console import progress
from quantailor.errors import UsageError


def probe(
    model: o.ModelArgument,
    data: Annotated[Path, typer.Option(help="what the full run would train on", show_default=False)],
    scheme: Annotated[str | None, typer.Option(help="what to train for; leave out for a quantized model")] = None,
    eval_data: Annotated[
        Path | None, typer.Option(help="what scores are taken on; by default a tenth of --data")
    ] = None,
    samples: Annotated[int, typer.Option(help="rows of the probe", min=1)] = 1000,
    epochs: Annotated[float, typer.Option(help="passes of the probe over them")] = 2.0,
    steps: Annotated[int | None, typer.Option(help="of the full run; by default from the table by bits", min=1)] = None,
    full_epochs: Annotated[float | None, typer.Option(help="the full run's length in passes, in place of it")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    teacher: Annotated[str, typer.Option(help="`self` (the float model), `none`, or a model folder")] = "self",
    method: Annotated[str | None, typer.Option(help="PTQ method to start from")] = None,
    go: Annotated[bool, typer.Option("--go", help="make the full run afterwards, if the forecast is a gain")] = False,
    out: Annotated[Path | None, typer.Option(help="where --go saves it")] = None,
    context: o.ContextOption = 256,
    rule: o.RuleOption = None,
    seed: o.SeedOption = 0,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Train a little, and forecast with an interval what the whole training would reach.

    Nothing is saved without --go, which makes the full run where the whole interval lies below what PTQ has. The
    interval comes from two kinds of curves fitted to the probe's looks (docs/TRAINING.md tells how often it was right).

    Example:  quantailor probe ./model --scheme w2a16-g32 --data train.txt --steps 400 --go --out ./model-w2
    """
    from quantailor import api
    from quantailor.store.publish import check_out
    from quantailor.verbs.probing import probe as run

    if go != (out is not None):
        raise UsageError("--go and --out belong together: give both, or neither")
    inputs = [p for p in (model, data, eval_data) if p is not None]
    if out is not None:
        check_out(out, overwrite=False, inputs=inputs)
    settings = api.Settings(steps=steps, epochs=full_epochs, batch_size=batch_size, seed=seed)
    bars = progress(quiet)
    shared: dict[str, Any] = {
        "scheme": scheme,
        "eval_data": eval_data,
        "teacher": None if teacher == "none" else teacher,
        "method": method,
        "context": context,
        "rules": o.rules(rule),
        "progress": bars,
    }
    found = run(model, data, samples=samples, epochs=epochs, settings=settings, **shared)
    document, lines = found.to_json(), [str(found), *(f"note: {n}" for n in found.notes)]
    if out is not None and not found.worthwhile:
        lines.append("the full run was not made: no gain is certain; `quantailor train` makes it all the same")
        document["out"] = None
    elif out is not None:
        trained = api.train_folder(model, data, out, inputs=inputs, settings=settings, **shared)
        assert trained.training is not None
        best = trained.training.best[0]
        document |= {"out": str(out), "full": found.told(best)}
        lines.append(f"the full run reached {found.told(best):.4f}; saved to {out}")
    o.show(document, "\n".join(lines), json)
