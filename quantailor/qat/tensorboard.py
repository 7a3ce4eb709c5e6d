"""What is recorded as scalars for TensorBoard, an extra: `pip install 'quantailor[tensorboard]'`.

training/loss, training/gradient, training/rate      held_out/score        alarms/KIND: 1 where one was raised
MEASURE/all (median of the layers), MEASURE/LAYER and MEASURE/NORM         of each measure of recorder.py
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from pathlib import Path
from typing import Any

from quantailor.errors import UsageError
from quantailor.qat.recording import Alarm, Look, Measure, Recording


class Scalars:
    """Hears a recording and writes its lines into event files in `folder`; a context, whose end closes them.

    A run that goes on behind a checkpoint hides what the dead one had written from there on.
    Raises: UsageError where tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise UsageError("tensorboard is not installed; pip install 'quantailor[tensorboard]', or leave it out")
        self.folder = folder
        self.writer: Any = None

    def __enter__(self) -> Scalars:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()

    def __call__(self, recording: Recording) -> None:
        """Write the last line of `recording`."""
        line = recording.lines[-1]
        if self.writer is None:
            make = importlib.import_module("torch.utils.tensorboard").SummaryWriter
            self.writer = make(log_dir=str(self.folder), purge_step=line.step)
        for tag, value in scalars(recording):
            self.writer.add_scalar(tag, value, line.step)
        self.writer.flush()


def scalars(recording: Recording) -> list[tuple[str, float]]:
    """(tag, value) of the last line; what is not known is left out."""
    line, head = recording.lines[-1], recording.head
    if isinstance(line, Look):
        return [("held_out/score", line.score[0])] if line.score[0] is not None else []
    if isinstance(line, Alarm):
        return [(f"alarms/{line.alarm}", 1.0)]
    if not isinstance(line, Measure):
        return []
    told = [("training/loss", line.loss), ("training/gradient", line.gradient), ("training/rate", line.rate)]
    found = [(tag, value) for tag, value in told if value is not None]
    for names, table in ((head.layers, line.layers), (head.norms, line.norms)):
        for measure, column in table.items():
            known = [(name, value) for name, value in zip(names, column) if value is not None]
            found += [(f"{measure}/{name}", value) for name, value in known]
            if known:
                found.append((f"{measure}/all", statistics.median(value for _, value in known)))
    return found
