import dataclasses

import pytest

from quantailor.cost.checklist import Run, check, usual_epochs

GOOD = Run(bits=4, pretrained=True, epochs=6.0, precision="bfloat16")
ITEMS = ["pretrained start", "mixed precision", "epochs", "accumulation", "partial layers", "early stop", "reuse"]


def test_a_sound_run_has_every_item_in_order():
    assert [(f.item, f.level) for f in check(GOOD)] == [(item, "ok") for item in ITEMS]


@pytest.mark.parametrize(
    ("change", "item", "level", "words"),
    [
        ({"pretrained": False}, "pretrained start", "warning", "scratch"),
        ({"precision": "float32"}, "mixed precision", "advice", "28.6%"),
        ({"epochs": 11.0}, "epochs", "warning", "overfits"),
        ({"epochs": None}, "epochs", "advice", "not known"),
        ({"batch_size": 2}, "accumulation", "advice", "2 rows"),
        ({"small_layers": 3}, "partial layers", "advice", "1000"),
        ({"evaluations": 1}, "early stop", "warning", "once"),
        ({"reuses": False}, "reuse", "advice", "PTQ"),
    ],
)
def test_each_fault_has_its_line_and_no_other(change, item, level, words):
    found = check(dataclasses.replace(GOOD, **change))
    faults = [f for f in found if f.level != "ok"]
    assert [(f.item, f.level) for f in faults] == [(item, level)] and words in faults[0].text


def test_no_advice_where_half_is_not_faster():
    found = check(dataclasses.replace(GOOD, precision="float32", half_is_faster=False))
    assert all(f.level == "ok" for f in found)


def test_epochs_by_bits():
    assert [usual_epochs(b) for b in (8, 4, 3, 2, 1)] == [(2, 5), (5, 10), (5, 10), (10, 20), (10, 20)]
