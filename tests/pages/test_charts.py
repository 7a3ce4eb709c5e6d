"""Coordinates against those worked out by hand, on the units that a drawing has."""

import math

import pytest

from quantailor.pages import charts
from quantailor.pages.axes import Axis, axis, labels, linear_ticks, log_ticks
from quantailor.pages.document import Bins, Histogram, Intervals, Lines, Mark, Pareto, Point, Series, Step
from quantailor.pages.heat import heat_levels, heat_scale


def words(text):
    assert isinstance(text, str)
    return text


def shapes(drawing, tag, style):
    return [s for s in drawing.shapes if s.tag == tag and s.attributes["class"].split()[0] == style]


def spots(path):
    """M0 1L2 3 -> [(0, 1), (2, 3)]."""
    return [tuple(map(float, pair.split())) for pair in path.attributes["d"].strip("MZ").split("L")]


# ------------------------------------------------------------------------------------------------ axes


def test_a_linear_axis_by_hand():
    down = Axis(2.0, 4.0, 100.0, 20.0)  # upwards: 2 at pixel 100, 4 at pixel 20
    assert [down.at(v) for v in (2, 3, 3.5, 4)] == [100, 60, 40, 20]
    assert down.at(-9) == 100 and down.at(9) == 20, "what does not fit stays on the edge"


def test_a_logarithmic_axis_by_hand():
    across = Axis(1.0, 1000.0, 0.0, 300.0, log=True)
    assert [round(across.at(v), 9) for v in (1, 10, 100, 1000)] == [0, 100, 200, 300]
    assert across.at(0) == across.at(-5) == 0


@pytest.mark.parametrize("values", [[5.0], [0.0], [-3.0, -3.0], [], [math.inf, math.nan], [1e-12, 2e-12], [-1e9, 1e9]])
@pytest.mark.parametrize("log", [False, True])
def test_any_values_get_an_axis_with_ticks_on_it(values, log):
    made = axis(values, 0, 100, log=log)
    assert made.low < made.high
    assert all(0 <= at <= 100 and text for at, text in made.ticks())
    finite = [v for v in values if math.isfinite(v)]
    assert all(made.low <= v <= made.high for v in finite)
    assert made.log == (log and bool(finite) and min(finite) > 0)


def test_ticks_are_round_and_within():
    assert linear_ticks(0, 100, 4) == [0, 50, 100]
    assert linear_ticks(-0.3, 0.3, 6) == [
        -0.3,
        -0.2,
        -0.1,
        0,
        0.1,
        0.2,
        0.3,
    ]
    assert log_ticks(1, 1e6, 5) == [1, 10, 100, 1e3, 1e4, 1e5, 1e6]
    assert len(log_ticks(1e-9, 1e9, 5)) <= 10
    assert labels([-0.5, 0.0, 0.5]) == ["−0.5", "0", "0.5"]
    assert labels([1_000_000.0, 1_500_000.0]) == ["1000k", "1500k"]


# ------------------------------------------------------------------------------------------------ curves


def test_a_curve_stands_where_its_axes_say():
    chart = Lines("t", "x", "y", (Series("one", ((0, 1.0), (10, 3.0), (20, 2.0))),), levels=(Mark(1.0, "start"),))
    drawing = charts.lines(chart, words)
    (curve,), (level,) = shapes(drawing, "path", "curve"), shapes(drawing, "line", "level")
    first, second, third = spots(curve)
    assert first[0] < second[0] < third[0]
    assert second[0] - first[0] == pytest.approx(third[0] - second[0], abs=0.2), "10 to 10 steps"
    # 3 - 1 is twice 2 - 1, and up is less
    assert first[1] - second[1] == pytest.approx(2 * (first[1] - third[1]), abs=0.3)
    assert level.attributes["y1"] == level.attributes["y2"] == pytest.approx(first[1], abs=0.1)
    bottom, top = drawing.height - 42, 28
    assert all(top <= y <= bottom for _, y in (first, second, third))
    # by hand: y from 1 to 3 with a margin of 6 % of 2 at both ends
    assert first[1] == pytest.approx(bottom + (0.12 / 2.24) * (top - bottom), abs=0.1)
    assert drawing.numbers[0] == ["", "x", "y"] and drawing.numbers[2] == ["one", "10", "3"]


def test_a_band_runs_along_the_highs_and_back_along_the_lows():
    points, band = ((0.0, 2.0), (1.0, 2.0)), ((1.0, 3.0), (1.5, 2.5))
    drawing = charts.lines(Lines("t", "x", "y", (Series("s", points, band),)), words)
    (path,) = shapes(drawing, "path", "band")
    a, b, c, d = spots(path)
    assert a[0] == d[0] and b[0] == c[0], "there and back"
    assert a[1] < b[1] < c[1] < d[1], "highs above lows: 3, 2.5, 1.5, 1"


def test_alarms_cross_the_chart_and_those_without_a_place_do_not():
    alarms = Mark(5.0, "here", "bad"), Mark(None, "no step", "bad")
    chart = Lines("t", "x", "y", (Series("s", ((0, 1), (10, 2))),), alarms=alarms)
    drawing = charts.lines(chart, words)
    (alarm,) = shapes(drawing, "line", "alarm")
    ((left, _), (right, _)) = spots(shapes(drawing, "path", "curve")[0])
    assert alarm.attributes["x1"] == alarm.attributes["x2"] == pytest.approx((left + right) / 2, abs=0.1)
    assert alarm.attributes["class"] == "alarm bad" and alarm.title == "here"


def test_thinning_keeps_ends_and_spikes():
    values = [(float(i), 1.0) for i in range(10_000)]
    values[7_777] = (7_777.0, 99.0)
    values[1_234] = (1_234.0, -99.0)
    kept = charts.thinned(Series("s", tuple(values))).points
    assert len(kept) <= 240 and kept[0] == values[0] and kept[-1] == values[-1]
    assert values[7_777] in kept and values[1_234] in kept and list(kept) == sorted(kept)
    few = Series("s", tuple(values[:200]))
    assert charts.thinned(few) is few


# ------------------------------------------------------------------------------------------------ intervals


def test_intervals_one_below_the_other():
    rows = (Step("a", 1.0, 0.5, 2.0), Step("b", 3.0, state="good"))
    drawing = charts.intervals(Intervals("t", "x", rows, Mark(2.0, "limit")), words)
    (whisker,), (first, second) = shapes(drawing, "line", "whisker"), shapes(drawing, "circle", "dot")
    (limit,) = shapes(drawing, "line", "level")
    assert second.attributes["cy"] - first.attributes["cy"] == 30
    assert whisker.attributes["y1"] == first.attributes["cy"]
    # 0.5 .. 2.0 is 3/5 of the 2.5 from 0.5 to 3.0, and the limit stands at the whisker's end
    width = second.attributes["cx"] - whisker.attributes["x1"]
    assert whisker.attributes["x2"] - whisker.attributes["x1"] == pytest.approx(0.6 * width, abs=0.2)
    assert limit.attributes["x1"] == pytest.approx(whisker.attributes["x2"], abs=0.1)
    assert second.attributes["class"] == "dot good" and "(0.5 – 2)" in first.title


# ------------------------------------------------------------------------------------------------ Pareto


def front_by_definition(points):
    """No other point is at most as far on both axes and less far on one."""
    return {
        p for p in points if not any(q.x <= p.x and q.y <= p.y and (q.x < p.x or q.y < p.y) for q in points)
    }  # fmt: skip


def test_the_front_is_what_nothing_beats():
    import random

    draw = random.Random(0)
    for _ in range(50):
        points = [Point(str(i), draw.randrange(8), draw.randrange(8)) for i in range(draw.randrange(1, 20))]
        found = charts.front(points)
        assert {(p.x, p.y) for p in found} == {(p.x, p.y) for p in front_by_definition(points)}
        assert [p.x for p in found] == sorted(p.x for p in found)


def test_a_pareto_chart_joins_the_front_by_a_staircase():
    points = (Point("small", 1, 9), Point("mid", 2, 4, chosen=True), Point("beaten", 3, 6), Point("big", 4, 1))
    drawing = charts.pareto(Pareto("t", "size", "loss", points), words)
    (path,) = shapes(drawing, "path", "front")
    at = {s.title.split(":")[0]: s.attributes for s in drawing.shapes if s.tag == "circle"}
    assert at["mid"]["class"] == "point chosen" and at["beaten"]["class"] == "point beaten"
    x, y = ([at[n][k] for n in ("small", "mid", "big")] for k in ("cx", "cy"))
    corners = [f"{v:.1f}".removesuffix(".0") for v in (x[0], y[0], x[1], y[1], x[2], y[2])]
    assert path.attributes["d"] == "M{} {}H{}V{}H{}V{}".format(*corners)
    names = {label.text for label in drawing.labels}
    assert {"small", "mid", "beaten", "big"} <= names, "there is room for four names"


def test_names_do_not_cover_each_other():
    points = tuple(Point(f"candidate {i}", 1 + i * 0.001, 1 - i * 0.001) for i in range(8))
    drawing = charts.pareto(Pareto("t", "x", "y", (*points, Point("far", 9, 0))), words)
    boxes = [
        (x - w if label.anchor == "end" else x, label.y - 10, x if label.anchor == "end" else x + w, label.y + 3)
        for label in drawing.labels
        if label.text.startswith("candidate")
        for x, w in [(label.x, charts.text_width(label.text) * 0.95)]
    ]
    assert 0 < len(boxes) < 8
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


# ------------------------------------------------------------------------------------------------ histograms


def test_bars_are_as_high_as_their_share():
    bars = Bins("q", (-1.5, -0.5, 0.5, 1.5), (0.25, 0.5, 0.25))
    drawing = charts.histogram(Histogram("t", "x", bars), words)
    left, middle, right = shapes(drawing, "rect", "bar")
    assert middle.attributes["height"] == pytest.approx(2 * left.attributes["height"], abs=0.2)
    assert left.attributes["y"] + left.attributes["height"] == pytest.approx(drawing.height - 42, abs=0.2)
    assert left.attributes["width"] == pytest.approx(right.attributes["width"], abs=0.2)
    assert "50.000%" in middle.title


def test_a_logarithmic_share_axis_gives_a_decade_the_same_height():
    bars = Bins("q", (0, 1, 2, 3), (0.9, 0.09, 0.009))
    drawing = charts.histogram(Histogram("t", "x", bars, log_y=True), words)
    heights = [s.attributes["height"] for s in shapes(drawing, "rect", "bar")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.3) and heights[2] > 1


def test_bins_must_have_one_edge_more():
    with pytest.raises(ValueError, match="3 bins have 4 edges"):
        Bins("q", (0, 1, 2), (0.1, 0.2, 0.3))


# ------------------------------------------------------------------------------------------------ heat


def test_heat_over_several_decades_is_logarithmic_and_little_differences_stay_little():
    assert heat_levels([[0.001, 0.01], [0.1, None]], steps=3) == [[0, 1], [2, None]]
    assert heat_levels([[0.90, 0.95, 1.0]], steps=5) == [[4, 4, 4]], "half of 1.0 to 1.0 is the least span"
    assert heat_scale([[0.0, 0.0]]) is None and heat_levels([[0.0, None]]) == [[0, None]]
    assert heat_levels([[-4.0, -2.0, 0.0]], steps=2) == [[0, 1, 1]] and heat_levels([[None]]) == [[None]]
    assert heat_levels([[-1.0, -1.0]], steps=3) == [[0, 0]]


def test_widths_and_clipping_of_names():
    assert charts.text_width("ab") == pytest.approx(13.4) and charts.text_width("量化") == 24
    assert charts.clipped("short", 20) == "short" and len(charts.clipped("model.layers.10.mlp.down_proj", 20)) == 20
