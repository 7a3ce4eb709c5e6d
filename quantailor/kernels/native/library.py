"""Builds the C sources beside this file with the machine's own compiler, once, and loads them.

No torch header and no torch ABI: functions take pointers and sizes. They share torch's OpenMP threads, because the
library is linked without an OpenMP of its own and finds the one that torch has loaded; two would fight over the cores.
The result lies in the user's cache folder, named by a hash of sources, flags, compiler and processor. Where there is no
compiler, or QUANTAILOR_NATIVE=0 says so, everything runs without it; `why_not` tells the reason.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

SOURCES = ("passes.c", "gemm.c", "panels.c", "rows.c", "decode.c", "block.c", "dequantize.c")
HEADERS = ("rows.h",)
FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-fPIC", "-fopenmp"),
    "-ffp-contract=off",  # a fused multiply-add would round once where torch rounds twice
    *("-fno-math-errno", "-fno-trapping-math", "-fno-semantic-interposition"),
)
_OFF = ("0", "off", "no")


class NoLibrary(Exception):
    """Why there is no native code here."""


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """(the library, "") or (None, the reason)."""
    if os.environ.get("QUANTAILOR_NATIVE", "").lower() in _OFF:
        return None, "QUANTAILOR_NATIVE=0 switches our own kernels off"
    try:
        return ctypes.CDLL(str(_built())), ""
    except (NoLibrary, OSError) as error:
        return None, str(error)


def _built() -> Path:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoLibrary("no C compiler was found (CC, cc, gcc, clang); install one for faster kernels")
    here = Path(__file__).parent
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256()
    sources = [here.joinpath(name).read_bytes() for name in (*HEADERS, *SOURCES)]
    for part in (*sources, *(text.encode() for text in (*FLAGS, version, _processor()))):
        digest.update(part)
        digest.update(b"\0")
    folder = _cache_folder()
    target = folder / f"kernels-{digest.hexdigest()[:24]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as work:
        objects = []
        for name in SOURCES:
            objects.append(f"{work}/{name}.o")
            _run([compiler, *FLAGS, "-c", str(here / name), "-o", objects[-1]])
        # Without -fopenmp here: the symbols are found in the OpenMP that torch has brought along.
        _run([compiler, "-shared", *objects, "-o", f"{work}/kernels.so"])
        os.replace(f"{work}/kernels.so", target)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        raise NoLibrary(f"{Path(command[0]).name} could not build our kernels: {lines[0]}")


def _cache_folder() -> Path:
    """Ours alone: what lies there is run. Raises: NoLibrary where somebody else could write to it."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "quantailor"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise NoLibrary(f"{folder} can be written by others, so nothing in it is run; make it yours alone (chmod 700)")
    return folder


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def library() -> ctypes.CDLL | None:
    """The loaded library; None where there is none (`why_not`)."""
    return _load()[0]


def why_not() -> str:
    """Why `library()` is None; "" where it is not."""
    return _load()[1]


@cache
def has_tiles() -> bool:
    """Whether this processor multiplies int8 tiles (AMX) and the system lets us."""
    lib = library()
    return lib is not None and lib.gemm_ready() == 0 and "amx_int8" in _processor()


@cache
def multiplies_bf16(device: str) -> bool:
    """Whether bfloat16 products have units of their own there: elsewhere they are emulated, and slower than float32."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return any(flag in _processor().split() for flag in ("amx_bf16", "avx512_bf16", "bf16"))


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    """Where a contiguous CPU tensor's data starts; NULL for None."""
    if x is None:
        return ctypes.c_void_p(None)
    assert x.device.type == "cpu" and x.is_contiguous(), "native kernels take contiguous CPU tensors"
    assert not isinstance(x, FakeTensor), "machine code was given a tensor without data"
    return ctypes.c_void_p(x.data_ptr())


def call(name: str, *arguments: object) -> int:
    """Call a function: tensors as pointers, bools and ints as int64 unless wrapped, floats as float32."""
    lib = library()
    assert lib is not None, why_not()
    made: list[object] = []
    for value in arguments:
        if value is None or isinstance(value, Tensor):
            made.append(pointer(value))
        elif isinstance(value, float):
            made.append(ctypes.c_float(value))
        else:
            made.append(value if not isinstance(value, int) else ctypes.c_int64(value))
    return int(getattr(lib, name)(*made))


SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
