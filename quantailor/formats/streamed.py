"""The folder of `write_folder`, byte for byte, for a model that was never whole in memory.

Each part is packed to a file of its own when it is solved (`packer`); in the end their tensors, and those that were
kept as they were, are copied from file to file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from quantailor.evaluate.parity import Digests, digests
from quantailor.formats import folder as folders
from quantailor.formats import layout
from quantailor.models.loading import Skeleton
from quantailor.models.prepare import State
from quantailor.nn.packed import PackedWeight
from quantailor.ptq.stream import Packed
from quantailor.store.header import TensorFact, read_header
from quantailor.store.tensors import DTYPES, write_model_tensors

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def packer(state: State, chosen: layout.Format) -> Callable[[nn.Module, str, Path], dict[str, Any]]:
    """What writes one part of the model to a file, as `ptq.stream` asks; it returns the part's record."""
    outside: dict[int, PackedWeight] = {}  # an embedding's, for the head that is tied to it

    def pack(module: nn.Module, name: str, path: Path) -> dict[str, Any]:
        is_layer = name in state.inventory.quantized
        tensors, own = folders.stored_tensors(module, state, chosen, name, outside if is_layer else None)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
        held = {".".join(filter(None, (name, n))): parts for n, parts in digests(module).items()}
        return {"digests": held, "own": {**own, "bias": sorted(own["bias"])}}

    return pack


def write_streamed(
    folder: Path,
    skeleton: Skeleton,
    state: State,
    packed: Packed,
    parts: Path,
    *,
    format: str | None,
    probe: Mapping[str, Tensor] | None,
    details: dict[str, Any] | None,
) -> layout.Format:
    """Fill an empty `folder`; the caller publishes it. `parts` is a folder for tensors that change their type.

    Raises: as `write_folder`.
    """
    chosen, why = folders.choose_format(state.inventory, format)
    _write_configs(folder, skeleton)
    tensors: dict[str, TensorFact] = {}
    for path in packed.files:
        tensors |= read_header(path)
    tensors |= _kept(skeleton, state, tensors, parts)
    write_model_tensors(folder, tensors)
    own: dict[str, Any] = {"shapes": {}, "bias": set(), "conv": {}}
    held: Digests = {}
    for record in packed.records:
        own["shapes"] |= {name: tuple(shape) for name, shape in record["own"]["shapes"].items()}
        own["conv"] |= record["own"]["conv"]
        own["bias"] |= set(record["own"]["bias"])
        held |= record["digests"]
    folders.write_config(folder, chosen, state, own)
    logits = None if packed.logits is None else folders.last_of(packed.logits)
    ordered = {name: held[name] for name, _ in skeleton.model.named_modules(remove_duplicate=False) if name in held}
    folders.write_rest(folder, skeleton.tokenizer, state, chosen, why, ordered, probe, logits, details)
    return chosen


def _write_configs(folder: Path, skeleton: Skeleton) -> None:
    """config.json and generation_config.json, by transformers itself; the one tensor it writes is overwritten."""
    transformers_logging.disable_progress_bar()
    skeleton.model.save_pretrained(folder, state_dict={"none": torch.zeros(1)})
    (folder / "model.safetensors").unlink()


def _kept(skeleton: Skeleton, state: State, packed: Mapping[str, TensorFact], parts: Path) -> dict[str, TensorFact]:
    """Tensors outside the packed parts: where they lie in the input, or, in the model's type, in `parts`."""
    model = skeleton.model
    quantized = tuple(f"{name}." for name in state.inventory.quantized)
    tied = getattr(model, "all_tied_weights_keys", {})
    result: dict[str, TensorFact] = {}
    for name, tensor in model.state_dict().items():
        if name in packed or name.startswith(quantized) or (name in tied and tied[name] != name):
            continue
        if name in (model._keys_to_ignore_on_save or ()):
            continue
        fact = skeleton.facts[name]
        if fact.dtype != _NAMES[tensor.dtype]:
            path = parts / f"kept-{len(result):05}.safetensors"
            save_file({"tensor": skeleton.read(name).to(tensor.dtype)}, path)
            fact = read_header(path)["tensor"]
        result[name] = fact
    return result
