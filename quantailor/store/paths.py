"""Names and links that a stranger chose: which of them may be opened, and how.

A file named inside a file must be a plain name of the folder it was named in. A symbolic link is refused unless it
is one of the Hugging Face cache's own (`models--X/snapshots/REV/file -> models--X/blobs/HASH`) or the user asked to
follow. Hidden files belong to tools (`.git`, `.cache`, `.gitattributes`): they are neither looked at nor ever opened.
"""

import os
import stat
from io import BufferedReader
from pathlib import Path

from quantailor.errors import UntrustedInput


def shown(value: object) -> str:
    """`value` as a message shows it: one line, printable, not longer than 200 characters.

    >>> shown("a.safetensors"), shown("two\\nlines")
    ('a.safetensors', "'two\\\\nlines'")
    """
    text = str(value)
    if len(text) > 200:
        text = text[:199] + "…"
    return text if text.isprintable() else repr(text)


def is_plain_name(name: str) -> bool:
    """Whether `name` names a file of its own folder and no other, not a hidden one, and prints as what it is.

    >>> [is_plain_name(name) for name in ("a.safetensors", "../a", "/a", "a/b", "..", "", "a\\0b")]
    [True, False, False, False, False, False, False]
    """
    return name != "" and name[0] != "." and "/" not in name and "\\" not in name and name.isprintable()


def hub_blobs(folder: Path) -> Path | None:
    """The folder that the links of `folder` may lead into, where `folder` is a snapshot in a Hugging Face cache."""
    real = Path(os.path.realpath(folder))
    if real.parent.name != "snapshots" or not real.parent.parent.name.startswith("models--"):
        return None
    return real.parent.parent / "blobs"


def check_file(path: Path, *, blobs: Path | None = None, follow_symlinks: bool = False) -> None:
    """Look at `path` without opening it.

    Raises: UntrustedInput unless it is a regular file; a link to one must lead into `blobs`, or be asked for.
    """
    try:
        is_link = stat.S_ISLNK(os.lstat(path).st_mode)
        target = os.path.realpath(path)
        mode = os.stat(target).st_mode
    except OSError as error:
        raise UntrustedInput(
            f"{shown(path)} is missing ({error.strerror}); download or copy the folder again"
        ) from error
    if is_link and not follow_symlinks and not (blobs and Path(target).is_relative_to(blobs)):
        raise UntrustedInput(
            f"{shown(path)} is a symbolic link to {shown(target)}, outside its folder; "
            "put the file itself there, or pass --follow-symlinks if you trust it"
        )
    if not stat.S_ISREG(mode) and not (is_link and follow_symlinks and stat.S_ISDIR(mode)):
        raise UntrustedInput(f"{shown(path)} is not a regular file; put the file itself there, or remove it")


def check_folder(folder: Path) -> None:
    """Raises: UntrustedInput unless `folder` is a folder that can be listed and is not empty."""
    try:
        names = os.listdir(folder)
    except NotADirectoryError:
        raise UntrustedInput(f"{shown(folder)} is a file, not a folder; give the folder it lies in") from None
    except OSError as error:
        raise UntrustedInput(
            f"{shown(folder)} cannot be read ({error.strerror}); give the path of a model's folder, "
            "or fetch one with `hf download NAME --local-dir DIR`"
        ) from error
    if not names:
        raise UntrustedInput(f"{shown(folder)} is empty; give the folder that holds config.json and *.safetensors")


def walk_files(folder: Path) -> list[Path]:
    """Whatever below `folder` is neither hidden nor a folder, and every link, sorted.

    Raises: UntrustedInput if a folder cannot be listed.
    """
    found: list[Path] = []
    to_list = [folder]
    while to_list:  # a loop, since a stranger decides how deep the folders nest
        try:
            with os.scandir(to_list.pop()) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    (to_list if entry.is_dir(follow_symlinks=False) else found).append(Path(entry.path))
        except OSError as error:
            raise UntrustedInput(
                f"{shown(error.filename)} cannot be read ({error.strerror}); make it readable, or remove it"
            ) from error
    return sorted(found)


def open_regular(path: Path, *, follow: bool = True) -> BufferedReader:
    """Open for reading without ever waiting on a pipe or starting a device; `follow=False`: nor through a last link.

    Raises: UntrustedInput if it is missing, unreadable, or no regular file.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        raise UntrustedInput(f"{shown(path)} cannot be opened ({error.strerror}); download or copy it again") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UntrustedInput(f"{shown(path)} is not a regular file; put the file itself there, or remove it")
    return os.fdopen(fd, "rb")
