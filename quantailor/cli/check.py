"""The parity receipt:   quantailor check ./model-w4"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantailor.cli import options as o
from quantailor.errors import QualityGateFailed


def check(
    folder: Annotated[
        Path, typer.Argument(help="a folder that quantailor saved, or a quantized one of others", show_default=False)
    ],
    json: o.JsonOption = False,
) -> None:
    """Prove that the packed model is the one that was trained: every integer, every layer, the logits.

    Example:  quantailor check ./model-w4

    Exit status 5 and the layer's name if anything differs; 3 if the folder is damaged.
    """
    from quantailor import api

    parity = api.check(folder)
    lines = [
        f"{parity.layers} layers, {parity.integers:,} integers: {'NOT ' if parity.differing else ''}all equal",
        f"largest logit difference {parity.max_logit_difference:.2g} of the largest logit "
        f"(allowed {parity.tolerance:g}), "
        f"likeliest token or class {'the same' if parity.top1_equal else 'NOT the same'} everywhere",
        *(f"{name}: {what} differ" for name, what in parity.differing.items()),
    ]
    o.show(parity.to_json(), "\n".join(lines), json)
    if not parity.equal:
        name = next(
            iter(parity.differing), max(parity.per_layer, key=lambda n: parity.per_layer[n], default="the model")
        )
        raise QualityGateFailed(
            f"{folder}: packed and simulated differ, first in {name}; quantize again from the float model"
        )
