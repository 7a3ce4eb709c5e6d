"""Folders that the tests of this package publish, and a look at what a failed one left."""

import os
from pathlib import Path

from quantailor.store.manifest import verify, write_manifest


def fill(folder: Path, text: str, num_files: int = 3) -> None:
    """A complete folder whose every file tells which one it is."""
    for i in range(num_files):
        (folder / f"part-{i}.txt").write_text(f"{text} {i}\n" * 50)
    (folder / "sub").mkdir()
    (folder / "sub" / "more.txt").write_text(text)
    write_manifest(folder, kind="test", details={"text": text})


def text_of(folder: Path) -> str:
    """Which folder lies there; raises unless every byte of it does."""
    return verify(folder)["details"]["text"]


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))
