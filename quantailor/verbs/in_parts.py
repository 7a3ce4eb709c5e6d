"""PTQ of a folder that may be larger than memory: `quantize_folder`."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantailor.cost.size import num_weights
from quantailor.data.examples import Examples
from quantailor.data.loading import Data
from quantailor.environment import environment
from quantailor.errors import UsageError
from quantailor.formats import folder as folders
from quantailor.formats.streamed import packer, write_streamed
from quantailor.models.loading import (
    NotInParts,
    Skeleton,
    open_skeleton,
)
from quantailor.models.prepare import State, planned
from quantailor.progress import Progress
from quantailor.ptq import distributed
from quantailor.ptq.cache import DEFAULT_BYTES as DEFAULT_CACHE_BYTES
from quantailor.ptq.chain import Chain
from quantailor.ptq.driver import methods_of
from quantailor.ptq.stream import PARTS, stream, why_not_in_parts
from quantailor.recipe import Rule
from quantailor.spec import QuantSpec, Scheme
from quantailor.store.manifest import hash_folder
from quantailor.store.publish import DiskFull, check_room, is_disk_full, new_folder
from quantailor.store.work import Work, work_folder
from quantailor.verbs.model import Model, default_probe, examples_for, fill, probe_of
from quantailor.verbs.quantizing import WITHOUT_DATA, PointsLike, check_without_data, drawn, quantize, recipe_for_ptq


@dataclass(frozen=True)
class QuantizedFolder:
    """What `quantize_folder` saved. `in_memory_because`: None where it worked block by block."""

    out: Path
    state: State
    num_weights: int
    in_memory_because: str | None = None


def quantize_folder(
    folder: str | Path,
    scheme: str | Scheme,
    out: str | Path,
    *,
    method: str | None = None,
    data: Data | Examples | None = None,
    samples: int = 128,
    context: int = 256,
    rules: Sequence[Rule] = (),
    points: PointsLike = None,
    ragged: bool = True,
    seed: int = 0,
    format: str | None = None,
    overwrite: bool = False,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    device: str = "cpu",
    progress: Progress | None = None,
) -> QuantizedFolder:
    """`quantize` and `save` for a folder that may be larger than memory: one block's weights are there at a time.

    The same bytes as those two would write. Activations between blocks take `cache_bytes` of memory at most, then
    disk. After a kill the same call goes on behind the last finished block. Where torch.distributed is initialised,
    every process calls this, works on its share of the samples, and the first one writes.
    A model that cannot be taken apart is quantized in memory, and its receipt says why.
    Raises: as `quantize` and `save`; DiskFull, before any work, where the disk of `out` is too small.
    """
    folder, out = Path(folder), Path(out)
    if not folder.exists() and folder.parent.is_dir():
        folders.recover(folder)  # a writer may have been killed between its two renames
    if (folder / folders.RECEIPT).exists():
        raise UsageError("the model is quantized already; start from its float parent")
    recipe = recipe_for_ptq(scheme, rules, method or ("rtn" if data is None else None), ragged, seed, points)
    options: dict[str, Any] = {"method": method, "samples": samples, "context": context, "seed": seed, "points": points}
    with ExitStack() as stack:
        place = None
        if distributed.rank() == 0:
            place = stack.enter_context(new_folder(out, overwrite=overwrite, inputs=[folder]))
        distributed.barrier()
        work: Work | None = None
        try:
            if recipe.points:
                raise NotInParts("points inside blocks are found by watching the whole model")
            skeleton = open_skeleton(folder)
            weights = num_weights(skeleton.model)
            state = planned(skeleton.model, recipe)
            state.method = recipe.method
            chain = methods_of(state, recipe.method)
            if reason := why_not_in_parts(skeleton, state, chain):
                raise NotInParts(reason)
            format_, _ = folders.choose_format(state.inventory, format)
            shell = Model(skeleton.model, skeleton.tokenizer, skeleton.task)
            batches: list[dict[str, Tensor]] = []
            notes, probe = [WITHOUT_DATA], default_probe(shell)
            if data is None:
                check_without_data(state, chain)
            else:
                examples = examples_for(shell, data, context=context)
                batches, notes = drawn(examples, samples, seed)
                probe = probe_of(examples)
            parent = {"folder": folder.name, "hash": hash_folder(folder)}
            config = {
                "model": parent["hash"],
                "recipe": repr(recipe),
                "format": format_,
                "data": _fingerprint([*batches, probe]),
                "processes": distributed.world(),
                "device": device,
                "versions": {k: v for k, v in environment().items() if k not in ("threads", "device")},
            }
            work = _work_for(out, config, progress)
            _check_room(out, skeleton, state, batches, chain, work)
            packed = stream(
                skeleton,
                state,
                batches,
                chain,
                work,
                packer(state, format_),
                probe=probe,
                cache_bytes=cache_bytes,
                device=torch.device(device),
                progress=progress,
            )
            state.notes += notes
            if place is not None:
                write_streamed(
                    place,
                    skeleton,
                    state,
                    packed,
                    work.path(PARTS),
                    format=format,
                    probe=probe,
                    details={"parent": parent, "training": None},
                )
            result = QuantizedFolder(out, state, weights)
        except NotInParts as error:
            model = quantize(folder, scheme, data=data, rules=rules, ragged=ragged, progress=progress, **options)
            assert model.state is not None
            model.state.notes.append(f"the whole model was held in memory: {error}")
            weights = num_weights(model.model)
            if place is not None:
                fill(place, model, format)
            result = QuantizedFolder(out, model.state, weights, str(error))
        except BaseException as error:
            if work is not None and (not work.records or isinstance(error, DiskFull) or is_disk_full(error)):
                work.remove()
            raise
    if distributed.rank() == 0:
        shutil.rmtree(work_folder(out), ignore_errors=True)
    distributed.barrier()
    return result


def _work_for(out: Path, config: dict[str, Any], progress: Progress | None) -> Work:
    """The work folder of this process: the first's is beside `out`, the others' lie in it."""
    world, rank = distributed.world(), distributed.rank()
    folder = work_folder(out)
    work = None
    for turn in range(world):
        if turn == rank:
            work = Work(folder / f"process-{rank}" if rank else folder, config, states=2 if world > 1 else 1)
        if turn == 0:
            distributed.barrier()
    assert work is not None
    if work.fresh_because and progress is not None:
        progress.say(f"the unfinished work in {work.folder} is not continued: {work.fresh_because}; starting afresh")
    return work


def _fingerprint(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """sha256 of all tensors of some batches, in hexadecimal."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_room(
    out: Path,
    skeleton: Skeleton,
    state: State,
    batches: Sequence[Mapping[str, Tensor]],
    chain: Callable[[str], Chain],
    work: Work,
) -> None:
    """Raises: DiskFull unless the disk of `out` has room for the packed model, twice for a while, and for the hidden
    states before and after a block."""
    quantized = {name: scheme.weight for name, scheme in state.inventory.quantized.items()}
    size = 0.0
    places = set()
    for name, fact in skeleton.facts.items():
        if (fact.file, fact.start) in places:
            continue
        places.add((fact.file, fact.start))
        spec = quantized.get(name.removesuffix(".weight"))
        size += fact.num_bytes if spec is None else _packed_bytes(spec, prod(fact.shape), fact.shape[0])
    width = getattr(skeleton.model.config, "hidden_size", 0) * skeleton.dtype.itemsize
    rows = sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch)
    paths = 2 if any(chain(name).needs_float_path for name in quantized) else 1
    needed = int(2 * size + 2 * paths * rows * width)
    there = sum(path.stat().st_size for path in work.folder.rglob("*") if path.is_file())
    check_room(out, needed - there)


def _packed_bytes(spec: QuantSpec, num_weights: int, rows: int) -> float:
    scales = num_weights / spec.group_size if spec.group_size else rows
    return num_weights * spec.grid.bits / 8 + 5 * scales
