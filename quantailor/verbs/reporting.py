"""One HTML page of what another verb left behind: `report`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from quantailor.errors import UntrustedInput, UsageError
from quantailor.formats.folder import RECEIPT
from quantailor.models.prepare import PACKED
from quantailor.models.structure import modules_of
from quantailor.pages import folders, results
from quantailor.pages.document import Document, Sample, Samples, Section, say, section
from quantailor.pages.html import is_report, page
from quantailor.pages.recording import recorded
from quantailor.pages.several import compared
from quantailor.pages.words import Words
from quantailor.qat.recording import NAME as RECORDING
from quantailor.qat.recording import read
from quantailor.store.jsonio import read_json
from quantailor.store.manifest import NAME as MANIFEST
from quantailor.store.manifest import read_manifest
from quantailor.store.paths import open_regular, shown
from quantailor.store.publish import recover, write_atomic
from quantailor.verbs.auto_qat import SEARCH
from quantailor.verbs.distributions import activation_histogram, fits, weight_histogram, weight_ON
from quantailor.verbs.judging import generate
from quantailor.verbs.model import Model, default_probe, load
from quantailor.verbs.nas import NAS

FIT = "report.json"
_MOST_JSON = 100_000_000
_PROMPT_TOKENS, _NEW_TOKENS, _MOST_PROMPTS = 16, 48, 8


@dataclass(frozen=True)
class Look:
    """What is to be seen of the model itself, beside its receipts. `layer` None: the one that rounding hurt most."""

    layer: str | None = None
    prompts: Sequence[str] | None = None  # None: the opening tokens of the rows kept for the proof
    float_model: str | Path | Model | None = None  # the parent, to compare with
    weights: bool = True  # False: nothing but the receipts is read, however large the model is


def report(
    path: str | Path,
    out: str | Path | None = None,
    lang: str = "en",
    layer: str | None = None,
    prompts: Sequence[str] | None = None,
    float_model: str | Path | Model | None = None,
    *,
    weights: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write one self-contained HTML file about `path`, and return where it is.

    `path`: a folder that `fit`, `train` or `quantize` saved; a folder of several such; or a file that a command wrote
    with --json (`plan`, `search`, `sensitivity`). `out`: by default NAME.html beside `path`; never inside a folder that
    has a manifest, which lists every file of it. `weights=False` reads the receipts only; otherwise the model is loaded
    for the distributions of `layer` and for text; with `float_model`, its parent, both are shown before and after.
    Raises: UsageError, UntrustedInput as the parts do; nothing is written then.
    """
    path = Path(path)
    target = _target(path, Path(out) if out is not None else None, overwrite)
    Words(lang)  # an unknown language, before anything is read
    document = _document(path, Look(layer, prompts, float_model, weights))
    write_atomic(target, page(document, lang).encode("utf-8"))
    return target


def _document(path: Path, look: Look) -> Document:
    if not path.exists() and path.parent.is_dir():
        recover(path)
    if path.is_dir():
        return _of_folder(path, look)
    if not path.exists():
        raise UntrustedInput(f"{shown(path)} is missing; give a folder that quantailor saved, or a result with --json")
    _only_for_folders(path, look)
    return results.of(read_json(path, max_bytes=_MOST_JSON), path.name)


def _of_folder(path: Path, look: Look) -> Document:
    if not (path / RECEIPT).exists() and not (path / FIT).exists():
        several = _several(path)
        if several:
            _only_for_folders(path, look)
            return several
        if (path / MANIFEST).exists():
            raise UsageError(f"{shown(path)} holds a float model: nothing was quantized, so there is nothing to report")
        raise UntrustedInput(
            f"{shown(path)} has neither {RECEIPT} nor {FIT}, nor folders that have; give what `fit`, `train` or "
            "`quantize` saved"
        )
    manifest = read_manifest(path)
    receipt = _object(path / RECEIPT)
    fit = _object(path / FIT) if (path / FIT).exists() else None
    name = path.resolve().name
    searched = next((path / file for file in (SEARCH, NAS) if (path / file).exists()), None)
    if searched is not None:
        document = results.of(read_json(searched, max_bytes=_MOST_JSON), name)
    elif fit is not None:
        document = folders.fitted(fit, receipt, manifest, name)
    else:
        document = folders.saved(receipt, manifest, name)
    if (path / RECORDING).exists() and (seen := recorded(read(path / RECORDING))) is not None:
        document = _placed(document, [seen], ("errors", "proof", "inventory"))
    return _with_model(document, path, look) if look.weights else document


def _several(path: Path) -> Document | None:
    """The comparison of the folders in `path` that a `fit` wrote."""
    found = []
    for below in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if (below / FIT).exists() and (below / MANIFEST).exists():
            found.append((below.name, _object(below / FIT)))
    return compared(found, path.resolve().name) if found else None


def _only_for_folders(path: Path, look: Look) -> None:
    for value, option in ((look.layer, "layer"), (look.prompts, "prompt"), (look.float_model, "float")):
        if value:
            raise UsageError(f"--{option} looks into one saved model, and {shown(path)} is none; leave it out")


def _with_model(document: Document, path: Path, look: Look) -> Document:
    """The page with what needs the model itself, put before the proof."""
    model = load(path)
    parent = None if look.float_model is None else _parent(look.float_model)
    extra = [_distributions(model, parent, look.layer), _samples(model, parent, look.prompts)]
    wanted = [s for s in extra if s is not None and s.blocks]
    return _placed(document, wanted, ("proof", "inventory"))


def _placed(document: Document, wanted: Sequence[Section], before: Sequence[str]) -> Document:
    """The page with more sections, before the first of these that it has."""
    ids = [s.id for s in document.sections]
    place = min((ids.index(i) for i in before if i in ids), default=len(ids))
    sections = (*document.sections[:place], *wanted, *document.sections[place:])
    return Document(document.verb, document.subject, document.verdict, document.figures, sections, document.version)


def _parent(given: str | Path | Model) -> Model:
    parent = given if isinstance(given, Model) else load(given)
    if parent.state is not None:
        raise UsageError("--float names a quantized model; give the float folder that it was made of")
    return parent


def _distributions(model: Model, parent: Model | None, wanted: str | None) -> Section | None:
    layers = dict(modules_of(model.model, PACKED))
    name = _chosen(model, layers, wanted)
    layer = layers[name]
    weight = None
    if parent is not None:
        twin = dict(parent.model.named_modules()).get(name)
        if twin is None or not fits(layer, twin):
            raise UsageError(f"the float model has no {shown(name)} of the same shape; give this model's own parent")
        weight = weight_ON(twin)
    assert model.state is not None
    method = str((model.state.layers.get(name) or {}).get("method") or model.state.method)
    probe = model.probe or default_probe(model)
    activations = activation_histogram(name, model.model, probe, parent.model if parent else None)
    return section("distributions", weight_histogram(name, layer, method, weight), activations)


def _chosen(model: Model, layers: dict[str, Any], wanted: str | None) -> str:
    """The layer asked for, or the one with the largest output error, or the first."""
    if wanted is not None:
        if wanted in layers:
            return wanted
        near = get_close_matches(wanted, layers, 3, 0.3) or list(layers)[:3]
        raise UsageError(f"layer {shown(wanted)} is not quantized here; names look like {', '.join(map(shown, near))}")
    assert model.state is not None
    errors = {name: (model.state.layers.get(name) or {}).get("output_error") for name in layers}
    known = {name: error for name, error in errors.items() if isinstance(error, int | float)}
    return max(known, key=known.__getitem__) if known else next(iter(layers))


def _samples(model: Model, parent: Model | None, prompts: Sequence[str] | None) -> Section | None:
    if model.task != "lm":
        if prompts:
            raise UsageError("only a language model continues a prompt; this one classifies")
        return None
    asked = list(prompts) if prompts else _own_prompts(model)
    if len(asked) > _MOST_PROMPTS:
        raise UsageError(f"{len(asked)} prompts are too many for a page; give {_MOST_PROMPTS} or fewer")
    rows = []
    for prompt in asked:
        after = _continued(model, prompt)
        rows.append(Sample(prompt, after, None if parent is None else _continued(parent, prompt)))
    note = say("samples.alone") if parent is None else say("samples.note")
    return section("samples", Samples(tuple(rows), note) if rows else None)


def _own_prompts(model: Model) -> list[str]:
    """The first tokens of each row of the probe, which come from the data that the model was measured on."""
    if model.probe is None:
        return []
    rows = model.probe["input_ids"][:, :_PROMPT_TOKENS]
    texts = [str(model.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
    return [text for text in dict.fromkeys(texts) if text.strip() and "\ufffd" not in text]


def _continued(model: Model, prompt: str) -> str:
    """What follows the prompt, less the prompt."""
    positions = getattr(model.model.config, "max_position_embeddings", None)
    text = generate(model, prompt, max_new_tokens=min(_NEW_TOKENS, max(1, (positions or 10_000) // 4)))
    return text.removeprefix(prompt)


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path, max_bytes=_MOST_JSON)
    if not isinstance(value, dict):
        raise UntrustedInput(f"{shown(path)} holds no JSON object, so it is damaged; make the folder again")
    return value


def _target(path: Path, out: Path | None, overwrite: bool) -> Path:
    """Where the page goes. Raises: UsageError if that is inside a folder with a manifest, taken, or a folder."""
    real = Path(os.path.realpath(path))
    target = out if out is not None else real.parent / f"{real.stem if real.is_file() else real.name}.html"
    place = Path(os.path.realpath(target))
    if place == real:
        raise UsageError(f"{shown(target)} is what the report is about; choose another --out")
    for parent in place.parents:
        if (parent / MANIFEST).exists():
            raise UsageError(
                f"{shown(target)} lies inside {shown(parent)}, whose {MANIFEST} lists every file, so `check` would "
                "refuse it; choose a place outside"
            )
    if not os.path.lexists(target):
        return target
    if place.is_dir():
        raise UsageError(f"{shown(target)} is a folder; name a file, such as {shown(target / 'report.html')}")
    if not overwrite:
        raise UsageError(f"{shown(target)} exists; choose another --out or pass --overwrite")
    with open_regular(place) as file:
        if not is_report(file.read(4096).decode("utf-8", "replace")):
            raise UsageError(
                f"{shown(target)} is no report of quantailor's, so it is not replaced; choose another --out, "
                "or remove it yourself"
            )
    return target
