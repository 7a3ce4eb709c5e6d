"""A run in progress, or what was recorded of one that is over:   quantailor watch ./model-w2"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from quantailor.cli import options as o


def watch(
    path: Annotated[
        Path,
        typer.Argument(help="the output folder of a recorded training run, or a recording.jsonl", show_default=False),
    ],
    once: Annotated[bool, typer.Option("--once", help="show what there is now, and stop")] = False,
    every: Annotated[float, typer.Option(help="seconds between looks at the file", min=0.1)] = 1.0,
    json: o.JsonOption = False,
) -> None:
    """Show the recording of a training run: loss, score, errors, clipping, flips, drift, ranges, alarms.

    While the run goes on, from another terminal, it is drawn anew until the run is over; Ctrl-C leaves the run alone.

    Example:  quantailor watch ./model-w2
    """
    import dataclasses

    from rich.console import Console
    from rich.live import Live

    from quantailor.cli.console import table
    from quantailor.qat.panel import rows
    from quantailor.verbs.watching import recording_of

    recording, running = recording_of(path)
    if json:
        last = recording.measures[-1] if recording.measures else None
        document = {
            "running": running,
            "steps": recording.head.steps,
            "step": recording.lines[-1].step if recording.lines else 0,
            "loss": last.loss if last else None,
            "looks": [[look.step, *look.score] for look in recording.looks],
            "alarms": [dataclasses.asdict(alarm) for alarm in recording.alarms],
            "stopped": recording.end.why if recording.end else "",
        }
        o.show(document, "", True)
        return
    console = Console(highlight=False)
    if once or not running or not console.is_terminal:
        step = recording.lines[-1].step if recording.lines else 0
        console.print(f"step {step} of {recording.head.steps}{', still running' if running else ''}")
        console.print(table(rows(recording)))
        return
    with Live(console=console, auto_refresh=False) as live:
        while running:
            live.update(table(rows(recording)), refresh=True)
            time.sleep(every)
            recording, running = recording_of(path)
        live.update(table(rows(recording)), refresh=True)
