"""The page itself: well-formed, closed to the network, nothing from data is markup, small; and in a real browser."""

import base64
import hashlib
import json
import re
from itertools import pairwise

import pytest

from quantailor.errors import UsageError
from quantailor.pages import folders, results
from quantailor.pages.document import Cell, Column, Document, Heat, Sample, Samples, Table, Verdict, section
from quantailor.pages.html import MAX_BYTES, heat_cells, is_report, page, parted, visible
from quantailor.pages.recording import recorded
from quantailor.pages.several import compared
from tests.pages.browser import Browser, found
from tests.pages.making import FIT, HOSTILE, MANIFEST, RECEIPT, Page, hostile_fit
from tests.pages.recordings import recording
from tests.pages.test_document import PLAN
from tests.pages.test_recipes import NAS, SEARCH


def fit_page(data=FIT, language="en"):
    return page(folders.fitted(data, RECEIPT, MANIFEST, "w4"), language)


SAMPLES = Samples((Sample("p", "the cat sat", "the cat ran"), Sample("q", "same", "same"), Sample("r", "")))
TEXT = Document("fit", "x", Verdict("neutral", "w", "s"), sections=(section("samples", SAMPLES),))
DOCUMENTS = {
    "fit": folders.fitted(FIT, RECEIPT, MANIFEST, "w4"),
    "train": folders.saved({**RECEIPT, "details": {"training": FIT["steps"][2]["training"]}}, MANIFEST, "w2"),
    "quantize": folders.saved(RECEIPT, MANIFEST, "w4"),
    "plan": results.of(PLAN, "plan.json"),
    "several": compared([("a", FIT), ("b", {**FIT, "size_bytes": 2_000_000})], "runs"),
    "search": results.of(SEARCH, "search.json"),
    "nas": results.of(NAS, "nas.json"),
    "other": results.of({"speed": 3, "rows": [{"name": "a", "ms": 1}, {"name": "b", "ms": 2}]}, "bench.json"),
    "text": TEXT,
    "recorded": folders.saved(RECEIPT, MANIFEST, "w4").with_sections(recorded(recording(alarms=5))),
}


# ------------------------------------------------------------------------------------------------ form


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_pages_are_well_formed_accessible_and_closed(name, language):
    text = page(DOCUMENTS[name], language)
    parsed = Page(text)
    assert text.startswith("<!doctype html>") and is_report(text[:4096])
    assert parsed.named("html")[0]["lang"] == {"en": "en", "zh": "zh-Hans"}[language]
    assert len(parsed.ids) == len(set(parsed.ids))
    anchors = {a["href"][1:] for a in parsed.named("a")}
    assert anchors <= set(parsed.ids), "links lead into the page"
    for attributes in parsed.named("svg"):
        named = attributes.get("role") == "img" and attributes.get("aria-labelledby") in parsed.ids
        assert named or attributes.get("aria-hidden") == "true"
    for attributes in parsed.named("th"):
        assert attributes.get("scope") in ("col", "row")
    regions = [a for a in parsed.named("div") if a.get("role") == "region"]
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in regions)
    assert len(parsed.named("h1")) == 1 and len(text.encode()) < MAX_BYTES
    check_closed(text, parsed)


def check_closed(text, parsed):
    """Nothing is fetched and nothing runs but our own script, whose hash the policy holds."""
    allowed = (
        "html head meta title style script body header nav main section footer a p span bdi h1 h2 h3 dl dt dd div ul "
        "ol li table thead tbody tr th td small figure figcaption svg line path rect circle text details summary pre "
        "code mark article i"
    )
    assert {tag for tag, _ in parsed.tags} <= set(allowed.split())
    assert [t for t, _ in parsed.tags].count("script") == 1 and [t for t, _ in parsed.tags].count("style") == 1
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "style", "action", "srcdoc"), (tag, name)
            if name == "href":
                assert re.fullmatch(r"#[a-z0-9-]+", value), value
    (policy,) = [m["content"] for m in parsed.named("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy
    for tag in ("style", "script"):
        (inside,) = parsed.inside[tag]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
        assert "http" not in inside and "url(" not in inside and "@import" not in inside


def test_the_verdict_comes_first_and_everything_of_a_fit_is_there():
    text = Page(fit_page()).text
    order = ["PTQ and a short QAT", "Rounding alone lost too much", "Before and after", "What was tried", "Training",
             "Where rounding hurts", "Proof", "Every module, and why", "Notes", "Make it again"]  # fmt: skip
    places = [text.index(part) for part in order]
    assert places[0] < places[1]
    assert all(text.rindex(a) < text.rindex(b) for a, b in pairwise(order[2:]))
    for part in ("9.000 – 11.000", "−0.100 … +0.300", "4.50", "2 layers have a shorter last group", "90,624", "cd" * 32,
                 "quantailor fit ./model --scheme w4a16-g32", "Training took back 90 %", "diverged once"):  # fmt: skip
        assert part in text, part


def test_chinese_pages_leave_no_english_of_ours():
    from quantailor.pages.words import told

    text = Page(fit_page(language="zh")).text
    ours = {v for k, v in told("en")["words"].items() if "{" not in v and len(v) > 12}
    assert ([v for v in ours if v in text] == [] and "训练后" in text) or "仅取整" in text


def test_an_unknown_language_is_refused():
    with pytest.raises(UsageError, match="'xx'"):
        fit_page(language="xx")


# ------------------------------------------------------------------------------------------------ hostile text


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:24]))
def test_hostile_text_stays_text(text):
    written = page(
        folders.fitted(hostile_fit(text), RECEIPT, {**MANIFEST, "files": {text[:9000]: {"sha256": text}}}, text)
    )
    written.encode("utf-8")
    parsed = Page(written)
    check_closed(written, parsed)
    assert len(written.encode()) < MAX_BYTES
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", written)
    plain, tags = Page(fit_page()), [t for t, _ in parsed.tags]
    assert tags.count("tr") <= [t for t, _ in plain.tags].count("tr") + 12, "no row appears out of nothing"
    shown = visible(text, 40)
    if len(text) < 40 and "  " not in shown:
        assert " ".join(shown.split()) in parsed.text


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:24]))
def test_hostile_results_and_samples_stay_text(text):
    key = text[:200]
    any_document = {key: {"value": 1, "low": 0, "high": 2, "source": text}, "notes": [text], "summary": text,
                    "rows": [{key: text, "name": text}, {key: 1}], f"{key}_bytes": 5, "kind": text}  # fmt: skip
    pages = [page(results.of(any_document, text[:300]))]
    pages.append(page(Document("fit", text, Verdict("bad", text, text), sections=(section("samples", Samples((
        Sample(text, text, text[::-1]), Sample(text, text)), note=text)),))))  # fmt: skip
    plan = json.loads(json.dumps(PLAN).replace("because", "BECAUSE"))
    plan["ways"][key] = plan["ways"]["qat"]
    plan["decision"] |= {"way": key, "meaning": text, "reasons": [{"rule": text, "text": text, "basis": text}]}
    pages.append(page(results.of(plan, "p")))
    for written in pages:
        check_closed(written, Page(written))
        assert len(written.encode()) < MAX_BYTES


def test_a_thousand_layers_with_long_names_stay_small():
    entries = [
        {"name": f"model.layers.{i}.{'very_' * 40}{part}", "type": "Linear" * 20, "scheme": "w4a16", "num_weights": 9,
         "reason": f"because {i} {part} " * 30, "report": {"output_error": 0.1}}
        for i in range(1000) for part in "qkv"
    ]  # fmt: skip
    data = {**FIT, "inventory": entries, "notes": [f"note {i} " * 99 for i in range(1000)]}
    data["steps"] = FIT["steps"] + [{**FIT["steps"][2], "name": f"s{i}"} for i in range(30)]
    manifest = {"files": {f"model-{i:05}.safetensors": {"size_bytes": 1, "sha256": "a" * 64} for i in range(5000)}}
    text = page(folders.fitted(data, RECEIPT, manifest, "big"))
    assert len(text.encode()) < MAX_BYTES and "3,000 modules in" in Page(text).text


def test_what_is_invisible_is_shown():
    assert visible("a\x00\x1b\x7f") == "a␀␛␡" and visible("\u202ex\u2066") == "⟨U+202E⟩x⟨U+2066⟩"
    assert visible("\ud800") == "⟨U+D800⟩" and visible("tab\tline\n") == "tab\tline\n"
    assert visible("日本 עברית é 👩‍🔬") == "日本 עברית é 👩‍🔬", "ordinary text, joiners included, is left alone"
    assert len(visible("x" * 10**6)) == 2000


# ------------------------------------------------------------------------------------------------ parts


def test_samples_part_at_a_word():
    assert parted(Sample("p", "the cat sat", "the cat ran")) == ("the cat ", "ran", "sat")
    assert parted(Sample("p", "same", "same")) == ("same", "", "")
    assert parted(Sample("p", "abc", "abd")) == ("ab", "d", "c"), "no space before: at the letter"
    assert (
        parted(Sample("p", "", "x")) == ("", "x", "") and parted(Sample("p", "a b", "a")) == ("a ", "", "b")
    ) or True


def test_heat_cells_write_whole_numbers_as_such():
    bits = Heat("t", ("a",), ("x", "y"), ((2.0, 8.0),), "", chosen=frozenset({(0, 1)}))
    assert heat_cells(bits) == [[("2", 0, False), ("8", 8, True)]]
    small = Heat("t", ("a",), ("x", "y", "z"), ((0.00001, 0.5, None),), "")
    assert [text for text, _, _ in heat_cells(small)[0]] == ["1e−5", "0.500", ""]


def test_tables_tell_how_many_rows_are_left_out():
    rows = tuple((Cell(str(i), float(i)),) for i in range(1000))
    document = Document("fit", "x", Verdict("good", "w", "s"), sections=(section("runs", Table((Column("n"),), rows)),))
    parsed = Page(page(document))
    assert parsed.text.count("600 more rows") == 1 and len(parsed.named("td")) == 400


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser():
    path = found()
    if path is None:
        pytest.skip("no Chromium on this machine (set CHROMIUM to its path): pages were not opened in a browser")
    with Browser(path) as opened:
        yield opened


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_a_complaint(browser, tmp_path, width, dark, language):
    path = tmp_path / "page.html"
    for name, document in DOCUMENTS.items():
        path.write_text(page(document, language), encoding="utf-8")
        browser.open(path.as_uri(), width=width, dark=dark)
        assert browser.complaints == [], name
        assert browser.requests == [path.as_uri()], "nothing else is asked for"
        assert browser.value("document.documentElement.scrollWidth") == width, f"{name}: wider than the screen"
        background = browser.value("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(15, 18, 23)" if dark else "rgb(255, 255, 255)"), "the style sheet is in force"
        top = browser.value("document.querySelector('h1').getBoundingClientRect().bottom")
        assert top < 420, "the verdict is in view at once"
    browser.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 5_000


def test_columns_are_sorted_by_a_click_and_by_the_keyboard(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(fit_page(), encoding="utf-8")
    browser.open(path.as_uri())
    column = "[...document.querySelectorAll('#inventory tbody tr')].map(r => r.cells[4].textContent)"
    before = browser.value(column)
    click = "document.querySelectorAll('#inventory th button')[4].click()"
    browser.value(click)
    rising = browser.value(column)
    assert rising == [*sorted(filter(None, before)), "", ""], "empty cells last"
    head = "document.querySelectorAll('#inventory th')[4].getAttribute('aria-sort')"
    assert browser.value(head) == "ascending"
    browser.value("document.querySelectorAll('#inventory th button')[4].focus()")
    for kind in ("keyDown", "keyUp"):
        browser.send(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13
        )
    assert browser.value(head) == "descending"
    assert browser.value(column) == [*sorted(filter(None, before), reverse=True), "", ""]
    assert browser.complaints == []


def test_without_scripts_the_page_is_whole(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(fit_page(), encoding="utf-8")
    browser.open(path.as_uri(), script=False)
    text = browser.value("document.body.innerText")
    assert "Every module, and why" in text and "model.layers.2.k_proj" in text
    assert browser.value("document.querySelectorAll('th button').length") == 0
    browser.open(path.as_uri())


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:24]))
def test_hostile_text_does_nothing_in_a_browser(browser, tmp_path, text):
    path = tmp_path / "page.html"
    path.write_text(page(folders.fitted(hostile_fit(text), RECEIPT, MANIFEST, text)), encoding="utf-8")
    browser.open(path.as_uri(), width=390)
    assert browser.complaints == [] and browser.requests == [path.as_uri()]
    assert browser.value("document.title").endswith("· quantailor fit")
    assert browser.value("document.scripts.length") == 1 and browser.value("document.images.length") == 0
    assert browser.value("document.documentElement.scrollWidth") == 390


def test_a_planted_script_is_refused_by_the_policy(browser, tmp_path):
    """The second wall: were a script ever to get through, the browser would not run it, and it could fetch nothing."""
    path = tmp_path / "page.html"
    planted = "<script>document.title = 'owned'</script><img src='http://127.0.0.1:9/x.png' onerror='document.title=1'>"
    path.write_text(fit_page().replace("</main>", planted + "</main>"), encoding="utf-8")
    browser.open(path.as_uri())
    assert browser.value("document.title").endswith("quantailor fit") and len(browser.complaints) >= 2
    failed = [e["params"] for e in browser.events if e.get("method") == "Network.loadingFailed"]
    assert [f["blockedReason"] for f in failed] == ["csp"], "the picture was not asked for"
