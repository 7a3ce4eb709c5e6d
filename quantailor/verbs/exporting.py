"""`export`: one packed model in the formats that others read; each is written, read again, executed and compared."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from quantailor.environment import environment
from quantailor.errors import QualityGateFailed, UsageError
from quantailor.evaluate.parity import differing, digests
from quantailor.formats import folder as folders
from quantailor.formats import gguf
from quantailor.formats.receipt import ExportReceipt, refusal
from quantailor.formats.stock import flat_inputs
from quantailor.numerics.measures import relative_max_difference
from quantailor.progress import Progress
from quantailor.store.jsonio import write_json
from quantailor.store.manifest import hash_folder, write_manifest
from quantailor.store.publish import new_folder
from quantailor.verbs.model import Model, as_model, default_probe, pack

RECEIPT = "export.json"
DEFAULT = ("hf", "onnx", "gguf")
_ONNX_EXTRA = ("onnx", "onnxscript", "onnxruntime")


def export(
    folder: str | Path | Model,
    out: str | Path,
    formats: Sequence[str] = DEFAULT,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[ExportReceipt]:
    """Write a quantized model into a folder of each format below `out`, and the proofs into `out`/export.json.

    `hf`: our folder, which transformers loads; `onnx`: a graph of opset 21; `onnx-cache`: the
    same with the keys and values of earlier positions, to generate from; `gguf`: one file for llama.cpp. No layer is
    quantized anew: a format that cannot say one is refused, which its receipt tells, and the others are written.
    Raises: UsageError if the model is float, a format is unknown or every one is refused; QualityGateFailed if what was
    written does not hold or compute what the model does. `out` appears whole or not at all.
    """
    formats = _checked(formats)
    model = as_model(folder)
    if model.state is None:
        raise UsageError("the model is float, and export quantizes nothing; quantize it first, then export the result")
    model = model if model.is_packed else pack(model)
    model = dataclasses.replace(model, model=model.model.eval(), probe=model.probe or default_probe(model))
    inputs = [Path(folder)] if isinstance(folder, str | Path) else []
    parent = {**model.parent, "hash": hash_folder(inputs[0])} if inputs else model.parent
    receipts = []
    with new_folder(Path(out), overwrite=overwrite, inputs=inputs) as tmp:
        with (progress or Progress()).task("exporting", len(formats)) as advance:
            for name in formats:
                receipts.append(_written(name, tmp / name, model))
                advance(1)
        if all(receipt.refused for receipt in receipts):
            raise UsageError("; ".join(f"{receipt.format}: {receipt.refused}" for receipt in receipts))
        write_json(
            tmp / RECEIPT,
            {
                "source": parent,
                "scheme": str(model.state.scheme) if model.state else None,
                "formats": [receipt.to_json() for receipt in receipts],
                "environment": environment(),
            },
        )
        details = {"formats": [receipt.format for receipt in receipts if not receipt.refused]}
        write_manifest(tmp, kind="export", details=details)
    return receipts


def _checked(formats: Sequence[str]) -> list[str]:
    """The formats without repetition. Raises: UsageError where one is unknown, or there is none."""
    if isinstance(formats, str):
        formats = formats.split(",")
    for name in formats:
        if name not in WRITERS:
            raise UsageError(f"format {name!r} is none of {', '.join(WRITERS)}")
    if not formats:
        raise UsageError(f"no format to export to; name some of {', '.join(WRITERS)}")
    return list(dict.fromkeys(formats))


def _written(name: str, folder: Path, model: Model) -> ExportReceipt:
    """The receipt of one format, its files named from the folder above `folder`."""
    folder.mkdir()
    try:
        receipt = WRITERS[name](folder, model)
    except QualityGateFailed:
        raise
    except UsageError as error:  # this format cannot say the model: another may
        shutil.rmtree(folder)
        return refusal(name, str(error))
    files = sorted(p.relative_to(folder.parent).as_posix() for p in folder.rglob("*") if p.is_file())
    return dataclasses.replace(receipt, format=name, files=tuple(files))


def write_and_read(folder: Path, model: Model, format: str | None = None) -> ExportReceipt:
    """The folder that `save` writes, read back strictly. Raises: QualityGateFailed where that is not the model."""
    assert model.state is not None and model.probe is not None
    details = {"parent": model.parent, **model.details}
    chosen = folders.write_folder(
        folder, model.model, model.tokenizer, format=format, probe=model.probe, details=details
    )
    again = folders.read_folder(folder).model
    different = differing(digests(model.model), digests(again))
    logits, expected = (folders.last_logits(m, model.probe) for m in (again, model.model))
    difference = relative_max_difference(logits, expected)
    if different or not difference <= 1e-5:
        layer, what = next(iter(different.items()), ("the logits", f"{difference:.1e} of the largest"))
        raise QualityGateFailed(f"{layer}: {what} differ after reading; nothing was written; please report this model")
    reader = "stock transformers with compressed-tensors" if chosen == "compressed-tensors" else "transformers, after"
    reader += "" if chosen == "compressed-tensors" else " `import quantailor.hf`,"
    notes: tuple[str, ...] = (f"layout {chosen}: {reader} reads it",)
    if chosen == "compressed-tensors" and (flat := flat_inputs(again, model.probe)):
        notes += (
            f"{', '.join(flat[:3])} {'gets' if len(flat) == 1 else 'get'} a 2-D input, for which stock "
            "compressed-tensors (0.20) takes one scale where ours has one a row; keep it by a rule if stock "
            "transformers is to compute the same",
        )
    return ExportReceipt(
        "own" if format == "quantailor" else "hf", (), len(model.state.inventory.quantized), True, difference, notes
    )


def _onnx(folder: Path, model: Model, cache: bool = False) -> ExportReceipt:
    if missing := [name for name in _ONNX_EXTRA if find_spec(name) is None]:
        raise UsageError(f"ONNX needs the package {missing[0]}; install it with: pip install 'quantailor[onnx]'")
    from quantailor.formats import onnx

    check_points(model, "ONNX")
    if model.task == "images":
        raise UsageError("the model takes images, and the ONNX export traces tokens; export it as hf")
    assert model.probe is not None
    return onnx.write(folder, model.model, model.tokenizer, model.probe, cache=cache)


def _onnx_cache(folder: Path, model: Model) -> ExportReceipt:
    return _onnx(folder, model, cache=True)


def _gguf(folder: Path, model: Model) -> ExportReceipt:
    check_points(model, "GGUF")
    name = model.parent.get("folder") or "model"
    return gguf.write(model.model, folder / f"{name}.gguf", tokenizer=model.tokenizer, probe=model.probe)


def check_points(model: Model, format: str) -> None:
    """Raises: UsageError where points inside blocks are quantized, which no graph of this format would do."""
    points = model.state.inventory.points if model.state else ()
    if point := next((p for p in points if p.spec is not None), None):
        raise UsageError(f"{format} has no place for {point.name}, a quantized point inside a block; export as hf")


WRITERS: dict[str, Callable[..., ExportReceipt]] = {
    "hf": write_and_read,
    "onnx": _onnx,
    "onnx-cache": _onnx_cache,
    "gguf": _gguf,
}
