"""Pages of a folder that quantailor saved: what `fit`, `train` or `quantize` left in it, from its JSON files alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantailor.pages import numbers
from quantailor.pages.again import closing
from quantailor.pages.comparisons import (
    fit_comparison,
    loss_text,
    metric_name,
    num_weights,
    saved_comparison,
    steps_chart,
    steps_table,
    time_chart,
    weight_bytes,
)
from quantailor.pages.curves import loss_chart, score_text, training_chart, training_facts, training_notes
from quantailor.pages.document import (
    Block,
    Document,
    Figure,
    State,
    Verdict,
    say,
    section,
)
from quantailor.pages.layers import error_heat
from quantailor.pages.reading import Found

_VERDICTS = ("ptq", "hybrid", "qat", "infeasible")


def fitted(
    report: Mapping[str, Any], receipt: Mapping[str, Any] | None, manifest: Mapping[str, Any] | None, subject: str
) -> Document:
    """The page of `fit`, from report.json, quantailor.json and MANIFEST.json.

    Raises: UntrustedInput if report.json lacks what every `fit` writes.
    """
    data, kept = Found(report, "report.json"), Found(receipt, "quantailor.json")
    data.needed("verdict", "metric", "steps", "scheme", "final", "float")
    if data.text("verdict") not in _VERDICTS:
        data = Found({k: v for k, v in data.value.items() if k != "verdict"}, data.what)
        data.needed("verdict")
    steps = data.objects("steps")
    sections = (
        section("comparison", fit_comparison(data, steps)),
        section("steps", steps_chart(data, steps), time_chart(data, steps), steps_table(data, steps)),
        section("training", *_fit_training(data, steps)),
        section("errors", error_heat(data.objects("inventory"))),
        *closing(data, kept, Found(manifest), data.objects("inventory"), data.texts("notes")),
    )
    version = data.object("environment").text("quantailor")
    page = Document("fit", subject, _fit_verdict(data), _fit_figures(data), version=version)
    return page.with_sections(*sections)


def saved(receipt: Mapping[str, Any], manifest: Mapping[str, Any] | None, subject: str) -> Document:
    """The page of `quantize` or `train`, from quantailor.json and MANIFEST.json."""
    kept = Found(receipt, "quantailor.json")
    kept.needed("scheme", "inventory")
    training = kept.object("details").object("training")
    files = Found(manifest).object("files")
    inventory = kept.objects("inventory")
    blocks: list[Block | None] = [
        training_chart(training),
        loss_chart(training),
        training_facts(training),
        training_notes(training),
    ]
    sections = (
        section("comparison", saved_comparison(kept, files, inventory)),
        section("training", *blocks) if training else None,
        section("errors", error_heat(inventory)),
        *closing(Found({}), kept, Found(manifest), inventory, kept.texts("notes")),
    )
    verb = "train" if training else "quantize"
    verdict = _train_verdict(kept, training) if training else _quantize_verdict(kept)
    version = Found(manifest).object("versions").text("quantailor")
    return Document(verb, subject, verdict, _saved_figures(kept, files, inventory), version=version).with_sections(
        *sections
    )


def _fit_verdict(data: Found) -> Verdict:
    verdict, final = data.text("verdict"), data.object("final")
    unequal = data.object("check").flag("equal") is False
    values = {
        "metric": metric_name(data.text("metric")),
        "before": numbers.plain(data.object("float").number("value")) or say("not_finite"),
        "after": numbers.plain(final.number("value")) or say("not_finite"),
        "loss": loss_text(final.number("loss")),
        "tolerance": numbers.tolerance(data.number("tolerance")) or "?",
        "scheme": data.text("scheme"),
    }
    if unequal:
        return Verdict("bad", say("word.unequal"), say("verdict.unequal", **values))
    state: State = "bad" if verdict == "infeasible" else "good"
    return Verdict(state, say(f"word.{verdict}"), say(f"verdict.{verdict}", **values))


def _fit_figures(data: Found) -> tuple[Figure, ...]:
    final, check = data.object("final"), data.object("check")
    small, large = data.number("size_bytes"), data.number("float_size_bytes")
    figures = [
        Figure(
            metric_name(data.text("metric")),
            numbers.plain(final.number("value")) or say("not_finite"),
            say("figure.change_from", loss=loss_text(final.number("loss")),
                before=numbers.plain(data.object("float").number("value")) or "?"),
        )
    ]  # fmt: skip
    if small and large:
        figures.append(
            Figure(
                say("figure.size"),
                numbers.size(small) or "",
                say("figure.smaller", ratio=numbers.times(large / small), before=numbers.size(large)),
            )
        )
    if (bits := data.number("bits_per_weight")) is not None:
        share = numbers.percent(data.number("coverage"), 1)
        figures.append(Figure(say("figure.bits"), f"{bits:.2f}", say("figure.coverage", share=share) if share else ""))
    if (equal := check.flag("equal")) is not None:
        figures.append(
            Figure(
                say("figure.proof"),
                say("proof.equal") if equal else say("proof.unequal"),
                say("figure.integers", count=numbers.whole(check.number("integers_compared")) or "?"),
            )
        )
    return tuple(figures)


def _fit_training(data: Found, steps: list[Found]) -> list[Block | None]:
    blocks: list[Block | None] = []
    for step in steps:
        training = step.object("training")
        if chart := training_chart(training, data.text("metric"), step.text("name")):
            blocks += [chart, loss_chart(training, step.text("name")), training_facts(training)]
        blocks.append(training_notes(training))
    return blocks


def _train_verdict(kept: Found, training: Found) -> Verdict:
    start, best = score_text(training.value.get("start")), score_text(training.value.get("best"))
    step, steps = training.number("best_step"), training.number("steps")
    values = {
        "start": start or say("not_finite"),
        "best": best or say("not_finite"),
        "step": numbers.whole(step) or "?",
        "steps": numbers.whole(steps) or "?",
        "scheme": kept.text("scheme"),
    }
    if step:
        return Verdict("good", say("word.improved"), say("verdict.improved", **values))
    return Verdict("fair", say("word.kept_start"), say("verdict.kept_start", **values))


def _quantize_verdict(kept: Found) -> Verdict:
    values = {"scheme": kept.text("scheme"), "method": kept.text("method", "?")}
    return Verdict("neutral", say("word.quantized"), say("verdict.quantized", **values))


def _saved_figures(kept: Found, files: Found, inventory: list[Found]) -> tuple[Figure, ...]:
    figures = []
    training = kept.object("details").object("training")
    if best := score_text(training.value.get("best")):
        start = score_text(training.value.get("start"))
        figures.append(Figure(say("figure.score"), best, say("figure.start", start=start or "?")))
    bytes_, weights = weight_bytes(files), num_weights(inventory)
    if bytes_:
        scheme = say("figure.scheme", scheme=kept.text("scheme"))
        figures.append(Figure(say("figure.size"), numbers.size(bytes_) or "", scheme))
        if weights:
            figures.append(Figure(say("figure.bits"), f"{8 * bytes_ / weights:.2f}", say("figure.whole_file")))
    layers = sum(bool(e.text("scheme")) for e in inventory)
    share = numbers.percent(kept.number("coverage"), 1)
    figures.append(
        Figure(say("figure.layers"), numbers.whole(layers) or "", say("figure.coverage", share=share) if share else "")
    )
    return tuple(figures)
