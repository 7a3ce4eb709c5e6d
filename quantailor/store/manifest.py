"""MANIFEST.json: what a folder is, what wrote it, and the sha256 of each of its files.

safetensors has no checksum: a flipped bit in a weight loads without complaint. Here it is found. The manifest covers
itself too. It tells damage, not intent: whoever can write the folder can write a new manifest.
No time and no host is in it, so equal inputs give equal bytes.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import quantailor
from quantailor.errors import UntrustedInput
from quantailor.store.header import read_header
from quantailor.store.jsonio import read_json, write_json
from quantailor.store.paths import check_file, check_folder, hub_blobs, open_regular, shown, walk_files

NAME = "MANIFEST.json"
FORMAT_VERSION = 1
_MAX_BYTES = 100_000_000
_AGAIN = "download, copy or make the folder again"


def write_manifest(folder: Path, *, kind: str, details: dict[str, Any]) -> None:
    """Describe every file of `folder` that is not hidden. The last thing to do before it is published.

    Raises: ValueError if `details` holds a number that is not finite; UntrustedInput if a safetensors file is damaged.
    """
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "versions": _versions(),
        "details": details,
        "files": {name: _describe(path) for name, path in _files(folder).items()},
    }
    write_json(folder / NAME, {**manifest, "checksum": _checksum(manifest)})


def read_manifest(folder: Path, *, follow_symlinks: bool = False) -> dict[str, Any]:
    """The manifest of `folder`, itself undamaged; its files are not looked at.

    Raises: UntrustedInput if there is none, it is damaged, or a later version wrote it.
    """
    check_folder(folder)
    path = folder / NAME
    if not os.path.exists(path):
        raise UntrustedInput(f"{shown(folder)} has no {NAME}, so it is not complete or not quantailor's; {_AGAIN}")
    check_file(path, blobs=hub_blobs(folder), follow_symlinks=follow_symlinks)
    manifest = read_json(path, max_bytes=_MAX_BYTES)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise UntrustedInput(
            f"{shown(path)} has format_version {version}, and this quantailor reads up to {FORMAT_VERSION}; "
            "upgrade quantailor"
        )
    if not isinstance(manifest, dict) or version != FORMAT_VERSION or manifest.get("checksum") != _checksum(manifest):
        raise UntrustedInput(f"{shown(path)} is damaged or was edited: its checksum is not that of its text; {_AGAIN}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(value, dict) for value in files.values()):
        raise UntrustedInput(f"{shown(path)} has no list of files; {_AGAIN}")
    return manifest


def verify(
    folder: Path, *, follow_symlinks: bool = False, digest: Callable[[Path], str] | None = None
) -> dict[str, Any]:
    """Read every byte of `folder` (about 1 GB/s) and hold it against its manifest, which is returned.

    `digest` gives the sha256 of a file where some are known already; without it all are read.
    Raises: UntrustedInput naming the first file that is missing, unexpected, or of another size or hash.
    """
    manifest = read_manifest(folder, follow_symlinks=follow_symlinks)
    expected, found = manifest["files"], _files(folder, follow_symlinks)
    for name in sorted(set(expected) | set(found)):
        where = shown(folder / name)
        if name not in found:
            raise UntrustedInput(f"{where} is missing, and {NAME} lists it; {_AGAIN}")
        if name not in expected:
            raise UntrustedInput(f"{where} is not in {NAME}; move it out of the folder, or make the folder again")
        size, listed = found[name].stat().st_size, expected[name].get("size_bytes")
        if size != listed:
            raise UntrustedInput(f"{where} is {size} bytes, and {NAME} says {shown(listed)}; {_AGAIN}")
    for name, path in found.items():
        if (digest or sha256)(path) != expected[name].get("sha256"):
            raise UntrustedInput(f"{shown(path)} has changed: its sha256 is not the one in {NAME}; {_AGAIN}")
    return manifest


def hash_folder(folder: Path, *, follow_symlinks: bool = False) -> str:
    """One sha256 for names and bytes of all files but the manifest: names a parent model, wherever it lies.

    Raises: UntrustedInput if `folder` is missing or empty, or holds a link out of it.
    """
    check_folder(folder)
    files = {name: sha256(path) for name, path in _files(folder, follow_symlinks).items()}
    return _checksum({"files": files})


def _files(folder: Path, follow_symlinks: bool = False) -> dict[str, Path]:
    """Name below `folder`, with slashes -> path; sorted, links checked, less the manifest."""
    blobs = hub_blobs(folder)
    files = {}
    for path in walk_files(folder):
        name = path.relative_to(folder).as_posix()
        if name != NAME:
            check_file(path, blobs=blobs, follow_symlinks=follow_symlinks)
            files[name] = path
    return dict(sorted(files.items()))


def _describe(path: Path) -> dict[str, Any]:
    described: dict[str, Any] = {"size_bytes": path.stat().st_size, "sha256": sha256(path)}
    if path.suffix == ".safetensors":
        facts = read_header(path)
        described["tensors"] = {name: {"dtype": fact.dtype, "shape": list(fact.shape)} for name, fact in facts.items()}
    return described


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(manifest: dict[str, Any]) -> str:
    covered = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str | None]:
    """As installed: asking the packages themselves would import them."""
    versions: dict[str, str | None] = {"quantailor": quantailor.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions
