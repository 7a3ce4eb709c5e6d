"""Between formats, without quantizing anew:   quantailor convert ./their-gptq ./model.gguf --to gguf"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantailor.cli import options as o


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="a folder of quantailor, GPTQ, AWQ, compressed-tensors or bitsandbytes, or a .gguf file",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="new folder; for gguf a new file", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            help="hf (compressed-tensors, for stock transformers and vLLM), own (holds every grid), gguf or onnx",
            show_default=False,
        ),
    ],
    half_scales: Annotated[
        bool,
        typer.Option(
            "--half-scales",
            help="round scales to half precision: a GGUF then holds the model to the last bit, and serving reads less",
        ),
    ] = False,
    overwrite: o.OverwriteOption = False,
    json: o.JsonOption = False,
) -> None:
    """Write a quantized model in another format: the same integers and scales, read back and compared.

    Example:  quantailor convert ./their-gptq ./model.gguf --to gguf

    Nothing is quantized anew. Exit status 2, naming the layer and why, where the format cannot say it; 3 for a damaged
    IN; 5, and nothing is written, if what was written does not hold the model's integers.
    """
    from quantailor.verbs import converting

    receipt = converting.convert(source, out, to, overwrite=overwrite, half_scales=half_scales)  # type: ignore[arg-type]
    logits = receipt.max_logit_difference
    ran = "not run" if logits is None else f"logits differ by {logits:.2g} of the largest"
    same = "the same integers in all" if receipt.integers_equal else "NOT the same integers"
    lines = [f"{receipt.format}: {receipt.layers} layers, {same}; {ran}", *(f"  {note}" for note in receipt.notes)]
    o.show({"out": str(out), **receipt.to_json()}, "\n".join([*lines, f"saved to {out}"]), json)
