"""The language of points: texts, JSON, and what is refused."""

import json

import pytest

from quantailor.errors import UsageError
from quantailor.points import NAMES, PointEntry, Points, PointSpec
from quantailor.spec import Int, PerGroup, PerTensor, PerToken, QuantSpec


@pytest.mark.parametrize(
    ("text", "quant", "learned"),
    [
        ("a8", QuantSpec(Int(8), PerToken(), dynamic=True, range="minmax"), False),
        ("a4-ag32", QuantSpec(Int(4), PerGroup(32), dynamic=True, range="minmax"), False),
        ("a8-static", QuantSpec(Int(8), PerTensor(), range="mse"), False),
        ("a6-learned", QuantSpec(Int(6), PerTensor(), range="mse"), True),
        (
            "a8-learned-percentile99.9",
            QuantSpec(Int(8), PerTensor(), range="percentile", percentile=99.9),
            True,
        ),
        ("a8-static-minmax", QuantSpec(Int(8), PerTensor(), range="minmax"), False),
    ],
)
def test_a_text_is_a_spec_and_back(text, quant, learned):
    spec = PointSpec.parse(text)
    assert (spec.quant, spec.learned) == (quant, learned)
    assert str(spec) == text


@pytest.mark.parametrize("text", ["a16", "a1", "8", "w8a8", "a8-", "a8-asym", "a8-static-median", "a8-outliers", ""])
def test_a_text_of_another_form_is_refused_with_the_form(text):
    with pytest.raises(UsageError, match="a8"):
        PointSpec.parse(text)


def test_points_by_name():
    points = Points.of({"silu": "a8", "norm": "a8-static"})
    assert points.asked == {"norm": PointSpec.parse("a8-static"), "gelu": PointSpec.parse("a8")}
    assert str(points) == "norm=a8-static gelu=a8"
    assert points
    assert not Points.of(None)
    assert Points.of(points) is points


@pytest.mark.parametrize(
    ("points", "says"),
    [
        ({"score": "a8"}, "unknown point 'score'; did you mean scores"),
        ({"gelu": "a8", "silu": "a8"}, "named twice"),
        ({"scores": "a8-ag16"}, "groups say nothing"),
    ],
)
def test_points_that_cannot_be(points, says):
    with pytest.raises(UsageError, match=says):
        Points.of(points)


def test_a_spec_that_cannot_be():
    with pytest.raises(UsageError, match="learned"):
        PointSpec(QuantSpec(Int(8), PerToken(), dynamic=True), learned=True)
    with pytest.raises(UsageError, match="symmetric"):
        PointSpec(QuantSpec(Int(8, symmetric=False), PerTensor()))


def test_json_round_trip():
    points = Points.of(dict.fromkeys(NAMES, "a8-learned-minmax"))
    assert Points.from_json(json.loads(json.dumps(points.to_json()))) == points
    entry = PointEntry("a.b.output_point", "norm", "LayerNorm", 3, PointSpec.parse("a8"), "asked for")
    assert PointEntry.from_json(json.loads(json.dumps(entry.to_json()))) == entry
    kept = PointEntry("a.b.probabilities", "probabilities", "softmax", None, None, "float")
    assert PointEntry.from_json(json.loads(json.dumps(kept.to_json()))) == kept


def test_unknown_keys_are_refused():
    good = Points.of({"norm": "a8-static"}).to_json()
    for bad in (
        {**good, "nrom": good["norm"]},
        {"norm": {**good["norm"], "frozen": True}},
        {"norm": {"quant": good["norm"]["quant"]}},
        {"norm": {**good["norm"], "learned": 1}},
        {"norm": {**good["norm"], "quant": {**good["norm"]["quant"], "bits": 8}}},
        {"norm": {**good["norm"], "quant": None}},
        [],
    ):
        with pytest.raises(UsageError):
            Points.from_json(bad)
    line = PointEntry("x", "norm", "LayerNorm", 0, None, "kept").to_json()
    for bad in ({**line, "extra": 1}, {**line, "block": "0"}, {**line, "point": "nrom", "spec": good["norm"]}, []):
        with pytest.raises(UsageError):
            PointEntry.from_json(bad)
