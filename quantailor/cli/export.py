"""Other formats, each with its proof:   quantailor export ./model-w4 --formats hf,onnx,gguf --out ./exported"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantailor.cli import options as o
from quantailor.cli.console import progress
from quantailor.errors import UsageError


def export(
    folder: Annotated[Path, typer.Argument(help="a folder that quantailor saved", show_default=False)],
    out: o.OutOption,
    formats: Annotated[
        str | None,
        typer.Option(help="of hf, onnx, onnx-cache, gguf, with commas between; by default hf, onnx and gguf"),
    ] = None,
    overwrite: o.OverwriteOption = False,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Write a quantized model for transformers, ONNX runtimes and llama.cpp, with the same integers in each.

    Every format is read again by its own public library and run; what came of that is in OUT/export.json.

    Example:  quantailor export ./model-w4 --formats hf,onnx,gguf --out ./exported

    A layer that a format cannot say is named and the format left out, never quantized anew: exit status 2 if you asked
    for that format by name. Status 5, and nothing is written, if a file does not hold the model's integers.
    """
    from quantailor.verbs import exporting

    asked = None if formats is None else [name.strip() for name in formats.split(",")]
    wanted = exporting.DEFAULT if asked is None else asked
    receipts = exporting.export(folder, out, wanted, overwrite=overwrite, progress=progress(quiet))
    lines = []
    for receipt in receipts:
        if receipt.refused:
            lines.append(f"{receipt.format}: refused: {receipt.refused}")
            continue
        logits = receipt.max_logit_difference
        ran = "not run" if logits is None else f"logits differ by {logits:.2g} of the largest"
        same = "the same integers in all" if receipt.integers_equal else "NOT the same integers"
        lines.append(f"{receipt.format}: {receipt.layers} layers, {same}; {ran}")
        lines += [f"  {note}" for note in receipt.notes]
    lines.append(f"saved to {out}, the proofs in {out / exporting.RECEIPT}")
    o.show({"out": str(out), "formats": [receipt.to_json() for receipt in receipts]}, "\n".join(lines), json)
    if asked and (refused := [receipt for receipt in receipts if receipt.refused]):
        raise UsageError(
            f"{refused[0].format} was asked for and refused: {refused[0].refused}; the other formats lie in {out}"
        )
