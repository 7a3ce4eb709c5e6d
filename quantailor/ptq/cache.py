"""Activations between blocks: in memory up to a bound, beyond it on disk. The same tensors whatever the bound.

What later steps of interrupted work need (`durable`) is on disk in any case, and in memory as well while there is room.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from safetensors.torch import save_file
from torch import Tensor

from quantailor.store.header import read_header
from quantailor.store.tensors import read_tensor

DEFAULT_BYTES = 2**30


class Cache:
    """Tensors by key. `bound` bytes of them are held in memory; the others lie in `folder`, one file each.

    Those that come first stay in memory: blocks read all batches in turn, again and again, and a cache that threw
    out the oldest would then miss every time.
    """

    def __init__(self, folder: Path, bound: int = DEFAULT_BYTES, device: torch.device | None = None) -> None:
        self.folder, self.bound = folder, bound
        self.device = device or torch.device("cpu")
        self.used = 0
        self.peak = 0
        self._held: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}

    def put(self, key: str, tensor: Tensor, durable: Path | None = None) -> None:
        """Keep `tensor` under `key`; `durable` names a file to write whatever the bound, which `drop` leaves alone."""
        plain = tensor.detach().to("cpu")
        size = plain.numel() * plain.element_size()
        fits = self.used + size <= self.bound
        if durable is not None or not fits:
            path = durable or self.folder / f"{key}.safetensors"
            self.folder.mkdir(exist_ok=True)
            save_file({"tensor": plain.contiguous()}, path)
            self._files[key] = path
        if fits:
            # A view would keep all of the tensor that it looks into.
            self._held[key] = plain.clone() if plain.untyped_storage().nbytes() > size else plain
            self.used += size
            self.peak = max(self.peak, self.used)

    def open(self, key: str, path: Path) -> None:
        """Take up a file that `put` wrote as durable in an earlier run."""
        self._files[key] = path

    def get(self, key: str) -> Tensor:
        """What was put there, on the cache's device. Raises: KeyError."""
        held = self._held.get(key)
        if held is None:
            held = read_tensor(read_header(self._files[key])["tensor"])
        return held.to(self.device)

    def drop(self, key: str) -> None:
        """Forget it; a durable file stays."""
        held = self._held.pop(key, None)
        if held is not None:
            self.used -= held.numel() * held.element_size()
        path = self._files.pop(key, None)
        if path is not None and path.parent == self.folder:
            path.unlink(missing_ok=True)

    def row(self, keys: Sequence[str]) -> Stored:
        return Stored(self, keys)

    def keep(self, tensors: Iterable[Tensor], keys: Sequence[str], files: Sequence[Path | None]) -> Stored:
        """Put tensors one after the other, as they are made."""
        for tensor, key, path in zip(tensors, keys, files, strict=True):
            self.put(key, tensor, path)
        return self.row(keys)


class Stored(Sequence[Tensor]):
    """Tensors of a cache in order: each is fetched when it is looked at."""

    def __init__(self, cache: Cache, keys: Sequence[str]) -> None:
        self.cache, self.keys = cache, list(keys)

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Stored: ...
    def __getitem__(self, index: int | slice) -> Tensor | Stored:
        if isinstance(index, slice):
            return Stored(self.cache, self.keys[index])
        return self.cache.get(self.keys[index])

    def drop(self) -> None:
        """Forget all of them."""
        for key in self.keys:
            self.cache.drop(key)


class StoredCall:
    """What a block is called with on one batch besides its input: its tensors lie in a cache, each once."""

    def __init__(self, cache: Cache, call: list[Any], keys: dict[int, str], name: str) -> None:
        """`keys` remembers what is stored already: tensor's id -> key; the tensors must live until all calls exist."""
        self.cache = cache
        self.shape = self._store(call, keys, name)

    def __call__(self) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = self._fetch(self.shape)
        return args, kwargs

    def _store(self, value: Any, keys: dict[int, str], name: str) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in keys:
                keys[id(value)] = f"{name}-{len(keys)}"
                self.cache.put(keys[id(value)], value)
            return _Key(keys[id(value)])
        if type(value) in (list, tuple):
            return type(value)(self._store(v, keys, name) for v in value)
        if type(value) is dict:
            return {k: self._store(v, keys, name) for k, v in value.items()}
        return value

    def _fetch(self, value: Any) -> Any:
        if isinstance(value, _Key):
            return self.cache.get(value)
        if type(value) in (list, tuple):
            return type(value)(self._fetch(v) for v in value)
        if type(value) is dict:
            return {k: self._fetch(v) for k, v in value.items()}
        return value


class _Key(str):
    """Stands for a tensor in a stored call."""
