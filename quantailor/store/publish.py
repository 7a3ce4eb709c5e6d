"""Results appear whole or not at all, and are on the disk before anyone is told so.

A folder is written under `.NAME.tmp-PID` beside its place, given ordinary permissions, fsynced and renamed. An old
folder makes room under `.NAME.trash-PID` and comes back if anything fails. After a kill -9 at any instant the old or
the new folder is complete, at its place or (between two renames) as trash, which the next writer, or `recover`, puts
back. A `.trash-` is therefore always complete: what is to be deleted is renamed to `.tmp-` first.
"""

import errno
import os
import re
import shutil
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from quantailor.errors import QuantailorError, UsageError
from quantailor.store.lock import is_alive, locked
from quantailor.store.paths import shown

_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_BAD_PLACE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}


class DiskFull(QuantailorError):
    """There was no room for a result; what was there before is untouched (status 1)."""


@contextmanager
def new_folder(out: Path, *, overwrite: bool = False, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `out` if the block ends well, and vanishes if it does not.

    `overwrite` replaces a folder that quantailor wrote (one with a MANIFEST.json) or an empty one, never another.
    Write the manifest as the last thing in the block.

    Raises: UsageError, before anything is touched, if `out` exists, cannot be made, or overlaps one of `inputs`;
    Busy if another process writes it; DiskFull; QuantailorError if the file system fails. `out` is then as it was.
    """
    out = _place(out)
    _check_apart(out, inputs)
    with _explained(out):
        _check_free(out, overwrite)
    with ExitStack() as undo:
        with _explained(out):
            undo.callback(_remove_empty, parents := _missing_parents(out))
            _make_folders(parents)
            undo.enter_context(locked(out))
            _recover(out)
            _check_free(out, overwrite)  # again: what a killed writer had moved away may be back
            tmp = _beside(out, "tmp")
            undo.callback(_discard, tmp)
            os.mkdir(tmp)
        try:
            yield tmp
        except Exception as error:
            if isinstance(error, DiskFull) or is_disk_full(error):  # a DiskFull of `write_atomic` names `tmp`
                raise _disk_full(out, error.__cause__ or error) from error
            raise
        with _explained(out):
            _make_durable(tmp)
            _swap(tmp, out)


def check_out(out: Path, *, overwrite: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Refuse a place that `new_folder` would refuse, before hours of work and not after. Raises: UsageError."""
    out = _place(out)
    _check_apart(out, inputs)
    with _explained(out):
        _check_free(out, overwrite)


def check_room(out: Path, num_bytes: int) -> None:
    """Refuse work whose results the disk of `out` cannot hold. Raises: DiskFull."""
    place = next(parent for parent in _place(out).parents if parent.exists())
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise DiskFull(
            f"making {shown(out)} takes about {num_bytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
            "free some space, or choose an --out on another disk"
        )


def recover(out: Path) -> None:
    """Put back, or clear away, what a killed writer of `out` left. For readers that find `out` missing.

    Raises: Busy if a living one is at work; QuantailorError if the file system fails.
    """
    out = _place(out)
    if out.parent.is_dir():
        with _explained(out), locked(out):
            _recover(out)


def write_atomic(path: Path, data: bytes) -> None:
    """Write one file: whoever reads `path`, at any moment, gets all of the old bytes or all of the new ones.

    Raises: DiskFull; UsageError if its folder cannot be written; QuantailorError if the file system fails.
    """
    path = _place(path)
    tmp = path.parent / f".{path.name}.tmp-{os.getpid()}-{threading.get_native_id()}"
    with _explained(path):
        _clear_tmp(path)
        try:
            with open(tmp, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(tmp, path)
            _fsync(path.parent)
        except BaseException:
            with suppress(OSError):
                os.unlink(tmp)
            raise


def _place(out: Path) -> Path:
    """Where `out` really goes: a link stays, and what it points to is written, on the disk its owner chose."""
    return Path(os.path.realpath(out) if os.path.islink(out) else os.path.abspath(out))


def _check_apart(out: Path, inputs: Sequence[Path]) -> None:
    for given in inputs:
        source = Path(os.path.realpath(given))
        target = Path(os.path.realpath(out))
        for relation, one, others in (
            ("is the input", target, [source]),
            ("lies inside the input", source, target.parents),
            ("contains the input", target, source.parents),
        ):
            if any(one == other or _same_file(one, other) for other in others):
                raise UsageError(
                    f"{shown(out)} {relation} {shown(given)}, which is never written to; choose another --out"
                )


def _same_file(one: Path, other: Path) -> bool:
    """Catches what spelling hides: bind mounts and file systems that ignore case."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _check_free(out: Path, overwrite: bool) -> None:
    if out == out.parent:
        raise UsageError(f"{out} is the root of the file system; choose another --out")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise UsageError(f"{shown(out)} exists; choose another --out or pass --overwrite")
    if not out.is_dir():
        raise UsageError(f"{shown(out)} is a file, not a folder; choose another --out")
    if not (out / "MANIFEST.json").is_file() and any(out.iterdir()):
        raise UsageError(
            f"{shown(out)} holds no MANIFEST.json, so quantailor did not write it and will not delete it; "
            "choose another --out, or remove it yourself"
        )


def _beside(out: Path, kind: str) -> Path:
    return out.parent / f".{out.name}.{kind}-{os.getpid()}"


def _missing_parents(out: Path) -> list[Path]:
    return [parent for parent in reversed(out.parents) if not parent.exists()]


def _make_folders(folders: list[Path]) -> None:
    for folder in folders:
        folder.mkdir(exist_ok=True)
        _fsync(folder.parent)


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with suppress(OSError):  # not empty: the result is in it
            folder.rmdir()


def _recover(out: Path) -> None:
    """Under the lock: any trash is a dead writer's, and complete."""
    for trash in _leftovers(out, r"trash-[1-9]\d*"):
        if os.path.lexists(out):
            aside = _beside(out, "tmp")
            _remove(aside)
            os.rename(trash, aside)
            _remove(aside)
        else:
            os.rename(trash, out)
            _fsync(out.parent)
    _clear_tmp(out)


def _clear_tmp(out: Path) -> None:
    """Remove temporaries of dead processes, and of an earlier one that had our number and did not live to remove it."""
    for tmp in _leftovers(out, r"tmp-[1-9]\d*"):
        pid = int(tmp.name.rpartition("-")[2])
        if pid == os.getpid() or not is_alive(pid):
            _remove(tmp)
    for tmp in _leftovers(out, r"tmp-[1-9]\d*-[1-9]\d*"):  # of `write_atomic`: the other threads of ours are at work
        if not is_alive(int(tmp.name.split("-")[-2])):
            _remove(tmp)


def _leftovers(out: Path, ending: str) -> list[Path]:
    form = re.compile(re.escape(f".{out.name}.") + ending)
    return sorted(out.parent / name for name in os.listdir(out.parent) if form.fullmatch(name))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _discard(tmp: Path) -> None:
    """Remove `tmp` if it is there; the next writer tries again what cannot be removed, so it fails nothing."""
    if os.path.lexists(tmp):
        shutil.rmtree(tmp, ignore_errors=True)


def _make_durable(tmp: Path) -> None:
    """Ordinary permissions (safetensors leaves 0600), and every byte on the disk."""
    mode = stat.S_IMODE(os.stat(tmp).st_mode)  # made with mkdir's 0777 & ~umask: asking umask itself would set it
    for folder, folders, names in os.walk(tmp, topdown=False, onerror=_raise):
        for path in (Path(folder, name) for name in sorted(folders + names)):
            kind = os.lstat(path).st_mode
            if stat.S_ISREG(kind):
                os.chmod(path, mode & 0o666)
                _fsync(path)
            elif not stat.S_ISDIR(kind):
                raise ValueError(
                    f"{path} is a link or a device; a published folder holds regular files only, so copy it"
                )
        os.chmod(folder, mode)
        _fsync(Path(folder))


def _raise(error: OSError) -> None:
    raise error


def _swap(tmp: Path, out: Path) -> None:
    """`tmp` becomes `out`; an old `out` ends up as `tmp`, to be removed. On failure all is as before."""
    trash, ours = _beside(out, "trash"), os.stat(tmp)
    try:
        if os.path.lexists(out):
            os.rename(out, trash)
        os.rename(tmp, out)
        _fsync(out.parent)
        if os.path.lexists(trash):
            os.rename(trash, tmp)
    except BaseException as error:
        # Ctrl-C may have come after any of the four, so what to undo is read from the disk, not remembered.
        try:
            if not os.path.lexists(tmp) and os.path.samestat(os.stat(out), ours):
                os.rename(out, tmp)
            if os.path.lexists(trash):
                os.rename(trash, out)
        except OSError:
            if os.path.lexists(trash) and not os.path.lexists(out):
                raise QuantailorError(
                    f"{shown(out)} could not be replaced ({shown(error)}); the old one is complete at {shown(trash)}, "
                    "and the next run with this --out puts it back"
                ) from error
        raise


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot fsync a folder
            raise
    finally:
        os.close(fd)


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turns what the file system says into one line."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise _disk_full(out, error) from error
        reason = error.strerror or str(error)
        where = f" at {shown(error.filename)}" if error.filename else ""
        kind = UsageError if error.errno in _BAD_PLACE else QuantailorError
        raise kind(
            f"cannot write {shown(out)}: {reason}{where}; earlier results are intact; "
            "choose another --out, or mend the folder it lies in"
        ) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether this is how the file system, or safetensors, says that there is no room."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    code = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors, in Rust, reports it
    return code is not None and int(code[1]) in _FULL


def _disk_full(out: Path, error: BaseException) -> DiskFull:
    reason = getattr(error, "strerror", None) or str(error)
    return DiskFull(
        f"no room to write {shown(out)} ({shown(reason)}); earlier results are intact; "
        "free some space, or choose an --out on another disk"
    )
