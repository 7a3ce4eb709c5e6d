import pytest

from quantailor.cost.guides import claims, progressive_saving, saved_by_speed, share_of_scratch


def test_what_must_be_flagged():
    found = {c.about: c for c in claims()}
    amp = found["mixed precision at 1.4 times the speed"]
    assert not amp.holds and amp.said == "saves 40 %" and amp.computed == "28.6 %"
    progressive = found["progressive 8 -> 4 against 4 directly"]
    assert not progressive.holds and progressive.computed.startswith("2.0 %")
    llama = next(c for c in claims() if "LLaMA-65B" in c.about)
    assert not llama.holds and llama.computed.startswith("7.1 %")
    ten_billion = found["a model of 10^10 parameters in FP32"]
    assert not ten_billion.holds and ten_billion.computed == "40 GB"
    assert found["LoRA r=64 on q and v of a 7B"].computed.startswith("33.6 M")


def test_the_arithmetic():
    assert saved_by_speed(2) == 0.5 and saved_by_speed(1) == 0
    assert progressive_saving([(3, 1.22), (5, 1.29)], (10, 1.29)) == pytest.approx(0.216, abs=1e-3)  # the guide's own
    assert progressive_saving([(3, 1.22), (5, 1.29)], (8, 1.29)) == pytest.approx(0.0203, abs=1e-4)
    assert share_of_scratch(128 * 72, 256 * 504) == pytest.approx(1 / 14)


def test_sums_that_hold_are_not_flagged():
    assert any(c.holds for c in claims()) and all(c.how for c in claims())
