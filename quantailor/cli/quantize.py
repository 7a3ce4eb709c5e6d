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
    method: Annotated[str, typer.Option(help="rtn, gptq, qronos or autoround")] = "gptq",
    samples: o.SamplesOption = 128,
    context: o.ContextOption = 256,
    rule: o.RuleOption = None,
    no_ragged: o.NoRaggedOption = False,
    format: o.FormatOption = None,
    seed: o.SeedOption = 0,
    overwrite: o.OverwriteOption = False,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Quantize a trained model without training.

    Example:  quantailor quantize ./model --scheme w4a16-g32 --data calib.txt --out ./model-w4
    """
    from quantailor import api
    from quantailor.store.publish import check_out

    check_out(out, overwrite=overwrite, inputs=[model])
    o.check_format(format)
    bars = progress(quiet)
    quantized = api.quantize(
        model,
        scheme,
        method=method,
        data=data,
        samples=samples,
        context=context,
        rules=o.rules(rule),
        ragged=not no_ragged,
        seed=seed,
        progress=bars,
    )
    state = quantized.state
    assert state is not None
    bars.say(str(state.inventory))
    for note in state.notes:
        bars.say(f"note: {note}")
    api.save(quantized, out, overwrite=overwrite, format=format, inputs=[model])
    weights = api.num_weights(quantized.model)
    document = {
        "out": str(out),
        "scheme": str(state.scheme),
        "method": state.method,
        "size_bytes": api.weight_file_bytes(out),
        "bits_per_weight": api.bits_per_weight(out, weights),
        "coverage": state.inventory.coverage,
        "notes": state.notes,
        "inventory": [entry.to_json() for entry in state.inventory],
    }
    size = f"{document['size_bytes']:,} bytes, {document['bits_per_weight']:.2f} bits a weight"
    text = f"{state.scheme} by {state.method}: {size}; saved to {out}"
    o.show(document, text, json)
