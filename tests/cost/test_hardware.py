from collections import Counter

import pytest

from quantailor.cost.hardware import DEVICES, device, has_kernel, support
from quantailor.cost.trace import Op
from quantailor.errors import UsageError
from quantailor.spec import Scheme


def test_names_counts_and_prices():
    one, eight = device("A100"), device("8xa100", price=1.5)
    assert one.count == 1 and one.price.basis == "assumed" and "no quote" in one.price.source
    assert eight.count == 8 and eight.price.value == 1.5 and eight.price.basis == "table"
    assert all("data sheet" in d.source for d in DEVICES.values())


@pytest.mark.parametrize("text", ["", "TPU", "0xA100", "-1xA100", "8x", "999999999xA100", "8xx A100"])
def test_what_is_not_in_the_table_is_refused(text):
    with pytest.raises(UsageError):
        device(text)


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_impossible_prices(price):
    with pytest.raises(UsageError, match="price"):
        device("A100", price)


def test_seconds_by_hand():
    ops = Counter({Op("mm", "bfloat16", 312 * 10**12, 0): 1, Op("add", "bfloat16", 0, 2039 * 10**9): 1})
    found = device("A100").seconds(ops)
    assert found.value == pytest.approx(1 / 0.30 + 1 / 0.60) and found.basis == "assumed"
    assert found.low == pytest.approx(1 / 0.50 + 1 / 0.80) and found.high == pytest.approx(1 / 0.15 + 1 / 0.40)
    four = device("4xA100").seconds(ops)
    assert four.value == pytest.approx(found.value / 4 / 0.9)


@pytest.mark.parametrize(
    ("scheme", "generation", "expected"),
    [
        ("w4a16-g128", 80, True), ("w4a16-g128", 70, False), ("w8a8", 75, True), ("w8a8", 100, False),
        ("w8a8", None, True), ("w2a16-g64", 80, False), ("w3a16-g32", None, False), ("w4a16-g32", None, True),
        ("nf4", 80, True), ("nf4", None, False), ("w1.58a8", 90, False), ("w1a1", None, False),
        ("w8a8-outliers", 80, False),
        ("float", 70, True),
    ],
)  # fmt: skip
def test_who_has_a_kernel(scheme, generation, expected):
    answers = support(Scheme.parse(scheme), generation)
    assert has_kernel(answers) is expected and all(a.why for a in answers)
