"""`report`: what it reads, what it draws of a real (tiny) model, and where it will not write."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from quantailor import api
from quantailor.errors import UntrustedInput, UsageError
from quantailor.numerics import grids
from quantailor.pages.html import page
from quantailor.pages.numbers import plain
from quantailor.store.manifest import verify
from quantailor.verbs.distributions import activation_histogram, weight_histogram, weight_ON
from quantailor.verbs.reporting import Look, _document, report
from tests.formats.making import bytes_of, edited, quantized, saved, texts, trained
from tests.pages.making import FIT, HOSTILE, Page

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def w4(tmp_path_factory, tiny_lm) -> Path:
    return saved(quantized(api.load(tiny_lm), "w4a16-g32"), tmp_path_factory.mktemp("saved") / "w4")


@pytest.fixture(scope="module")
def static(tmp_path_factory, tiny_lm) -> Path:
    return saved(quantized(api.load(tiny_lm), "w8a8-static"), tmp_path_factory.mktemp("saved") / "w8s")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, tiny_lm) -> Path:
    """A `fit` that had to train: the tiny model, taught some words, at 2 bits."""
    out = tmp_path_factory.mktemp("fitted") / "runs" / "w2"
    settings = api.Settings(batch_size=4, evaluations=2)
    goal = api.Goal(
        tolerance=0.0, minutes=5, calibration=8, short_steps=4, long_steps=6, methods=("rtn",), settings=settings
    )
    model = trained(tiny_lm, tmp_path_factory.mktemp("trained") / "model")
    api.fit(model, texts(30, seed=1), "w2a16-g32", out, eval_data=texts(25, seed=2), goal=goal, context=48)
    return out


# ------------------------------------------------------------------------------------------------ whole pages


def test_the_page_of_a_fit_lies_beside_the_folder_which_stays_as_it_was(fitted):
    before = bytes_of(fitted)
    written = report(fitted)
    assert written == fitted.parent / "w2.html" and bytes_of(fitted) == before
    assert api.check(fitted).equal, "check does not mind the page"
    parsed = Page(written.read_text(encoding="utf-8"))
    data = json.loads((fitted / "report.json").read_text())
    final = data["final"]["value"]
    assert plain(final) in parsed.text
    sections = "Before and after,What was tried,Training,Inside one layer,The text before and after,Proof"
    for part in (*sections.split(","), "Every module, and why", "Make it again", verify(fitted)["checksum"]):
        assert part in parsed.text, part
    written.unlink()


def test_a_folder_of_fits_becomes_a_comparison(fitted):
    written = report(fitted.parent, fitted.parent.parent / "all.html", lang="zh")
    assert "各次运行" in Page(written.read_text(encoding="utf-8")).text


def test_a_plain_quantized_folder_and_a_trained_one(w4, tmp_path, tiny_lm):
    plain = Page(report(w4, tmp_path / "a.html", weights=False).read_text(encoding="utf-8")).text
    assert "Rounded to w4a16-g32 by gptq" in plain and "Inside one layer" not in plain
    settings = api.Settings(steps=4, batch_size=4, evaluations=2)
    model = api.train(w4, texts(20, seed=3), teacher=tiny_lm, settings=settings, context=32)
    trained = saved(model, tmp_path / "trained")
    assert "Held-out score" in Page(report(trained).read_text(encoding="utf-8")).text


def test_a_result_file(tmp_path):
    (tmp_path / "speed.json").write_text(json.dumps({"tokens_per_second": 12.5, "notes": ["on one core"]}))
    written = report(tmp_path / "speed.json")
    assert written == tmp_path / "speed.html" and "12.50" in Page(written.read_text()).text


# ------------------------------------------------------------------------------------------------ the model itself


def test_levels_and_float_weights_against_their_definition(w4, tiny_lm):
    model, parent = api.load(w4), api.load(tiny_lm)
    layer = model.model.get_submodule(Q_PROJ)
    weight = weight_ON(parent.model.get_submodule(Q_PROJ))
    chart = weight_histogram(Q_PROJ, layer, "gptq", weight)
    q = layer.packed.integers().to(torch.int64)
    lowest, highest, _ = grids.limits(layer.packed.spec.grid)
    for index, level in enumerate(range(lowest, highest + 1)):
        assert chart.bars.share[index] == pytest.approx(float((q == level).float().mean()))
        assert chart.bars.edges[index] == level - 0.5
    # the outline, element by element: W over the scale of its own group
    scale = layer.packed.scales()
    steps = [float(weight[o, n] / scale[o, n // 32]) for o in range(weight.shape[0]) for n in range(weight.shape[1])]
    inside = [min(max(s, lowest - 0.5), highest + 0.5) for s in steps]
    middle = sum(-0.25 <= s < 0 for s in inside) / len(inside)
    index = next(i for i, edge in enumerate(chart.outline.edges) if edge == pytest.approx(-0.25))
    assert chart.outline.share[index] == pytest.approx(4 * middle, abs=0.01), "four bins a level, drawn to its height"
    assert sum(chart.outline.share) == pytest.approx(4) and sum(chart.bars.share) == pytest.approx(1)


@pytest.mark.parametrize(
    "scheme", ["w8a8", "w4a16-g32-asym", "w2a16-g32-balanced", "w1.58a8", "w1a1", "nf4", "nf4-dq", "w3a16"]
)
def test_every_grid_can_be_drawn(tmp_path, tiny_lm, scheme):
    model = quantized(api.load(tiny_lm), scheme, method="rtn")
    folder = saved(model, tmp_path / "m")
    text = Page(report(folder, float_model=tiny_lm).read_text(encoding="utf-8")).text
    assert f"Weights of {Q_PROJ[:6]}" in text and "What enters" in text


def test_activations_are_those_that_enter_the_layer(static, tiny_lm):
    model, parent = api.load(static), api.load(tiny_lm)
    layer, seen = model.model.get_submodule(Q_PROJ), []
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        model.model(**model.probe)
    handle.remove()
    chart = activation_histogram(Q_PROJ, model.model, model.probe, parent.model)
    edges = chart.bars.edges
    expected = [float(((seen[0] >= a) & (seen[0] < b)).float().mean()) for a, b in pairwise(edges)]
    assert chart.bars.share == pytest.approx(expected, abs=2e-3)
    layer.input_scale.mul_(0.5)  # now the grid ends within what is drawn
    clipped = activation_histogram(Q_PROJ, model.model, model.probe)
    scale = float(layer.input_scale)
    assert sorted(mark.value for mark in clipped.marks) == pytest.approx([-128 * scale, 127 * scale])
    assert clipped.outline is None and chart.outline is not None
    assert not layer._forward_pre_hooks and not model.model.training


def test_the_layer_that_rounding_hurt_most_is_chosen_unless_one_is_named(w4):
    model = api.load(w4)
    errors = {name: r["output_error"] for name, r in model.state.layers.items()}
    worst = max(errors, key=errors.get)

    def sections(look):
        return next(s for s in _document(w4, look).sections if s.id == "distributions")

    assert sections(Look()).blocks[0].title.values["layer"] == worst
    assert sections(Look(layer=Q_PROJ)).blocks[0].title.values["layer"] == Q_PROJ
    with pytest.raises(UsageError, match=r"'?q_projj'? is not quantized here; names look like .*q_proj"):
        report(w4, layer="q_projj")


def test_samples_before_and_after(w4, tiny_lm, tmp_path):
    document = _document(w4, Look(prompts=["the cat"], float_model=tiny_lm))
    (sample,) = next(s for s in document.sections if s.id == "samples").blocks[0].rows
    assert sample.prompt == "the cat"
    assert "the cat" + sample.before == api.generate(tiny_lm, "the cat", max_new_tokens=48)
    assert "the cat" + sample.after == api.generate(w4, "the cat", max_new_tokens=48)
    own = next(s for s in _document(w4, Look()).sections if s.id == "samples").blocks[0].rows
    assert own and all(row.before is None for row in own)


def test_a_classifier_has_no_samples(tiny_bert, tmp_path):
    folder = saved(quantized(api.load(tiny_bert), "w8a8"), tmp_path / "bert")
    document = _document(folder, Look(float_model=tiny_bert))
    assert {s.id for s in document.sections} >= {"distributions", "inventory"}
    assert "samples" not in {s.id for s in document.sections}
    with pytest.raises(UsageError, match="classifies"):
        report(folder, prompts=["x"])


def test_a_wrong_parent_is_named(w4, static, tiny_lm, tmp_path):
    with pytest.raises(UsageError, match="--float names a quantized model"):
        report(w4, float_model=static)
    other = api.load(tiny_lm)
    other.model.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 32)
    with pytest.raises(UsageError, match="same shape"):
        report(w4, layer=Q_PROJ, float_model=other)


# ------------------------------------------------------------------------------------------------ where it writes


def test_places_that_are_refused(w4, tmp_path):
    copy = Path(shutil.copytree(w4, tmp_path / "w4"))
    before = bytes_of(tmp_path)
    (tmp_path / "link").symlink_to(copy)
    for out, why in [
        (copy / "report.html", "lies inside"),
        (copy / "deep" / "report.html", "lies inside"),
        (tmp_path / "link" / "report.html", "lies inside"),
        (copy, "is what the report is about"),
        (tmp_path, "is a folder"),
        (tmp_path / "missing" / "report.html", "cannot write"),
    ]:
        with pytest.raises(UsageError, match=why):
            report(copy, out, weights=False)
    (tmp_path / "link").unlink()
    assert bytes_of(tmp_path) == before, "nothing was written"


def test_only_a_report_is_replaced_and_only_when_asked(w4, tmp_path):
    out = report(w4, tmp_path / "r.html", weights=False)
    with pytest.raises(UsageError, match="exists; choose another --out or pass --overwrite"):
        report(w4, out, weights=False)
    assert report(w4, out, "zh", weights=False, overwrite=True) == out and "每个模块" in out.read_text(encoding="utf-8")
    thesis = tmp_path / "thesis.html"
    thesis.write_text("<h1>years of work</h1>")
    with pytest.raises(UsageError, match="no report of quantailor's"):
        report(w4, thesis, weights=False, overwrite=True)
    assert thesis.read_text() == "<h1>years of work</h1>"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == [], "no temporary is left"


def test_what_cannot_be_reported(w4, tiny_lm, tmp_path):
    with pytest.raises(UntrustedInput, match="is missing"):
        report(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UntrustedInput, match=r"has neither quantailor\.json nor report\.json"):
        report(tmp_path / "empty")
    plain = api.save(api.load(tiny_lm), tmp_path / "float")
    with pytest.raises(UsageError, match="holds a float model"):
        report(plain)
    with pytest.raises(UsageError, match="'fr'"):
        report(w4, tmp_path / "x.html", "fr")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UntrustedInput, match="is not JSON"):
        report(tmp_path / "broken.json")
    (tmp_path / "fine.json").write_text('{"a": 1}')
    for option in ({"layer": "x"}, {"prompts": ["x"]}, {"float_model": tiny_lm}):
        with pytest.raises(UsageError, match="looks into one saved model"):
            report(tmp_path / "fine.json", **option)
    assert not (tmp_path / "x.html").exists()


def test_a_damaged_folder_is_no_success(w4, tmp_path):
    flipped = edited(w4, tmp_path / "flipped", receipt=lambda r: r.__setitem__("notes", ["changed"]), manifest=False)
    with pytest.raises(UntrustedInput, match=r"quantailor\.json"):
        report(flipped)
    stranger = edited(w4, tmp_path / "stranger", receipt=lambda r: r.pop("inventory"))
    with pytest.raises(UntrustedInput, match="inventory"):
        report(stranger, weights=False)
    assert not (tmp_path / "flipped.html").exists() and not (tmp_path / "stranger.html").exists()


@pytest.mark.parametrize("text", [t for t in HOSTILE if "\ud800" not in t], ids=lambda t: repr(t[:24]))
def test_hostile_receipts_on_disk(w4, tmp_path, text):
    """Notes and reasons of a folder whose hashes agree, and a fit's report.json, as a stranger might send them."""

    def spoil(receipt):
        receipt["notes"] = [text]
        receipt["method"] = text[:1000]
        for entry in receipt["inventory"]:
            entry["reason"] = text[:5000]

    folder = edited(w4, tmp_path / "spoilt", receipt=spoil)
    Page(report(folder, weights=False).read_text(encoding="utf-8"))
    (tmp_path / "fit.json").write_text(json.dumps({**FIT, "notes": [text], "scheme": text}))
    assert len(report(tmp_path / "fit.json").read_bytes()) < 500_000


def test_the_same_folder_gives_the_same_bytes(w4, tmp_path, tiny_lm):
    one = report(w4, tmp_path / "one.html", float_model=tiny_lm).read_bytes()
    assert report(w4, tmp_path / "two.html", float_model=tiny_lm).read_bytes() == one
    assert page(_document(w4, Look(float_model=tiny_lm))).encode() == one
