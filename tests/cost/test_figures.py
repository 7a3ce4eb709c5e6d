import pytest

from quantailor.cost.figures import Figure, around, counted, total, weakest


def test_ends_multiply_divide_and_add():
    a, b = Figure(4, 2, 8, "measured", "a"), Figure(2, 1, 4, "table", "b")

    assert (a * b).low == 2 and (a * b).value == 8 and (a * b).high == 32
    assert ((a / b).low, (a / b).value, (a / b).high) == (0.5, 2, 8)
    assert ((a + b).low, (a + b).value, (a + b).high) == (3, 6, 12)
    assert (a * 3).high == 24 and total([a, b, b]).value == 8
    assert around(10, 0.25, "assumed", "x").low == 8


def test_a_figure_rests_on_its_weakest_part_and_names_all_sources():
    made = Figure(1, 1, 1, "measured", "probe") * Figure(1, 1, 1, "assumed", "guess") * counted(2.0)

    assert made.basis == "assumed" and made.source == "probe; guess"
    assert weakest(["counted", "table", "measured"]) == "table" and weakest([]) == "counted"


def test_a_value_outside_its_interval_is_refused():
    with pytest.raises(ValueError, match="interval"):
        Figure(1, 2, 3, "counted")
