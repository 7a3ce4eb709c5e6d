"""The weights of a folder, read once: one thread fills the tensors, another takes the files' digests from the same
memory, and the caller builds the model meanwhile.

Of 0.9 GB, in seconds of CPU: 0.6 to fill fresh memory and 0.7 to 0.9 for sha256, which is what there is to wait for.
"""

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from quantailor.errors import UntrustedInput
from quantailor.store.manifest import sha256, verify
from quantailor.store.paths import open_regular, shown
from quantailor.store.tensors import filled
from quantailor.store.threads import leave_the_bound_core
from quantailor.store.untrusted import ModelFiles, scan_model_folder


class Reading(Mapping[str, Tensor]):
    """Tensors by name; asking for one waits until it is read. Each has memory of its own: a mapped file would stay in
    memory as long as one tensor lives, beside those that were made anew of it."""

    def __init__(self, files: ModelFiles, hashed: bool) -> None:
        self.files, self.manifest = files, dict[str, Any]()
        self._arriving: dict[str, Future[Tensor]] = {name: Future() for name in files.tensors}
        self._digests: dict[Path, Future[str]] = {path: Future() for path in files.weight_files} if hashed else {}
        self._pieces: SimpleQueue[memoryview | bytes | Exception | None] = SimpleQueue()
        self._stopped = False

    def __getitem__(self, name: str) -> Tensor:
        return self._arriving[name].result()

    def __iter__(self) -> Iterator[str]:
        return iter(self._arriving)

    def __len__(self) -> int:
        return len(self._arriving)

    def wait_for_digests(self) -> None:
        """From then on tensors may be changed where they lie."""
        for one in self._digests.values():
            one.result()

    def digest(self, path: Path) -> str:
        """sha256 of a file's bytes, in hexadecimal; of weights, as they went into the tensors."""
        return self._digests[path].result() if path in self._digests else sha256(path)

    def read(self) -> None:
        """Fill all tensors, file by file."""
        leave_the_bound_core()
        try:
            for path in self.files.weight_files:
                self._read_file(path)
        except OSError as error:
            self._fail(UntrustedInput(f"{shown(path)} cannot be read: {error}"))
        except Exception as error:  # whatever it is, those that wait must not wait for ever
            self._fail(error)

    def _read_file(self, path: Path) -> None:
        facts = {name: fact for name, fact in self.files.tensors.items() if fact.file == path}
        with open_regular(path) as file:
            self._pieces.put(file.read(min((fact.start for fact in facts.values()), default=-1)))
            for name, fact in sorted(facts.items(), key=lambda item: item[1].start):
                if self._stopped:
                    raise InterruptedError("reading was given up")
                self._arriving[name].set_result(filled(file, fact, self._pieces.put if self._digests else None))
        self._pieces.put(None)

    def _fail(self, error: Exception) -> None:
        for one in self._arriving.values():
            if not one.done():
                one.set_exception(error)
        self._pieces.put(error)

    def hash(self) -> None:
        """Take the digests of all files as they are read."""
        leave_the_bound_core()
        for digest in self._digests.values():
            found = hashlib.sha256()
            while (piece := self._pieces.get()) is not None:
                if isinstance(piece, Exception):
                    for one in self._digests.values():
                        if not one.done():
                            one.set_exception(piece)
                    return
                if not self._stopped:
                    found.update(piece)
            digest.set_result(found.hexdigest())

    def stop(self) -> None:
        self._stopped = True


@contextmanager
def reading(folder: Path, *, verify_hashes: bool = True) -> Iterator[Reading]:
    """The weights of `folder`, being read. At the end of the block all has been held against the manifest, which then
    is `manifest` of what this gives.

    Damage that the manifest shows is told in place of whatever it led to inside the block.
    Raises: UntrustedInput as `scan_model_folder` and `verify`; `verify_hashes=False` leaves the latter out.
    """
    try:
        found = Reading(scan_model_folder(folder), verify_hashes)
    except UntrustedInput:
        if verify_hashes:
            verify(folder)
        raise
    with ThreadPoolExecutor(2) as threads:
        threads.submit(found.read)
        threads.submit(found.hash)
        try:
            try:
                yield found
            except Exception:
                if verify_hashes:
                    verify(folder, digest=found.digest)
                raise
            if verify_hashes:
                found.manifest = verify(folder, digest=found.digest)
        finally:
            found.stop()
