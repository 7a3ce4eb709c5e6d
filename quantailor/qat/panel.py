"""A recording as the few lines that somebody watches: one a measure, with its way so far and its worst layer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from quantailor.progress import Row
from quantailor.qat.alarms import sentence
from quantailor.qat.recording import Look, Measure, Recording

# measure -> (what it is called, whether it is a share)
_WORST = {
    "error": ("error of weights", False),
    "clip": ("weights clipped", True),
    "flips": ("rounding flips a step", True),
    "reversals": ("flips back", True),
    "drift_peak": ("scale drift", False),
    "range": ("input range", False),
}
_POINTS = 40  # of a row's way


def rows(recording: Recording) -> list[Row]:
    """What there is to see by now."""
    measures, looks = recording.measures, recording.looks
    found = [
        _row("training loss", [m.loss for m in measures]),
        _row("held-out score", [look.score[0] for look in looks], _best(looks)),
        _row("gradient", [m.gradient for m in measures]),
        *(_of_layers(recording, measures, name, *told) for name, told in _WORST.items()),
        _row("smallest norm gain", [min(_known(m.norms.get("gain", [])), default=None) for m in measures]),
    ]
    shown = [row for row in found if row is not None]
    for alarm in recording.alarms[-3:]:
        shown.append(Row("alarm", (), sentence(alarm), "bad"))
    if measures and not recording.alarms:
        shown.append(Row("alarm", (), "none", "good"))
    if recording.end is not None:
        shown.append(Row("end", (), recording.end.why or f"step {recording.end.step}: all steps were made"))
    return shown


def _row(name: str, values: Sequence[float | None], more: str = "") -> Row | None:
    known = [v for v in values if v is not None]
    if not known:
        return None
    return Row(name, tuple(known[-_POINTS:]), f"{known[-1]:.4g}{more}")


def _best(looks: Sequence[Look]) -> str:
    scores = [(look.score[0], look.step) for look in looks if look.score[0] is not None]
    return f", best {min(scores)[0]:.4g} at step {min(scores)[1]}" if scores else ""


def _of_layers(recording: Recording, measures: Sequence[Measure], name: str, title: str, share: bool) -> Row | None:
    """The median of the layers by step, and the layer that is worst now."""
    medians = [statistics.median(known) for m in measures if (known := _known(m.layers.get(name, [])))]
    if not medians:
        return None
    last = measures[-1].layers.get(name, [])
    worst = max(((v, n) for v, n in zip(last, recording.head.layers) if v is not None), default=None)
    form = "{:.2%}" if share else "{:.4g}"
    text = form.format(medians[-1]) + (f", at most {form.format(worst[0])} in {worst[1]}" if worst else "")
    return Row(title, tuple(medians[-_POINTS:]), text)


def _known(column: Sequence[float | None]) -> list[float]:
    return [v for v in column if v is not None]
