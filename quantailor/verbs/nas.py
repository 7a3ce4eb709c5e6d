"""Quantization-aware search for an architecture: `nas`.

found = nas("path/to/model", "train.txt", out="out", max_bytes=150_000)
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantailor.data.examples import Examples
from quantailor.data.loading import Data
from quantailor.environment import environment
from quantailor.errors import QualityGateFailed, UsageError
from quantailor.evaluate.lm import Reference, evaluate_lm
from quantailor.evaluate.result import jsonable
from quantailor.evaluate.run import reference_for
from quantailor.progress import Progress
from quantailor.ptq.defaults import one_pass
from quantailor.qat.settings import Settings
from quantailor.qat.train import train as run_training
from quantailor.searching.ladder import relative_loss
from quantailor.searching.nas import Candidate, packed_size, quantized_part, search
from quantailor.searching.space import scheme_of
from quantailor.searching.supernet import Architecture, ArchitectureSpace, Supernet
from quantailor.store.jsonio import write_json
from quantailor.store.manifest import NAME as MANIFEST
from quantailor.store.manifest import write_manifest
from quantailor.store.publish import new_folder
from quantailor.verbs.auto_qat import data_for_search
from quantailor.verbs.judging import check
from quantailor.verbs.model import Model, as_model, fill, probe_of

NAS = "nas.json"
_SCORING_ROWS = 8  # calibration rows of a candidate's rounding


@dataclass(frozen=True)
class FoundArchitecture:
    """What `nas` found and saved. `data` is nas.json."""

    architecture: Architecture
    data: dict[str, Any]
    out: Path

    def to_json(self) -> dict[str, Any]:
        return self.data

    def text(self) -> str:
        """Lines for people."""
        data, lines = self.data, ["best of the candidates (score: nats a token, shared weights on their grid):"]
        for one in data["candidates"][:8]:
            lines.append(f"  {one['score']:8.4f}  {one['size_bytes']:>12,} bytes  {one['name']}")
        cost = data["cost"]
        lines.append(
            f"supernet {cost['supernet_seconds']:.0f} s, {len(data['candidates'])} candidates "
            f"{cost['search_seconds']:.0f} s, training the winner {cost['winner_seconds']:.0f} s"
        )
        return "\n".join([*lines, data["sentence"], *(f"note: {note}" for note in data["notes"])])


def nas(
    model: str | Path | Model,
    data: Data | Examples,
    *,
    out: str | Path,
    max_bytes: int,
    eval_data: Data | Examples | None = None,
    space: Mapping[str, tuple[int, ...]] | None = None,
    supernet_steps: int = 400,
    candidates: int = 40,
    settings: Settings | None = None,
    samples: int = 128,
    context: int = 256,
    overwrite: bool = False,
    format: str | None = None,
    progress: Progress | None = None,
) -> FoundArchitecture:
    """The part of a decoder, and its bits, that is best within `max_bytes` of packed weights; trained and saved.

    The model becomes a weight-sharing supernet (searching/supernet.py) that is trained on grids; its parts are scored
    under the rounding that would serve them; the winner inherits its weights and is trained by QAT towards the float
    model. `space`: values of depth, width, heads, ffn and bits. Parts are scored on rows held out of `data`; the figure
    at the end is of `eval_data`. `settings`: the winner's training. Raises: UsageError, UntrustedInput as the parts do.
    """
    began = time.monotonic()
    settings, bars = settings or Settings(), progress or Progress()
    for name, value in (("max_bytes", max_bytes), ("supernet_steps", supernet_steps), ("candidates", candidates)):
        if not 0 < value < math.inf:
            raise UsageError(f"{name}={value} must be above 0")
    inputs = [Path(p) for p in (model, data, eval_data) if isinstance(p, str | Path)]
    with new_folder(Path(out), overwrite=overwrite, inputs=inputs) as folder:
        source = as_model(model)
        if source.state is not None:
            raise UsageError("the model is quantized already; start from its float parent")
        if source.task != "lm":
            raise UsageError("architectures are searched for decoders only; this model classifies")
        chosen = ArchitectureSpace.around(source.model, space or {})
        notes = list(source.notes)
        train_data, choosing, judging = data_for_search(source, data, eval_data, context, settings.seed, notes)
        net = Supernet(copy.deepcopy(source.model), chosen)
        if (least := packed_size(net, chosen.smallest)) > max_bytes:
            raise UsageError(f"the smallest network takes {least:,} bytes, over max_bytes={max_bytes:,}; allow more")
        curve = net.train(train_data, supernet_steps, batch_size=settings.batch_size, seed=settings.seed, progress=bars)
        trained_at = time.monotonic()
        batches, _ = train_data.calibration_batches(_SCORING_ROWS, seed=settings.seed)

        def score(one: Architecture) -> float:
            return evaluate_lm(quantized_part(net, one, batches), choosing).nats_per_token

        def size(one: Architecture) -> int:
            return packed_size(net, one)

        found = search(net, score, size, max_bytes, candidates, settings.seed, bars)
        searched_at = time.monotonic()
        best = found[0].architecture
        winner, report = trained_part(net, best, source, train_data, choosing, settings, samples, bars)
        reference = reference_for(source.model, judging)
        base = reference.result if isinstance(reference, Reference) else reference
        final = evaluate_lm(winner.model, judging, reference=reference if isinstance(reference, Reference) else None)
        winner = dataclasses.replace(winner, probe=probe_of(judging), training=report)
        fill(folder, winner, format, {"architecture": dataclasses.asdict(best), "seed": settings.seed})
        parity = check(folder)
        if not parity.equal:
            raise QualityGateFailed(
                "the packed model is not the simulated one; nothing was saved: report this as a bug"
            )
        loss = relative_loss(final.value, base.value, final.higher_is_better)
        document = {
            "winner": _candidate(found[0]),
            "candidates": [_candidate(c) for c in found],
            "space": chosen.to_json(),
            "max_bytes": max_bytes,
            "metric": final.metric,
            "float": {"value": base.value, "size_bytes": 4 * sum(p.numel() for p in source.model.parameters())},
            "final": {"value": final.value, "loss": loss, "result": final.to_json(), "steps": report.steps},
            "supernet": {"steps": supernet_steps, "losses": curve},
            "check": parity.to_json(),
            "cost": {
                "supernet_seconds": trained_at - began,
                "search_seconds": searched_at - trained_at,
                "winner_seconds": time.monotonic() - searched_at,
                "seconds": time.monotonic() - began,
            },
            "sentence": f"{best}: {final.metric} {final.value:.4g} ({loss:+.2%} of the float model's "
            f"{base.value:.4g}), {found[0].size_bytes:,} bytes (at most {max_bytes:,})",
            "notes": [*notes, *report.notes],
            "environment": environment(),
            "out": str(out),
        }
        document = jsonable(document)
        write_json(folder / NAS, document)
        (folder / MANIFEST).unlink()
        scheme = str(scheme_of(best.bits, chosen.group, 16))
        write_manifest(folder, kind="quantized model", details={"scheme": scheme})
    return FoundArchitecture(best, document, Path(out))


def trained_part(
    net: Supernet,
    one: Architecture,
    source: Model,
    train_data: Examples,
    choosing: Examples,
    settings: Settings,
    samples: int,
    progress: Progress | None = None,
) -> tuple[Model, Any]:
    """A part of the supernet after PTQ and QAT towards the source, and the report of its training."""
    batches, _ = train_data.calibration_batches(samples, seed=settings.seed)
    part = quantized_part(net, one, batches, one_pass(scheme_of(one.bits, net.space.group, 16)))

    def validate(candidate: Any) -> tuple[float, ...]:
        return (evaluate_lm(candidate, choosing).nats_per_token,)

    report = run_training(part, train_data, validate, settings, teacher=source.model, progress=progress)
    model = dataclasses.replace(source, model=part, notes=[], training=None)  # type: ignore[arg-type]
    assert model.state is not None
    model.state.notes += report.notes
    if report.improved:
        model.state.method += "+qat"
    return model, report


def _candidate(one: Candidate) -> dict[str, Any]:
    architecture = one.architecture
    return {
        "name": str(architecture),
        **dataclasses.asdict(architecture),
        "score": one.score,
        "size_bytes": one.size_bytes,
    }
