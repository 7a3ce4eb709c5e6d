"""What is quantized inside a block:   quantailor inventory ./model --scheme w8a8 --point norm=a8"""

from __future__ import annotations

from typing import Annotated

import typer

from quantailor.cli import options as o


def inventory(
    model: o.ModelArgument,
    scheme: Annotated[
        str | None, typer.Option(help="what it would be quantized to; leave out for a quantized model")
    ] = None,
    point: o.PointOption = None,
    rule: o.RuleOption = None,
    no_ragged: o.NoRaggedOption = False,
    json: o.JsonOption = False,
) -> None:
    """Count what is quantized in each block, and say why everything else is kept. Changes nothing.

    Points are tensors inside a block besides weights and inputs: scores, kv, norm, gelu, residual, embedding, output.
    They are found by watching one pass of the model.

    Example:  quantailor inventory ./model --scheme w8a8 --point output=a8 --point scores=a8 --point norm=a8-static
    """
    from quantailor import api

    report = api.inventory(model, scheme, points=o.points(point), rules=o.rules(rule), ragged=not no_ragged)
    o.show(report.to_json(), str(report), json)
