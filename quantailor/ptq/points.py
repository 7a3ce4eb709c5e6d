"""Ranges of points inside blocks: a block's own, on what the quantized blocks before it give, its layers in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from quantailor.errors import UntrustedInput
from quantailor.models.structure import modules_of
from quantailor.nn.points import PointQuantizer
from quantailor.ptq import distributed
from quantailor.ptq.walk import run_until_stop


def switch_off(root: nn.Module) -> None:
    """Points let floats pass, until `calibrate_points` is asked for them."""
    for _, point in modules_of(root, PointQuantizer):
        point.enabled = False


def calibrate_points(
    root: nn.Module, runs: Sequence[Callable[[], Any]], masks: Sequence[Tensor | None], name: str = ""
) -> None:
    """Set the static scales of the points of `root`, the module called `name`, from `runs` of it, and switch all of its
    points on. `masks`: a run's rows that count, each [B, T] or None.

    Raises: UntrustedInput where no data reached a point, or what did is not finite.
    """
    points = [(n, point) for n, point in modules_of(root, PointQuantizer) if not point.enabled]
    static = [(n, point) for n, point in points if not point.spec.dynamic]
    quantizers = [point for _, point in static]
    for point in quantizers:
        point.start_calibration()
    if static:
        distributed.start_ranges(quantizers)
        for i, (run, mask) in enumerate(zip(runs, masks)):
            if i == 0 and distributed.rank() > 0:
                distributed.same_bins(quantizers)
            for point in quantizers:
                point.mask = mask
            run_until_stop(run)
            if i == 0 and distributed.rank() == 0:
                distributed.same_bins(quantizers)
        distributed.merge_ranges(quantizers)
    for inner, point in static:
        point.mask = None
        try:
            point.finish_calibration()
        except UntrustedInput as error:
            raise UntrustedInput(f"{'.'.join(filter(None, (name, inner)))}: {error}") from error
    for _, point in points:
        point.enabled = True
