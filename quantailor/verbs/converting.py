"""`convert`: one quantized model, from anyone's format into another, without quantizing it anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from quantailor.environment import environment
from quantailor.errors import UsageError
from quantailor.formats import layout
from quantailor.formats.gguf import write as write_gguf
from quantailor.formats.gguf_layers import with_half_scales
from quantailor.formats.receipt import ExportReceipt
from quantailor.store.jsonio import write_json
from quantailor.store.manifest import write_manifest
from quantailor.store.paths import shown
from quantailor.store.publish import new_folder
from quantailor.verbs.exporting import RECEIPT, WRITERS, check_points, write_and_read
from quantailor.verbs.model import Model, as_model, default_probe, pack

To = Literal["hf", "own", "gguf", "onnx"]


def convert(
    source: str | Path | Model, out: str | Path, to: To, *, overwrite: bool = False, half_scales: bool = False
) -> ExportReceipt:
    """Write the integers, scales and zero points of `source` in another format, read them back and compare.

    `source`: a folder of quantailor, GPTQ, AWQ, compressed-tensors or bitsandbytes, a GGUF file, or a model. `to`:
    `hf` (compressed-tensors: stock transformers and vLLM), `own` (holds every grid), `gguf` (a file; float models as
    well) or `onnx`. A model without a probe runs on tokens spread over its vocabulary. `half_scales`: first,
    scales are rounded to numbers of half precision, which is noted; integers stay. Serving then reads scales of half
    the size, and a GGUF of the model holds it to the last bit.
    Raises: UsageError where the format cannot say a layer, which is named, or `out` exists; QualityGateFailed if what
    was written does not hold or compute what the model does; UntrustedInput for a damaged `source`. `out` appears whole
    or not at all.
    """
    if to not in get_args(To):
        raise UsageError(f"format {to!r} is none of {', '.join(get_args(To))}")
    out = Path(out)
    if (to == "gguf") != (out.suffix.lower() == ".gguf"):
        example = shown(out.with_suffix(".gguf") if to == "gguf" else out.with_suffix(""))
        raise UsageError(f"{to} is {'one file' if to == 'gguf' else 'a folder'}; name it such as {example}")
    model = _ready(source)
    notes: tuple[str, ...] = ()
    if half_scales:
        if model.state is None:
            raise UsageError("half_scales is about a quantized model's scales, and this one is float; leave it out")
        halved, change = with_half_scales(model.model)
        model, notes = dataclasses.replace(model, model=halved), (f"scales were rounded to fp16: {change:.2g} at most",)
    receipt = _written(model, source, Path(out), to, overwrite)
    return dataclasses.replace(receipt, notes=(*notes, *receipt.notes))


def _written(model: Model, source: str | Path | Model, out: Path, to: To, overwrite: bool) -> ExportReceipt:
    inputs = [Path(source)] if isinstance(source, str | Path) else []
    if to == "gguf":
        if any(out.resolve().is_relative_to(path.resolve()) for path in inputs):
            raise UsageError(f"{shown(out)} lies in or is the input, which is never written to; choose another OUT")
        check_points(model, "GGUF")
        return write_gguf(model.model, out, tokenizer=model.tokenizer, probe=model.probe, overwrite=overwrite)
    if model.state is None:
        raise UsageError(f"the model is float, and convert quantizes nothing; quantize it first, or use {'gguf'!r}")
    if to == "hf" and (reason := layout.why_not_compressed_tensors(model.state.inventory)):
        raise UsageError(f"compressed-tensors cannot hold this model: {reason}; use --to own, which holds every grid")
    with new_folder(out, overwrite=overwrite, inputs=inputs) as folder:
        if to == "onnx":
            receipt = WRITERS["onnx"](folder, model)
            write_json(
                folder / RECEIPT,
                {"source": model.parent, "scheme": str(model.state.scheme), "formats": [receipt.to_json()]}
                | {"environment": environment()},
            )
            write_manifest(folder, kind="export", details={"formats": ["onnx"]})
            return receipt
        return write_and_read(folder, model, "quantailor" if to == "own" else "compressed-tensors")


def _ready(source: str | Path | Model) -> Model:
    model = as_model(source)
    if model.state is not None and not model.is_packed:
        model = pack(model)
    return dataclasses.replace(model, model=model.model.eval(), probe=model.probe or default_probe(model))
