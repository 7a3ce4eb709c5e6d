"""GGUF for llama.cpp: the model's own integers in Q8_0, Q4_0 and Q4_1 blocks, written, read again and compared.

    receipt = write("out/", "model.gguf")          a folder that quantailor saved, or a model in memory

Nothing is quantized here. A layer whose integers no block holds is refused by name. After writing, the public `gguf`
package reads the file, and its own dequantization must give integer times fp16 scale, bit for bit, for every weight;
only then does the file appear at its place.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata as installed
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import quantailor
from quantailor.errors import QualityGateFailed, UsageError
from quantailor.evaluate.measuring import measuring
from quantailor.formats import folder as folders
from quantailor.formats import gguf_metadata, gguf_tokenizer
from quantailor.formats.gguf_model import read_gguf
from quantailor.formats.gguf_names import Architecture
from quantailor.formats.gguf_tensors import Plan, plan
from quantailor.formats.probe import stored_probe
from quantailor.formats.receipt import ExportReceipt
from quantailor.models.loading import load_float
from quantailor.models.prepare import SIMULATED, pack_model, state_of
from quantailor.models.structure import modules_of
from quantailor.numerics.measures import relative_max_difference
from quantailor.store.paths import shown
from quantailor.store.publish import DiskFull, is_disk_full

_MISSING = "GGUF needs the gguf package; install it with: pip install 'quantailor[gguf]'"


def write(
    source: str | Path | PreTrainedModel,
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    probe: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> ExportReceipt:
    """Write `source` as one GGUF file, with the proof that its integers are in it.

    `source`: a model folder (whose tokenizer and probe are taken), or a model, float, simulated or packed, which is
    left as it is. Without a tokenizer the file says that it has none. `probe`: tokens on which the file, read back,
    is run against the model.
    Raises: UsageError if `out` exists, the gguf package is missing, or a layer, the architecture or the tokenizer
    cannot be said in GGUF; QualityGateFailed if what was written is not what was meant (nothing is left then).
    """
    library, out = _library(), Path(out)
    if isinstance(source, str | Path) and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(source)):
        raise UsageError(f"{shown(out)} lies inside the input, which is never written to; choose another --out")
    model, tokenizer, probe = _loaded(source, tokenizer, probe)
    arch = gguf_metadata.architecture_of(model.config)
    planned = plan(model, arch)
    entries = _entries(model, tokenizer, planned, arch, out.stem)
    with _new_file(out, overwrite) as tmp:
        _write(library, tmp, arch, entries, planned)
        differences, scale, offset = _compare(library, tmp, planned)
        logits = None if probe is None else _logit_difference(tmp, model, probe)
    notes = list(planned.notes)
    if scale or offset:
        notes.append(
            f"scales are fp16 in GGUF: the largest change is {scale:.2g} of the scale"
            + (f", of an offset {offset:.2g} of a step" if offset else "")
            + "; convert the model with --half-scales first (with_half_scales) to have none"
        )
    return ExportReceipt("gguf", (str(out),), len(planned.layers), True, logits, tuple(notes), None, differences, scale)


def _library() -> Any:
    """The gguf package: an extra, imported when it is needed and nowhere else."""
    try:
        import gguf
    except ImportError as error:
        raise UsageError(_MISSING) from error
    return gguf


def _loaded(
    source: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, probe: Mapping[str, Tensor] | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, Mapping[str, Tensor] | None]:
    """The packed (or float) model with what belongs to it."""
    if isinstance(source, str | Path):
        source = Path(source)
        if not (source / folders.RECEIPT).exists():
            plain = load_float(source)
            return plain.model, tokenizer or plain.tokenizer, probe
        held = folders.read_folder(source)
        if probe is None and (stored := stored_probe(source, held.model.config)) is not None:
            probe = stored[0]
        return held.model, tokenizer or held.tokenizer, probe
    model = source
    if any(True for _ in modules_of(source, SIMULATED)):
        pack_model(model := copy.deepcopy(source))
    return model, tokenizer, probe


def _entries(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, planned: Plan, arch: Architecture, name: str
) -> dict[str, Any]:
    """The file's metadata, in order. Notes on the tokenizer go to the plan's."""
    config: Any = model.config
    kinds = [item.kind for item in planned.items if len(item.shape) > 1 and item.name in planned.blocks]
    kinds = kinds or [item.kind for item in planned.items if len(item.shape) > 1]
    state = state_of(model)
    entries: dict[str, Any] = {
        "general.architecture": arch.name,
        "general.name": name if name.isprintable() and name else "model",
        "general.file_type": gguf_metadata.FILE_TYPES[max(kinds, key=kinds.count)],
        "general.quantization_version": gguf_metadata.QUANTIZATION_VERSION,
        **gguf_metadata.to_metadata(config, planned.ffn_width),
        "quantailor.version": quantailor.__version__,
    }
    if state is not None:
        entries["quantailor.scheme"] = str(state.scheme)
    if planned.ffn_width != (own := gguf_metadata.ffn_width_of(config)):
        entries[gguf_metadata.FFN_WIDTH] = own
    if tokenizer is None:
        planned.notes.append("without a tokenizer: llama.cpp takes tokens, no text")
        return entries | {"tokenizer.ggml.model": "no_vocab"}
    more, notes = gguf_tokenizer.to_metadata(tokenizer, config.vocab_size)
    ends = getattr(model.generation_config, "eos_token_id", None)
    if isinstance(ends, list) and len(ends) > 1:
        notes.append(f"generation also ends at tokens {ends}; the file names {tokenizer.eos_token_id} alone")
    planned.notes.extend(notes)
    return entries | more


def _write(library: Any, path: Path, arch: Architecture, entries: Mapping[str, Any], planned: Plan) -> None:
    writer = library.GGUFWriter(path, arch.name)
    for key, value in entries.items():
        if key != "general.architecture":  # the writer has put it there
            _add(writer, key, value)
    for item in planned.items:
        kind = library.GGMLQuantizationType[item.kind]
        writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), item.num_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for item in planned.items:
            writer.write_tensor_data(item.make())
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:  # the writer leaves empty arrays out
        writer.add_array(key, value)


def _compare(library: Any, path: Path, planned: Plan) -> tuple[dict[str, str], float, float]:
    """(layer -> what fp16 changed, largest change of a scale, of an offset), by the public package's own reading.

    An integer times an fp16 scale is exact in float32, so equal products and equal scales mean equal integers.
    Raises: QualityGateFailed naming the first tensor that is not bit for bit what was meant.
    """
    found = {tensor.name: tensor for tensor in library.GGUFReader(path).tensors}
    if list(found) != [item.name for item in planned.items]:
        raise QualityGateFailed(f"the gguf package {installed.version('gguf')} reads other tensors than were written")
    differences, scale, offset = {}, 0.0, 0.0
    names = {target: name for name, target in planned.layers.items()}
    for item in planned.items:
        tensor = found[item.name]
        sound = tensor.tensor_type.name == item.kind and tuple(map(int, tensor.shape))[::-1] == item.shape
        values = library.quants.dequantize(tensor.data, tensor.tensor_type)
        if item.name in planned.blocks:
            blocks, rounding = planned.blocks[item.name]()
            sound = sound and np.array_equal(values, blocks.dequantize().numpy())
            scale, offset = max(scale, rounding.scale), max(offset, rounding.offset)
            if rounding.scale or rounding.offset:
                differences[names[item.name]] = str(rounding)
        else:
            sound = sound and tensor.data.tobytes() == item.make().tobytes()
        if not sound:
            raise QualityGateFailed(f"{item.name}: the gguf package reads something else than was written; report this")
    return differences, scale, offset


def _logit_difference(path: Path, model: PreTrainedModel, probe: Mapping[str, Tensor]) -> float:
    """The file, read by our own strict reader, against the model, relative to the largest logit."""
    logits = []
    for one in (model, read_gguf(path).model):
        with measuring(one) as device:
            inputs = {name: value.to(device) for name, value in probe.items() if name != "token_type_ids"}
            logits.append(one(**inputs).logits.float().cpu())
    return relative_max_difference(logits[1], logits[0])


@contextmanager
def _new_file(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary beside `out` that becomes it, on the disk, if the block ends well, and vanishes if it does not."""
    if out.is_dir():
        raise UsageError(f"{shown(out)} is a folder; name the file, such as {shown(out / 'model.gguf')}")
    if os.path.lexists(out) and not overwrite:
        raise UsageError(f"{shown(out)} exists; choose another --out or pass --overwrite")
    tmp = out.parent / f".{out.name}.tmp-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        with open(tmp, "rb") as file:
            os.fsync(file.fileno())
        os.replace(tmp, out)
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(f"no room to write {shown(out)}; free some space, or choose an --out elsewhere") from error
        raise UsageError(f"cannot write {shown(out)}: {error.strerror or error}; choose another --out") from error
    finally:
        with suppress(OSError):
            os.unlink(tmp)
