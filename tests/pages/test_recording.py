"""A recording on a page: every measure, the alarms where they happened, in both languages."""

import pytest

from quantailor.pages.alarms import reported
from quantailor.pages.document import Document, Heat, Histogram, Lines, Table, Verdict
from quantailor.pages.html import MAX_BYTES, page
from quantailor.pages.reading import Found
from quantailor.pages.recording import recorded
from quantailor.pages.words import Words
from quantailor.qat.recording import Head, Measure, Recording
from tests.pages.making import HOSTILE, Page
from tests.pages.recordings import LAYERS, recording


def of(kind, found=None):
    return [block for block in recorded(found or recording()).blocks if isinstance(block, kind)]


def named(key, found=None):
    return next(block for block in of(Lines, found) if block.title.key == key)


def shown(found, language="en"):
    document = Document("train", "x", Verdict("good", "w", "s"), sections=(recorded(found),))
    return page(document, language)


def test_the_training_curve_has_every_alarm():
    chart = named("chart.recorded_loss")
    assert [x for x, _ in chart.series[0].points] == [1, *range(10, 101, 10)]
    assert [(m.value, m.state) for m in chart.alarms] == [(20, "bad"), (21, "bad")] and chart.calm == ""
    assert Words("en")(chart.alarms[0].name) == "step 20: a layer’s error has risen"
    calm = named("chart.recorded_loss", recording(alarms=0))
    assert calm.alarms == () and Words("en")(calm.calm) == "No alarm was raised."


def test_a_measure_is_drawn_as_median_band_and_the_layers_that_moved_most():
    chart = named("recorded.error")
    everywhere, *layers = chart.series
    first = [0.1 + 0.01 * i for i in range(14)]
    first[13] += 0.003
    assert everywhere.points[0][1] == pytest.approx((first[6] + first[7]) / 2)
    assert everywhere.band[0] == pytest.approx((first[0], first[13]))
    assert layers[0].name == LAYERS[13] and len(layers) == 3 and layers[0].points[-1] == (100, pytest.approx(0.53))
    assert [m.value for m in chart.alarms] == [20], "the alarm about errors, not the one about the norm"
    assert named("recorded.range").log_y and not chart.log_y
    with pytest.raises(StopIteration):
        named("recorded.clip")  # 0 everywhere, so there is nothing to see


def test_a_measure_that_one_layer_has_and_the_gains():
    assert named("recorded.input_clip").series[0].points[0] == (1, 0.01)
    gains = named("recorded.gain")
    assert gains.series[0].name == "model.layers.0.input_layernorm" and [m.value for m in gains.alarms] == [21]


def test_every_layer_has_a_row_of_errors():
    (heat,) = of(Heat)
    assert heat.rows == LAYERS and heat.columns[0] == "1" and heat.columns[-1] == "100" and len(heat.columns) == 10
    assert heat.values[13][-1] == pytest.approx(0.53) and heat.values[0] == tuple([0.1] * 10)


def test_the_alarms_are_listed_with_what_was_done():
    (table,) = of(Table)
    assert [row[0].text for row in table.rows] == ["20", "21"]
    assert table.rows[0][2].text == LAYERS[13] and Words("zh")(table.rows[0][5].text).startswith("回到最佳点")
    assert of(Table, recording(alarms=0)) == []


def test_levels_before_and_after():
    (chart,) = of(Histogram)
    assert chart.bars.share == pytest.approx((0.2, 0.3, 0.4, 0.1))
    assert chart.outline.share == pytest.approx((0.1, 0.4, 0.4, 0.1))
    assert chart.bars.edges == (0.5, 1.5, 2.5, 3.5, 4.5)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_is_whole_in_both_languages(language):
    text = Page(shown(recording(alarms=5), language)).text
    for part in ("patience=3", LAYERS[13], "model.layers.0.input_layernorm"):
        assert part in text
    for en, zh in (("the learning rate is too high", "学习率过高"), ("Rounding flips in one step", "单步的取整翻转")):
        assert ((en in text), (zh in text)) == (language == "en", language == "zh")


def test_a_short_run_has_no_section():
    head = Head(3, 10, ("a",), ())
    assert recorded(Recording(head, [Measure(1, 1.0, 1.0, 0.0, 1, {}, {})])) is None


def test_a_run_that_measured_nothing_of_layers_still_shows_its_loss():
    lines = [Measure(step, 1.0 / step, None, 0.0, 1, {}, {}) for step in (1, 2, 3)]
    blocks = recorded(Recording(Head(3, 1, (), ()), lines)).blocks
    assert [block.title.key for block in blocks] == ["chart.recorded_loss"]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:24]))
def test_hostile_names_stay_text(text):
    found = recording(alarms=30, why=text, name=text[:5000])
    written = shown(found)
    parsed = Page(written)
    assert len(written.encode()) < MAX_BYTES
    assert len(parsed.named("script")) == 1 and not parsed.named("img")


def test_alarms_of_receipts_are_said_in_our_words_where_they_are_ours():
    assert Words("zh")(reported(Found({"alarm": "rate", "what": "x"}))) == "学习率过高"
    assert reported(Found({"alarm": "fire", "what": "smoke"})) == "smoke"
