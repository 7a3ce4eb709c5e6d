"""A stranger's model folder, judged before any other library opens it.

transformers 5.23 follows an index out of the folder, gives missing layers random weights, and believes any count. So
names, links, limits and headers are looked at here first, and only what passes is handed on. No pickle is read.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from quantailor.errors import UntrustedInput
from quantailor.store.config import read_config
from quantailor.store.header import MAX_TENSORS, TensorFact, read_header
from quantailor.store.jsonio import read_json
from quantailor.store.paths import check_file, check_folder, hub_blobs, is_plain_name, shown, walk_files

if TYPE_CHECKING:  # torch is reached through safe_open alone, so that planning does not wait for it
    from torch import Tensor

_NAMES = ("model", "quantailor")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_OPEN_BYTES = 2**26
_CHUNK = 2**20  # elements looked at together: what one float8 chunk costs in float32 stays at 4 MB


@dataclass(frozen=True)
class ModelFiles:
    """A folder that passed: its configuration, and every tensor with the file that it is in."""

    folder: Path
    config: dict[str, Any]
    weight_files: tuple[Path, ...]
    tensors: dict[str, TensorFact]


def scan_model_folder(folder: Path, *, follow_symlinks: bool = False, weights_name: str | None = None) -> ModelFiles:
    """Check all that can be checked without reading a weight.

    The weights are `model.safetensors` or `quantailor.safetensors`, or the shards in the `.index.json` of either;
    `weights_name` ("model", "quantailor" or another) asks for one. Links are followed where asked, and in the cache of
    the hub.

    Raises: UntrustedInput naming the file, what is wrong with it and what to do.
    """
    folder = Path(folder)
    check_folder(folder)
    blobs = hub_blobs(folder)
    follow = follow_symlinks or blobs is not None
    for path in walk_files(folder):
        check_file(path, blobs=blobs, follow_symlinks=follow_symlinks)
    if not os.path.exists(folder / "config.json"):
        raise UntrustedInput(f"{shown(folder)} has no config.json; give the folder that holds it and *.safetensors")
    config = read_config(folder / "config.json", follow=follow)
    name = _weights_name(folder, weights_name, follow)
    index = folder / f"{name}.safetensors.index.json"
    if not os.path.exists(index):
        path = folder / f"{name}.safetensors"
        return ModelFiles(folder, config, (path,), read_header(path, follow=follow))
    shard_of = _read_index(index, follow)
    tensors: dict[str, TensorFact] = {}
    files = tuple(folder / shard for shard in sorted(set(shard_of.values())))
    for path in files:
        facts = read_header(path, follow=follow)
        for tensor in facts:
            if shard_of.get(tensor) != path.name:
                raise UntrustedInput(
                    f"{shown(path)} has tensor {shown(tensor)}, which {index.name} puts in "
                    f"{shown(shard_of.get(tensor, 'no file'))}; download or copy the folder again"
                )
        tensors |= facts
    if missing := sorted(set(shard_of) - set(tensors)):
        raise UntrustedInput(
            f"{shown(folder / shard_of[missing[0]])} lacks tensor {shown(missing[0])}, which {index.name} puts there; "
            "download or copy the folder again"
        )
    return ModelFiles(folder, config, files, dict(sorted(tensors.items())))


def check_finite(files: ModelFiles, held: "Mapping[str, Tensor] | None" = None) -> None:
    """Look once at every float weight, a chunk at a time: in `held` where they are read already, else in the files.

    Raises: UntrustedInput naming the first tensor, in order of file and name, that holds a NaN or an infinity.
    """
    for path in files.weight_files:
        # 4 and 6 bit floats have neither NaN nor infinity, and integers are not looked at.
        names = [
            name
            for name, fact in sorted(files.tensors.items())
            if fact.file == path and fact.dtype.startswith(("F64", "F32", "F16", "BF16", "F8", "C64"))
        ]
        if held is not None:
            for name in names:
                _check_tensor(path, name, held[name])
            continue
        try:
            for some in _together(names, files.tensors):
                with safe_open(path, framework="pt") as file:
                    for name in some:
                        _check_tensor(path, name, file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise UntrustedInput(f"{shown(path)} cannot be read ({shown(error)}); download or copy it again") from error


def _check_tensor(path: Path, name: str, tensor: "Tensor") -> None:
    if found := _first_not_finite(tensor):
        raise UntrustedInput(
            f"{shown(path)} has {found[1]} in tensor {shown(name)} at element {found[0]}, counted flat, and one such "
            "weight spoils every answer; use a sound copy"
        )


def _together(names: list[str], tensors: dict[str, TensorFact]) -> Iterator[list[str]]:
    """Names in runs of some bytes: what was read of a file that is open stays in memory until it is closed."""
    run: list[str] = []
    for name in names:
        if (run and sum(tensors[n].num_bytes for n in (*run, name)) > _OPEN_BYTES) or len(run) == 64:
            yield run
            run = []
        run.append(name)
    yield run


def _first_not_finite(tensor: "Tensor") -> tuple[int, float] | None:
    """Where the first NaN or infinity of the flattened `tensor` is, and which; of a complex one, in either part."""
    if tensor.is_complex():
        return _first_not_finite(tensor.real) or _first_not_finite(tensor.imag)
    for i, chunk in enumerate(tensor.reshape(-1).split(_CHUNK)):
        if chunk.numel() == 0:
            continue
        if chunk.itemsize == 1:
            chunk = chunk.float()
        low, high = chunk.aminmax()  # NaN wins both; ten times as fast as isfinite, which makes three copies
        if low.isfinite() and high.isfinite():
            continue
        place = int(chunk.isfinite().logical_not().nonzero()[0])
        return i * _CHUNK + place, chunk[place].item()
    return None


def _weights_name(folder: Path, wanted: str | None, follow: bool) -> str:
    """Which of the names that weights go by `folder` uses."""
    if wanted is not None and not is_plain_name(wanted):
        raise UntrustedInput(f"weights_name={shown(wanted)} is not a plain name; use one of {', '.join(_NAMES)}")
    there = {
        name: [path for end in ("", ".index.json") if os.path.exists(path := folder / f"{name}.safetensors{end}")]
        for name in ((wanted,) if wanted else _NAMES)
    }
    there = {name: paths for name, paths in there.items() if paths}
    if len(there) > 1:
        one, other = (paths[0].name for paths in there.values())
        raise UntrustedInput(f"{shown(folder)} has both {one} and {other}; remove the one that is not meant")
    if there:
        name, paths = there.popitem()
        if len(paths) == 2 and paths[0].name not in _read_index(paths[1], follow).values():
            raise UntrustedInput(
                f"{shown(folder)} has {paths[0].name}, and {paths[1].name} that does not list it; "
                "remove the one that is not meant"
            )
        return name
    names = [path.name for path in walk_files(folder) if path.parent == folder]
    if pickles := sorted(
        (name for name in names if name.endswith(_PICKLES)), key=lambda name: not name.startswith("pytorch_model")
    ):
        raise UntrustedInput(
            f"{shown(folder / pickles[0])} is a pickle, which can run code; convert it to safetensors with "
            "transformers' from_pretrained and save_pretrained first, in a sandbox"
        )
    wanted_files = " or ".join(f"{name}.safetensors" for name in ((wanted,) if wanted else _NAMES))
    raise UntrustedInput(
        f"{shown(folder)} has no weights: no {wanted_files}, no index of one; download or copy it again"
    )


def _read_index(path: Path, follow: bool) -> dict[str, str]:
    """Tensor name -> file name. Raises: UntrustedInput on a name that is not of a file right here."""
    index = read_json(path, follow=follow)
    shard_of = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shard_of, dict) or not shard_of or len(shard_of) > MAX_TENSORS:
        raise UntrustedInput(
            f"{shown(path)} has no weight_map of 1 to {MAX_TENSORS} tensors; download or copy the folder again"
        )
    for tensor, shard in shard_of.items():
        if not isinstance(shard, str) or not is_plain_name(shard) or not shard.endswith(".safetensors"):
            raise UntrustedInput(
                f"{shown(path)} puts tensor {shown(tensor)} in {shown(repr(shard))}, which is not the plain name of a "
                "*.safetensors file in the same folder; download or copy the folder again"
            )
    for shard in sorted(set(shard_of.values())):
        if not os.path.exists(path.parent / shard):
            raise UntrustedInput(
                f"{shown(path.parent / shard)} is missing, and {path.name} lists it; download or copy the folder again"
            )
    return shard_of
