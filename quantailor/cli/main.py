"""The shell's entry: commands, and what a failure looks like from outside.

A mistake of the user's prints one line and exits with the status of errors.py; a bug prints its traceback. Commands
import torch only when they run, so that `quantailor --help` answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated

import typer

import quantailor
from quantailor.cli import options
from quantailor.cli.bench import bench
from quantailor.cli.calibration import calibration
from quantailor.cli.check import check
from quantailor.cli.convert import convert
from quantailor.cli.demo import demo
from quantailor.cli.evaluate import evaluate
from quantailor.cli.export import export
from quantailor.cli.fit import fit
from quantailor.cli.generate import generate
from quantailor.cli.inventory import inventory
from quantailor.cli.lora import merge
from quantailor.cli.nas import nas
from quantailor.cli.plan import plan
from quantailor.cli.probe import probe
from quantailor.cli.quantize import quantize
from quantailor.cli.report import report
from quantailor.cli.retask import retask
from quantailor.cli.schemes import schemes
from quantailor.cli.search import search
from quantailor.cli.sensitivity import sensitivity
from quantailor.cli.train import train
from quantailor.cli.watch import watch
from quantailor.errors import QuantailorError
from quantailor.progress import being_finished, go_on, stop_with

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Fit Transformers to fewer bits: PTQ where it is enough, QAT where it is not, and a proof of what is served.",
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "fit": fit,
    "quantize": quantize,
    "train": train,
    "watch": watch,
    "probe": probe,
    "retask": retask,
    "eval": evaluate,
    "check": check,
    "merge": merge,
    "export": export,
    "convert": convert,
    "report": report,
    "search": search,
    "nas": nas,
    "sensitivity": sensitivity,
    "inventory": inventory,
    "generate": generate,
    "bench": bench,
    "calibration": calibration,
    "schemes": schemes,
    "demo": demo,
}
for name, command in _COMMANDS.items():
    app.command(name)(command)


def _version(asked: bool) -> None:
    if asked:
        print(f"quantailor {quantailor.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    pass


class _Terminated(BaseException):
    """SIGTERM, raised where the program stands, so that half-written folders are cleared away."""


def _on_signal(number: int, _frame: FrameType | None) -> None:
    """Raise here, and at the work's next step as well: a library's bare `except` may swallow the first.

    A step that can be continued after is finished first; a second signal does not wait for it.
    """
    error = KeyboardInterrupt() if number == signal.SIGINT else _Terminated()
    if stop_with(error):
        raise error
    os.write(2, f"quantailor: stopping after {being_finished()}; once more stops at once\n".encode())


def run() -> None:
    """What the `quantailor` script calls."""
    go_on()
    before = {number: signal.signal(number, _on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    options.shown = False
    try:
        _run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run() -> None:
    try:
        app(standalone_mode=True)
    except QuantailorError as error:
        _report(str(error), error.exit_code)
    except SystemExit as stop:
        # Typer turns Ctrl-C into status 130, and has told on stderr what was wrong in usage.
        explain = getattr(stop.__context__, "format_message", None)
        if stop.code == 130:
            _report("interrupted; nothing half-written was left behind", 130)
        if stop.code == 2 and "--json" in sys.argv and explain is not None:
            print(json.dumps({"error": " ".join(explain().split()), "exit_code": 2}))
        raise
    except KeyboardInterrupt:
        _report("interrupted; nothing half-written was left behind", 130)
    except _Terminated:
        _report("terminated; nothing half-written was left behind", 143)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read stdout has gone
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not out_of_memory and "can't allocate memory" not in str(error):  # how torch says it on a CPU
            raise
        _report("out of memory; use a smaller --batch-size, --samples or --context", 1)


def _report(message: str, status: int) -> None:
    line = " ".join(message.split())
    if "--json" in sys.argv and not options.shown:  # 4 and 5 come after their document
        print(json.dumps({"error": line, "exit_code": status}))
    print(f"quantailor: {line}", file=sys.stderr)
    sys.exit(status)
