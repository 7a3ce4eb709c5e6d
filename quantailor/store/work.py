"""Unfinished work that survives a kill -9: finished steps in a hidden folder beside the result, each verified by hash.

    .NAME.work/config.json      what is being made, of what, by which versions: other work is never continued
    .NAME.work/step-00003.json  what step 3 has to say, and the sha256 of the files it wrote; written after them
    .NAME.work/state-*          files that only the step after theirs needs; they go when that one is finished

The lock of the result's place (store/publish.py) covers the folder, so one process at a time works in it. A step that
is not recorded, or whose files are not those it recorded, has not happened; nor has any after it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantailor.errors import UntrustedInput
from quantailor.store.jsonio import read_json, write_json
from quantailor.store.manifest import sha256
from quantailor.store.tensors import sync

PASSING = "state-"  # how the names of files begin that only the next step needs
_CONFIG = "config.json"
_RECORD_BYTES = 1_000_000_000


def work_folder(out: Path) -> Path:
    """Where the unfinished work for `out` lies."""
    place = Path(os.path.realpath(out) if os.path.islink(out) else os.path.abspath(out))
    return place.parent / f".{place.name}.work"


class Work:
    """Steps of one piece of work. `records` are those finished already, in order.

    `fresh_because`: why the work found there is not continued; None where there was none, or it is. `states`: the
    passing files of how many steps are kept, for work that several processes share and may leave a step apart.
    `others`: names of files beside the steps, which the work itself looks after.
    """

    def __init__(self, folder: Path, config: dict[str, Any], states: int = 1, others: Sequence[str] = ()) -> None:
        self.folder, self.states, self.others = folder, states, others
        self.fresh_because: str | None = None
        self._entries: list[dict[str, Any]] = []
        config = json.loads(json.dumps(config))
        if folder.exists():
            self.fresh_because = self._continue(config)
        if self.fresh_because is not None or not folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            write_json(folder / _CONFIG, config)
        self._tidy()

    @property
    def records(self) -> list[dict[str, Any]]:
        return [entry["record"] for entry in self._entries]

    def path(self, name: str) -> Path:
        """Where a step puts its file of this name."""
        return self.folder / name

    def finish(self, record: dict[str, Any], files: Sequence[Path]) -> None:
        """The next step is done, and wrote `files`."""
        for path in files:
            sync(path)
        entry = {"record": record, "files": {path.name: sha256(path) for path in files}}
        entry = json.loads(json.dumps(entry))  # as it will be read again, numbers for names and all
        write_json(self.folder / _step(len(self._entries)), {**entry, "checksum": _checksum(entry)})
        self._entries.append(entry)
        self._tidy()

    def rewind(self, count: int) -> int:
        """Keep the first `count` steps at most; how many there are then: fewer if their files are gone."""
        del self._entries[count:]
        self._verify()
        self._tidy()
        return len(self._entries)

    def remove(self) -> None:
        """The work is done, or is not to be continued."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _continue(self, config: dict[str, Any]) -> str | None:
        """Take up what there is. Why that cannot be; None if it can."""
        try:
            made = read_json(self.folder / _CONFIG)
        except UntrustedInput:
            return "it has no readable config.json"
        if made != config:
            keys = [k for k in {**made, **config} if made.get(k) != config.get(k)] if isinstance(made, dict) else []
            return f"it was begun with another {', '.join(keys) or 'configuration'}"
        while (path := self.folder / _step(len(self._entries))).exists():
            try:
                entry = read_json(path, max_bytes=_RECORD_BYTES)
            except UntrustedInput:
                break
            if not isinstance(entry, dict) or entry.pop("checksum", None) != _checksum(entry):
                break
            self._entries.append(entry)
        found = len(self._entries)
        self._verify()
        return "the files of its finished steps are damaged" if found and not self._entries else None

    def _verify(self) -> None:
        """Forget steps from the last one back until every file that the others need is the one that was written."""
        checked: dict[str, bool] = {}
        while self._entries:
            last = self._entries[-1]
            needed = {n: h for e in self._entries for n, h in e["files"].items() if e is last or not _passes(n)}
            for name, digest in needed.items():
                if name not in checked:
                    path = self.folder / name
                    checked[name] = Path(name).name == name and path.is_file() and sha256(path) == digest
            if all(checked[name] for name in needed):
                return
            self._entries.pop()

    def _tidy(self) -> None:
        """Remove what a dead run had begun, and what only an earlier step needed."""
        wanted = {_CONFIG, *self.others, *map(_step, range(len(self._entries)))}
        for left, entry in enumerate(reversed(self._entries)):
            wanted |= {name for name in entry["files"] if left < self.states or not _passes(name)}
        for path in self.folder.iterdir():
            if path.name not in wanted and path.is_file():
                path.unlink()


def _checksum(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _step(number: int) -> str:
    return f"step-{number:05}.json"


def _passes(name: str) -> bool:
    return name.startswith(PASSING)
