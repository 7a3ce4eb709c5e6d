"""What a search chooses from."""

import itertools

import pytest

from quantailor.errors import UsageError
from quantailor.qat.settings import Settings, adapter_rate, learning_rates
from quantailor.searching.space import Point, Range, Space, point_of


def test_every_point_once_and_back_from_json():
    space = Space(bits=(4, 2), group=(32, 0), learning_rate=(0.5, 1.0, 2.0), steps=(5,), frozen=(0.0, 0.5))
    points = space.points()
    assert len(points) == len(set(points)) == space.size == 2 * 2 * 2 * 3 * 2
    slow = set(itertools.product((4, 2), (32, 0), ("learned", "fixed"), (0.5, 1.0, 2.0), (0.0, 0.5)))
    assert {(p.bits, p.group, p.scales, p.learning_rate, p.frozen) for p in points} == slow
    assert all(point_of(p.to_json()) == p and p in space for p in points)
    assert Point(bits=3) not in space
    assert str(Point(bits=4, group=0).scheme) == "w4a16" and str(Point(inputs=8).scheme) == "w4a8-g32"


def test_a_range_has_no_end():
    space = Space(learning_rate=Range(0.5, 2.0))
    assert space.size is None
    with pytest.raises(UsageError, match="no end"):
        space.points()
    assert 0.5 in Range(0.5, 2.0) and 2.1 not in Range(0.5, 2.0) and "1" not in Range(0.5, 2.0)
    assert {p.learning_rate for p in space.first_points()} == {1.0}
    assert {p.learning_rate for p in Space(learning_rate=Range(2.0, 8.0)).first_points()} == {4.0}


def test_first_points_have_each_scheme_once():
    space = Space(bits=(4, 3), group=(32, 64), inputs=(16, 8), learning_rate=(3.0, 0.9), frozen=(0.5, 0.0))
    first = space.first_points()
    assert len({p.scheme for p in first}) == len(first) == 8
    assert {(p.learning_rate, p.frozen) for p in first} == {(0.9, 0.5)}


def test_settings_of_a_point():
    base = Settings(batch_size=3, seed=5)
    made = Point(bits=2, scales="fixed", learning_rate=2.0, steps=7, frozen=0.5).settings(base, 1_000_000)
    assert made.learning_rate == pytest.approx(2 * learning_rates(base, 2, 1_000_000)[0])
    assert (made.steps, made.gradient, made.freeze_lower, made.batch_size, made.seed) == (7, "ste", 0.5, 3, 5)
    assert Point().settings(base, 1_000_000, steps=9).steps == 9


def test_a_rank_takes_the_adapters_rate_and_keeps_the_scales_choice():
    base = Settings()
    made = Point(bits=4, lora=8, scales="fixed", learning_rate=2.0).settings(base, 1_000_000)
    assert made.learning_rate == pytest.approx(2 * adapter_rate(base, 4)) and made.gradient == "lsq"
    assert "LoRA of rank 8, fixed scales" in str(Point(lora=8, scales="fixed"))
    space = Space().with_texts(["lora=0,8"])
    assert space.lora == (0, 8) and {p.lora for p in space.first_points()} == {0}


def test_texts():
    space = Space().with_texts(["bits=4, 3", "learning_rate=0.5..2", "scales=learned", "frozen=0"])
    assert space.bits == (4, 3) and space.learning_rate == Range(0.5, 2.0) and space.scales == ("learned",)
    assert space.frozen == (0.0,)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bits", "NAME=VALUES; the names are bits"),
        ("width=4", "the names are bits"),
        ("bits=four", "no values of bits"),
        ("bits=9", "w9a16"),
        ("bits=2..4", "only learning_rate takes a range"),
        ("learning_rate=2..1", "no range"),
        ("learning_rate=a..b", "no values of learning_rate"),
        ("learning_rate=0", "learning_rate=0.0 in the space must be"),
        ("scales=log", "none of learned, fixed"),
        ("steps=0", "steps=0 in the space must be 1 or more"),
        ("steps=5,5", "a value of steps twice"),
        ("frozen=1", "leaves no block to train"),
        ("group=-1", "group=-1"),
    ],
)
def test_what_is_no_space(text, said):
    with pytest.raises(UsageError, match=said):
        Space().with_texts([text])


def test_names_only_once():
    with pytest.raises(UsageError, match="names bits twice"):
        Space().with_texts(["bits=4", "bits=3"])
