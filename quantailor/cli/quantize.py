"""PTQ with one method:   quantailor quantize ./model --scheme w4a16-g32 --data calib.txt --out ./model-w4"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantailor.cli import options as o
from quantailor.cli.console import progress


def quantize(
    model: o.ModelArgument,
    scheme: o.SchemeOption,
    out: o.OutOption,
    data: Annotated[
        Path | None, typer.Option(help="calibration data; not needed for --method rtn with dynamic ranges")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="rtn, hqq (no data) · clip, gptq, qronos · adaround, autoround, blockap · before them, joined by +: "
            "smoothquant, awq, rotate, magr; after them: bias. Such as smoothquant+gptq. By default what suits the "
            "scheme",
        ),
    ] = None,
    samples: o.SamplesOption = 128,
    context: o.ContextOption = 256,
    rule: o.RuleOption = None,
    point: o.PointOption = None,
    no_ragged: o.NoRaggedOption = False,
    format: o.FormatOption = None,
    seed: o.SeedOption = 0,
    cache_mib: Annotated[
        int, typer.Option(help="memory for activations between blocks; what is beyond lies on the disk of --out", min=0)
    ] = 1024,
    device: Annotated[str, typer.Option(help="where blocks compute, such as cpu or cuda")] = "cpu",
    overwrite: o.OverwriteOption = False,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Quantize a trained model without training, one block's weights in memory at a time.

    After a kill the same command goes on behind the last finished block. Under `torchrun` the processes share the
    calibration samples.

    Example:  quantailor quantize ./model --scheme w4a16-g32 --data calib.txt --out ./model-w4
    """
    from quantailor import api
    from quantailor.cost.size import bits_per_weight, weight_file_bytes
    from quantailor.ptq import distributed
    from quantailor.store.publish import check_out

    check_out(out, overwrite=overwrite, inputs=[model])
    o.check_format(format)
    joined = distributed.join()
    bars = progress(quiet or distributed.rank() > 0)
    try:
        quantized = api.quantize_folder(
            model,
            scheme,
            out,
            method=method,
            data=data,
            samples=samples,
            context=context,
            rules=o.rules(rule),
            points=o.points(point),
            ragged=not no_ragged,
            seed=seed,
            format=format,
            overwrite=overwrite,
            cache_bytes=cache_mib * 2**20,
            device=device,
            progress=bars,
        )
        if distributed.rank() > 0:
            return
    finally:
        if joined:
            distributed.leave()
    state, weights = quantized.state, quantized.num_weights
    bars.say(str(state.inventory))
    for note in state.notes:
        bars.say(f"note: {note}")
    document = {
        "out": str(out),
        "scheme": str(state.scheme),
        "method": state.method,
        "size_bytes": weight_file_bytes(out),
        "bits_per_weight": bits_per_weight(out, weights),
        "coverage": state.inventory.coverage,
        "notes": state.notes,
        "inventory": [entry.to_json() for entry in state.inventory],
    }
    size = f"{document['size_bytes']:,} bytes, {document['bits_per_weight']:.2f} bits a weight"
    text = f"{state.scheme} by {state.method}: {size}; saved to {out}"
    o.show(document, text, json)
