"""What was recorded of a training run, over or not: `watch`."""

from __future__ import annotations

from pathlib import Path

from quantailor.errors import UntrustedInput
from quantailor.qat.recording import NAME, Recording, read
from quantailor.store.paths import shown
from quantailor.store.work import work_folder


def recording_of(path: str | Path) -> tuple[Recording, bool]:
    """(the recording, whether its run is not over). `path`: a folder that `train` writes or has written, or the file.

    A run that is on its way, or was killed, is read from the work folder beside `path`; it comes before a finished one,
    which it is about to replace.
    Raises: UntrustedInput where nothing was recorded, or the file is damaged.
    """
    path = Path(path)
    if path.is_file():
        recording = read(path, finished=False)
        return recording, recording.end is None
    unfinished, finished = work_folder(path) / NAME, path / NAME
    if unfinished.is_file():
        return read(unfinished, finished=False), True
    if finished.is_file():
        return read(finished), False
    raise UntrustedInput(
        f"{shown(path)} holds no {NAME}, and no run is on its way there; record one with `quantailor train --record`"
    )
