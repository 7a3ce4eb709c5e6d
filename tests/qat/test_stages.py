"""What a list of stages means."""

import pytest

from quantailor.errors import UsageError
from quantailor.qat.settings import Settings
from quantailor.qat.stages import Stage, parse_stages
from quantailor.spec import Scheme


def test_numbers_are_weight_bits_and_names_are_schemes():
    stages = parse_stages("8, 4,w2a16-g64,1.58:bitnet,1")
    assert [str(s.parsed) for s in stages] == ["w8a16-g32", "w4a16-g32", "w2a16-g64", "w1.58a16-g32", "w1a16-g32"]
    assert [s.gradient for s in stages] == [None, None, None, "bitnet", None]
    assert Stage(4).parsed == Stage(Scheme.parse("w4a16-g32")).parsed and Stage(1.58).parsed == stages[3].parsed


def test_each_stage_has_its_own_steps_and_rate_and_the_run_s_where_none_is_given():
    first, second = parse_stages("8,1.58:bitnet", "100,", ",1e-3")
    common = Settings(steps=7, learning_rate=0.5, batch_size=3)
    assert (first.settings(common).steps, first.settings(common).learning_rate) == (100, 0.5)
    made = second.settings(common)
    assert (made.steps, made.learning_rate, made.gradient, made.batch_size) == (7, 1e-3, "bitnet", 3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("8,4,2", "1,2"), "--stage-steps 1,2 has 2 places for 3 stages; leave a place empty for defaults"),
        (("8,4", None, "fast,slow"), "--stage-rates fast,slow is no list of numbers"),
        (("8,float",), "a stage of float quantizes no weight"),
        (("8,,2",), "--stages 8,,2 has an empty place"),
        (("9",), "unknown scheme '9'"),
        (("nf4,w4a16-g32x",), "unknown scheme 'w4a16-g32x'"),
    ],
)
def test_a_mistake_is_named(arguments, told):
    with pytest.raises(UsageError, match=None) as caught:
        parse_stages(*arguments)
    assert told in str(caught.value)


def test_a_stage_checks_its_settings():
    with pytest.raises(UsageError, match="steps=0 trains nothing"):
        Stage("w4a16-g32", steps=0).settings(Settings())
